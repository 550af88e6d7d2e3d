"""Hold `run --dry-run` against a real run: estimate, run the loop, and compare every stage.

Usage: bench_estimate.py [--seed N] [--work DIR] [--table]. The table goes into docs/benchmarks.md. The estimate is made
before the run and kept; a killed run continues when started again, its stages' processor seconds with it.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_data import PROJECT, SETS, converted
from marked_table import replace_marked

from nnunet_sam2.cli.status import duration
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.machine import usable_cores
from nnunet_sam2.provenance import provenance
from nnunet_sam2.report.write import try_to_report
from nnunet_sam2.rounds import orchestrator
from nnunet_sam2.rounds.estimate import estimate_run
from nnunet_sam2.rounds.ledger import Ledger, StageResult
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.storage import read_json, write_json

RESULTS = PROJECT / "docs" / "benchmarks" / "estimate.json"
PAGE = PROJECT / "docs" / "benchmarks.md"
SMALL = replace(SETS["hippocampus"], dataset_id=650, n_labelled=4, n_unlabelled=6, n_test=3)


def main() -> None:
    """Estimate, run, compare, and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=PROJECT / "bench_work" / "estimate")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only write the table from the JSON")
    args = parser.parse_args()
    if not args.table:
        options = RunOptions(
            profile="cpu",
            device="cpu",
            threads=args.threads,
            round_limit=args.rounds,
            num_epochs=args.epochs,
            num_iterations_per_epoch=args.iterations,
            image_size=256,
            seed=args.seed,
        )
        write_json(RESULTS, bench(args.seed, args.work.resolve(), options))
    replace_marked(PAGE, "estimate", table(read_json(RESULTS)))


def bench(seed: int, work: Path, options: RunOptions) -> dict[str, Any]:
    """Return the estimate and what the run really took."""
    folders = converted(SMALL, seed, work, f"{SMALL.name}-small-seed{seed}")
    before = work / "estimate.json"
    if not before.is_file():
        write_json(before, {**estimate_run(folders, options).to_json(), "load": _load()})
    estimate = read_json(before)
    started, loads = time.time(), [_load()]
    stages = _run(folders, options, work / "stages.json", loads)
    return {
        "machine": provenance(),
        "threads": options.threads,
        "usable_cores": usable_cores(),
        "set": {"name": SMALL.name, "seed": seed, "labelled": SMALL.n_labelled, "unlabelled": SMALL.n_unlabelled},
        "options": options.to_json(),
        "estimate": {key: value for key, value in estimate.items() if key != "run"},
        "stages": stages,
        "wall_seconds": round(time.time() - started, 1),
        "load_before_estimate": estimate["load"],
        "load_during_run": round(sum(loads) / len(loads), 2),
        "most_memory_bytes": 1024 * max(resource.getrusage(who).ru_maxrss for who in _WHO),
        "disk_bytes": sum(_bytes(folder) for folder in (folders.preprocessed, folders.results)),
        "finished": time.strftime("%Y-%m-%d"),
    }


def table(result: Mapping[str, Any]) -> str:
    """Lay out estimate and truth, stage by stage."""
    rows = [
        "| stage | estimated | took | ratio | estimated CPU s | took CPU s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    told = {stage["stage"]: stage for stage in result["estimate"]["stages"]}
    both = [name for name in told if name in result["stages"]]
    for name in both:
        rows.append(_row(name, told[name], result["stages"][name]))
    sums = [
        {key: sum(part[name][key] for name in both) for key in ("seconds", "cpu_seconds")}
        for part in (told, result["stages"])
    ]
    rows.append(_row("**all**", *sums))
    missing = sorted(set(told) - set(both))
    more = sorted(set(result["stages"]) - set(told))
    made = result["set"]
    memory = result["estimate"]["sum"]["memory_bytes"] / 1e9
    disk = result["estimate"]["sum"]["disk_bytes"] / 1e9
    lines = [
        f"{made['name']} (draw of seed {made['seed']}), {made['labelled']} labelled, {made['unlabelled']} unlabelled "
        f"cases, `auto` at {result['options']['image_size']} px, {result['options']['round_limit']} rounds, "
        f"{result['options']['num_epochs']} epochs of {result['options']['num_iterations_per_epoch']} iterations, "
        f"{result['threads']} thread; {result['machine']['processor']}, {result['usable_cores']} cores. "
        f"{result['load_before_estimate']:.1f} processes wanted a core before the estimate, "
        f"{result['load_during_run']:.1f} on the mean during the run, its own among them.",
        "",
        *rows,
        "",
        f"Most memory of one process: {result['most_memory_bytes'] / 1e9:.1f} GB (of all together, estimated: "
        f"{memory:.1f} GB). Disk: {result['disk_bytes'] / 1e9:.1f} GB (estimated as an upper bound: {disk:.1f} GB).",
    ]
    if missing:
        lines.append(f"Estimated, but not needed: {', '.join(missing)}.")
    if more:
        lines.append(f"Not estimated: {', '.join(more)}.")
    return "\n".join(lines)


def _row(name: str, told: Mapping[str, float], took: Mapping[str, float]) -> str:
    ratios = [
        f"{told[key] / took[key]:.2f}" if took[key] and max(took[key], told[key]) >= 1 else "-"
        for key in ("seconds", "cpu_seconds")
    ]
    wall = f"{duration(told['seconds'])} | {duration(took['seconds'])} | {ratios[0]}"
    return f"| {name} | {wall} | {told['cpu_seconds']:.0f} | {took['cpu_seconds']:.0f} | {ratios[1]} |"


def _run(folders: DatasetFolders, options: RunOptions, kept: Path, loads: list[float]) -> dict[str, Any]:
    """Run the loop with a ledger that also counts processor seconds."""
    stages: dict[str, Any] = read_json(kept) if kept.is_file() else {}

    class CountingLedger(Ledger):
        def run_stage(
            self, stage: str, inputs: Mapping[str, Any], work: Callable[[], StageResult], **more: Any
        ) -> dict[str, Any]:
            def counted() -> StageResult:
                before = _cpu_seconds()
                result = work()
                stages[stage] = {"cpu_seconds": round(_cpu_seconds() - before, 2)}
                loads.append(_load())
                return result

            event = super().run_stage(stage, inputs, counted, **more)
            stages.setdefault(stage, {"cpu_seconds": 0.0})["seconds"] = event["seconds"]
            write_json(kept, stages)
            return event

    stock, orchestrator.Ledger = orchestrator.Ledger, CountingLedger  # type: ignore[misc]
    try:
        state = orchestrator.run_loop(folders, options)
    finally:
        orchestrator.Ledger = stock  # type: ignore[misc]
    try_to_report(folders, state.folder, most_pictures=None)
    return stages


_WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in _WHO]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _load() -> float:
    return round(os.getloadavg()[0], 2)


def _bytes(folder: Path) -> int:
    seen = {(s.st_dev, s.st_ino): s.st_size for s in (p.stat() for p in folder.rglob("*") if p.is_file())}
    return sum(seen.values())


if __name__ == "__main__":
    main()
