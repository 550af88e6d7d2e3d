"""Measure what correcting a few labels by hand is worth, and which ones to correct first.

SAM 2 labels the unlabelled cases of a cut; some are then corrected (their hidden human label takes the machine's
place), chosen by the order of ``nnunet_sam2 review``, at random, or with the truth in hand, which no order can know.
Scored are all cases, as an annotation project would hand them in, and those alone that nobody corrected, once as they
were and once labelled anew with the corrections as further supports. No network is trained.
Usage: bench_review.py [--sets ...] [--seeds ...] [--work DIR] [--table].
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import PROJECT, SETS, BenchSet, converted
from marked_table import replace_marked

from nnunet_sam2.cohort.cohort import HIDDEN_LABELS, Addition, Cohort
from nnunet_sam2.cohort.splits import make_splits
from nnunet_sam2.evaluation import evaluate
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.report.gather import gather
from nnunet_sam2.report.run_files import RunFiles
from nnunet_sam2.review.order import in_order, rank_case
from nnunet_sam2.review.signs import signs_of_run
from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.decisions.holds import CaseHold
from nnunet_sam2.rounds.labelling_stages import LabellingStages
from nnunet_sam2.rounds.ledger import Ledger, StageResult
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.state import run_folder
from nnunet_sam2.storage import file_hash, read_json, write_json

RESULTS = PROJECT / "docs" / "benchmarks" / "review.json"
PAGE = PROJECT / "docs" / "benchmarks.md"
CORRECTED = {"acdc": 4, "chaos_t2_mr": 2, "hippocampus": 8}
ORDERS = ("review", "random", "truth")
DRAWS = 100
"""Random choices that are scored as they are; one of them is labelled anew."""


def main() -> None:
    """Measure what has no result yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=sorted(CORRECTED), default=["acdc", "chaos_t2_mr"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=PROJECT / "bench_work" / "review")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only write the table from the JSON")
    args = parser.parse_args()
    results = read_json(RESULTS) if RESULTS.is_file() else {}
    for name in () if args.table else args.sets:
        for seed in args.seeds:
            if f"{name}/{seed}" not in results:
                results[f"{name}/{seed}"] = bench(SETS[name], seed, args.work.resolve(), args.threads)
                write_json(RESULTS, dict(sorted(results.items())))
    replace_marked(PAGE, "review", table(results))


def bench(bench_set: BenchSet, seed: int, work: Path, threads: int) -> dict[str, Any]:
    """Return the Dice of one cut before and after corrections, chosen in each order."""
    folders = converted(bench_set, seed, work, f"{bench_set.name}-review-seed{seed}")
    run = _begin(folders, seed, threads)
    stages = LabellingStages(run)
    labels = stages.label_from_supports()
    stages.fuse(1, labels, None, None, previous=None)
    before = _dice(run.cohort, labels.folder)
    count = CORRECTED[bench_set.name]
    random = np.random.default_rng(seed)
    draws = [sorted(random.choice(sorted(before), count, replace=False).tolist()) for _ in range(DRAWS)]
    chosen = {
        "review": _review_order(folders, run)[:count],
        "random": draws[0],
        "truth": sorted(before, key=lambda case_id: before[case_id])[:count],
    }
    result: dict[str, Any] = {
        "labelled": len(run.cohort.labelled),
        "unlabelled": len(before),
        "corrected": count,
        "strategy": run.options.strategy,
        "sam2": run.options.sam2,
        "before": _mean(before.values()),
        "random_draws": _mean(_all(before, before, draw) for draw in draws),
        "orders": {},
    }
    for number, order in enumerate(ORDERS, start=2):
        holds = {case_id: CaseHold(human=_addition(run.cohort, case_id)) for case_id in chosen[order]}
        after = _dice(run.cohort, stages.label_from_supports(number, holds).folder)
        rest = [case_id for case_id in before if case_id not in holds]
        result["orders"][order] = {
            "cases": list(holds),
            "all": _all(before, before, holds),
            "all_anew": _all(after, before, holds),
            "rest": _mean(before[case_id] for case_id in rest),
            "rest_anew": _mean(after[case_id] for case_id in rest),
        }
        print(bench_set.name, seed, order, result["orders"][order], flush=True)
    return result


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out one row a cut and order."""
    lines = [
        "| set, seed | labelled + corrected of unlabelled | order | all cases: before | corrected | and labelled anew "
        "| the rest: before | labelled anew |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, result in results.items():
        name, seed = key.split("/")
        for order, entry in result["orders"].items():
            counts = f"{result['labelled']} + {result['corrected']} of {result['unlabelled']}"
            mean = f" (mean of {DRAWS}: {result['random_draws']:.3f})" if order == "random" else ""
            lines.append(
                f"| {name}, {seed} | {counts} | {order} | {result['before']:.3f} | {entry['all']:.3f}{mean} | "
                f"{entry['all_anew']:.3f} | {entry['rest']:.3f} | {entry['rest_anew']:.3f} |"
            )
    return "\n".join(lines) if results else "Not run yet."


def _begin(folders: DatasetFolders, seed: int, threads: int) -> RunContext:
    """Begin a run as the loop does, up to SAM 2's labels: nnU-Net plans nothing."""
    options = RunOptions(fold="all", profile="cpu", device="cpu", threads=threads, seed=seed, branch="review")
    folder = run_folder(folders, options.run_name)
    cohort, ledger = Cohort.load(folders.raw), Ledger(folder)
    if not ledger.events:
        ledger.append("run", options=options.to_json())
    ledger.run_stage("setup/plan", {}, lambda: StageResult(info={"folds": make_splits(cohort)}), what="folds")
    return RunContext(folders=folders, cohort=cohort, options=options, ledger=ledger, folder=folder)


def _review_order(folders: DatasetFolders, run: RunContext) -> list[str]:
    files = RunFiles.open(folders, run.folder)
    signs = signs_of_run(files, gather(files))
    return in_order({case_id: rank_case(own, files.class_names) for case_id, own in signs.items()})


def _addition(cohort: Cohort, case_id: str) -> Addition:
    name = f"{HIDDEN_LABELS}/{case_id}{cohort.file_ending}"
    return Addition(label=name, sha256=file_hash(cohort.root / name), time="", source=name)


def _dice(cohort: Cohort, folder: Path) -> dict[str, float]:
    scores = evaluate(cohort.root / HIDDEN_LABELS, folder, class_values=cohort.class_values)
    return {case_id: float(case["dice"]) for case_id, case in scores["cases"].items()}


def _all(machine: Mapping[str, float], of: Mapping[str, float], corrected: Mapping[str, Any] | Sequence[str]) -> float:
    return _mean(1.0 if case_id in corrected else machine[case_id] for case_id in of)


def _mean(values: Any) -> float:
    found = list(values)
    return round(sum(found) / len(found), 4)


if __name__ == "__main__":
    main()
