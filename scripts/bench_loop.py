"""Run the loop on real images and write its table into docs/benchmarks.md.

For each set: nnU-Net on the labelled cases alone, the same for as long as all rounds together, SAM 2's raw labels, each
round, and the bound with the human labels of all cases. Usage: bench_loop.py [--sets ...] [--seeds ...] [--work DIR].
A killed benchmark continues when started again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_data import PROJECT, SETS, BenchSet, converted
from bench_table import write_table
from filelock import FileLock
from scoring import score_model, score_run

from nnunet_sam2.cohort.cohort import HIDDEN_LABELS, Cohort
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds import nnunet
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.orchestrator import run_loop
from nnunet_sam2.rounds.state import RunState
from nnunet_sam2.storage import read_json, write_json
from nnunet_sam2.trainers.settings import RoundSettings

RESULTS = PROJECT / "docs" / "benchmarks" / "loop.json"


def main() -> None:
    """Run what is asked for and write JSON and table after every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=sorted(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work", type=Path, default=PROJECT / "bench_work")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only write the table from the JSON")
    args = parser.parse_args()
    if not args.table:
        for seed in args.seeds:
            for name in args.sets:
                for result in bench(SETS[name], seed, args.work.resolve(), rounds=args.rounds, threads=args.threads):
                    with FileLock(RESULTS.with_suffix(".lock")):
                        results = read_json(RESULTS) if RESULTS.is_file() else {}
                        results[f"{name}/{seed}"] = result
                        write_json(RESULTS, dict(sorted(results.items())))
    write_table(RESULTS, PROJECT / "docs" / "benchmarks.md", PROJECT / "README.md")


def bench(bench_set: BenchSet, seed: int, work: Path, *, rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    """Run one set with one seed and yield its scores, as far as they are known."""
    folders = converted(bench_set, seed, work, f"{bench_set.name}-seed{seed}")
    cohort = Cohort.load(folders.raw)
    options = RunOptions(
        configuration=bench_set.configuration,
        fold=bench_set.fold,
        profile="cpu",
        round_limit=rounds,
        num_iterations_per_epoch=bench_set.iterations_per_epoch,
        seed=seed,
        device="cpu",
        threads=threads,
    )
    state = run_loop(folders, options)
    out = work / f"{folders.name}_test"
    result = score_run(folders, cohort, state, threads=threads, out=out)
    settings = _first_round_settings(folders, options)
    result["all_labels"] = _extra(folders, cohort, options, "bound", settings, out, hidden=True)
    result["set"] = vars(bench_set)
    result["labeller"] = {"strategy": options.strategy, "sam2": options.sam2}
    result["sam2_labels_seconds"] = _stage_seconds(state)
    result["finished"] = time.strftime("%Y-%m-%d")
    yield result
    # last, because it takes as long as all the rest: what the rounds' computing time is worth without their labels
    longer = replace(settings, num_epochs=settings.num_epochs * (1 + len(result["rounds"])))
    result["labelled_only_longer"] = _extra(folders, cohort, options, "long", longer, out, hidden=False)
    yield result


def _extra(
    folders: DatasetFolders,
    cohort: Cohort,
    options: RunOptions,
    suffix: str,
    settings: RoundSettings,
    out: Path,
    *,
    hidden: bool,
) -> dict[str, Any]:
    """Train a model for comparison: longer on the same labels, or with the hidden human labels of all cases."""
    name = f"{options.configuration}_{suffix}"
    nnunet.make_round_configuration(
        folders,
        cohort,
        base_configuration=options.configuration,
        name=name,
        settings=settings,
        pseudo_cases=[c.case_id for c in cohort.unlabelled] if hidden else (),
        labels=cohort.root / HIDDEN_LABELS if hidden else None,
        overrides=nnunet.light_configuration(
            read_json(folders.preprocessed / f"{nnunet.PLANS}.json"), options.configuration
        ),
    )
    started = time.monotonic()
    fold = options.fold if options.fold == "all" else int(options.fold)
    nnunet.train(folders, name, fold, device="cpu", log=out / f"{name}_train.log", threads=options.threads)
    seconds_file = out / f"{name}_seconds.json"
    if not seconds_file.is_file():
        write_json(seconds_file, round(time.monotonic() - started, 1))
    scored = score_model(folders, cohort, name, options.fold, threads=options.threads or 1, out=out / name)
    iterations = settings.num_epochs * settings.num_iterations_per_epoch
    return {**scored, "iterations": iterations, "seconds": read_json(seconds_file)}


def _first_round_settings(folders: DatasetFolders, options: RunOptions) -> RoundSettings:
    plans = read_json(folders.preprocessed / f"{nnunet.PLANS}.json")
    light = nnunet.light_settings(plans, options.configuration)
    return replace(options.training(light), seed=options.seed)


def _stage_seconds(state: RunState) -> float:
    from nnunet_sam2.rounds.ledger import LEDGER_FILE, read_events

    events = read_events(state.folder / LEDGER_FILE)
    return sum(e["seconds"] for e in events if e["event"] == "done" and e["stage"] == "setup/sam2")


if __name__ == "__main__":
    main()
