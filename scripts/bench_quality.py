"""Hold estimated against true Dice, by patient, and write docs/benchmarks/quality.json and its table.

``python scripts/bench_quality.py --cache-dir DIR --minutes M`` labels draws of labelled and new patients by `auto` with
the model in the box, estimates as `nnunet_sam2 label` does, and compares with the human labels. Every draw that has no
result yet is measured, all sets in turn, and written when it is done; started again it goes on. ``--table`` only writes
the table.

acdc_ssl4mis has two scans of each patient. There the draws are measured thrice: *patient* leaves out patients, as the
package does; *case* takes each scan for a patient of its own, as it did before; *own scan* has one scan of each patient
labelled and asks for the other one.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import PROJECT
from bench_sets import SETS
from marked_table import replace_marked
from methods_bench.cells import number, table
from methods_bench.counting import CountingBackend
from methods_bench.measure import Students, measure
from methods_bench.scores import rank_correlation
from methods_bench.tasks import Cases, Task
from methods_bench.variants import Variant

from nnunet_sam2.labelling import job
from nnunet_sam2.labelling.quality.calibration import proven_coverage
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.registry import options_json
from nnunet_sam2.sam2.backend import load_backend
from nnunet_sam2.sam2.cache import EmbeddingCache
from nnunet_sam2.storage import read_json, write_json

RESULTS = PROJECT / "docs" / "benchmarks" / "quality.json"
PAGE = PROJECT / "docs" / "benchmarks.md"
SET_NAMES = ("acdc_ssl4mis", "chaos_t2_mr", "hippocampus", "btcv_ct")
QUERIES = {"acdc_ssl4mis": 6}
"""Scans that are asked for in a draw, where not four."""
PATIENT, CASE, OWN_SCAN = "patient", "case", "own scan"
_VERSION = 1
"""Raised when the bench measures the same thing in another way."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Name one measurement."""

    set_name: str
    left_out: str
    supports: int
    queries: int
    seed: int

    @property
    def key(self) -> str:
        """Return the name of the draw among the results."""
        return f"{self.set_name}/{self.left_out}/{self.supports}/seed {self.seed}"


def main() -> None:
    """Measure the draws that have no result, then write the table."""
    args = _arguments()
    if not args.table:
        _measure_all(args)
    if args.output == RESULTS:
        found = read_json(RESULTS) if RESULTS.is_file() else {"draws": {}}
        replace_marked(PAGE, "quality", quality_table(found["draws"]) or "Not run yet.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the table from the results that are there")
    parser.add_argument("--sets", nargs="+", choices=SET_NAMES, default=list(SET_NAMES))
    parser.add_argument("--supports", type=int, default=3, help="labelled patients")
    parser.add_argument("--queries", type=int, default=None, help="scans asked for (default: 6 of acdc, else 4)")
    parser.add_argument("--draws", type=int, default=3, help="seeds from 0 on")
    parser.add_argument("--minutes", type=float, default=None, help="begin no draw after so many minutes")
    parser.add_argument("--again", action="store_true", help="measure anew, whatever is there")
    parser.add_argument("--cache-dir", type=Path, default=None, help="keep embeddings between runs")
    parser.add_argument("--cache-gb", type=float, default=8.0, help="what that folder may hold")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def planned(sets: Sequence[str], *, supports: int, queries: int | None, draws: int) -> list[Draw]:
    """Return the draws: all sets with their first seed, then with the next."""
    return [
        Draw(
            set_name=name,
            left_out=left_out,
            supports=supports,
            queries=supports if left_out == OWN_SCAN else queries or QUERIES.get(name, 4),
            seed=seed,
        )
        for seed in range(draws)
        for name in sets
        for left_out in ((PATIENT, CASE, OWN_SCAN) if SETS[name].order else (PATIENT,))
    ]


def _measure_all(args: argparse.Namespace) -> None:
    end = None if args.minutes is None else time.monotonic() + 60.0 * args.minutes
    loaded = load_backend("embedded", device="cpu", threads=1)
    backend = CountingBackend(loaded, cache=EmbeddingCache(args.cache_dir, disk_gb=args.cache_gb))
    variant = Variant(name="auto", strategy="auto")
    cases, students = Cases(backend), Students(backend, 0)
    for draw in planned(args.sets, supports=args.supports, queries=args.queries, draws=args.draws):
        if end is not None and time.monotonic() >= end:
            print("time is up; start again to go on", flush=True)
            return
        found = read_json(args.output) if args.output.is_file() else {"draws": {}}
        strategy, quality = variant.make(has_memory=loaded.spec.has_memory), QualityOptions()
        identity = {
            "version": [_VERSION, job._VERSION],  # other labels are measured anew
            "queries": draw.queries,
            "checkpoint": loaded.spec.checkpoint_hash,
            "image_size": loaded.spec.image_size,
            "options": options_json(strategy.options),
            "quality": quality.looked_at,
        }
        if not args.again and found["draws"].get(draw.key, {}).get("identity") == identity:
            continue
        started, task = time.monotonic(), task_of(draw, cases)
        measured = measure(
            variant, strategy, [task], backend, students, seed=draw.seed, quality=quality, calibrate=True
        )
        patients = {case.case_id: case.patient_id for case in cases_of(draw, cases)[1]}
        entry = {
            "identity": identity,
            "supports": [support.case_id for support in task.supports],
            "cases": {
                case_id: {"patient": patients[case_id], "classes": case["quality"]}
                for case_id, case in measured["cases"].items()
            },
            "seconds": round(time.monotonic() - started),
            "date": datetime.date.today().isoformat(),
        }
        found["draws"] = dict(sorted({**found["draws"], draw.key: entry}.items()))
        write_json(args.output, found)
        print(f"{draw.key}: {'; '.join(summary_row([entry]))} ({entry['seconds']} s)", flush=True)


def cases_of(draw: Draw, cases: Cases) -> tuple[list[Any], list[Any]]:
    """Return the supports and the queries of a draw, with their patients."""
    task = cases.tasks(draw.set_name, draw.supports, draw.queries, draw.seed)[0]
    if draw.left_out != OWN_SCAN:
        return list(task.supports), list(task.queries)
    first: dict[str, Any] = {}
    for support in task.supports:
        first.setdefault(support.patient_id, support)
    asked = {s.patient_id: s for s in task.supports if s is not first[s.patient_id]}
    return list(first.values()), list(asked.values())


def task_of(draw: Draw, cases: Cases) -> Task:
    """Return the labelling problem of a draw; by case, nothing knows that two scans are one patient's."""
    supports, queries = cases_of(draw, cases)
    if draw.left_out == CASE:
        supports, queries = ([replace(case, patient=None) for case in part] for part in (supports, queries))
    return Task(name=draw.set_name, scored=SETS[draw.set_name].scored, supports=supports, queries=queries)


def quality_table(draws: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table: a row for each set, number of labelled patients and what is left out, over all draws."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for key, entry in draws.items():
        set_name, left_out, supports, _ = key.split("/")
        groups.setdefault((set_name, supports, left_out), []).append(entry)
    header = ["set", "labelled patients", "left out", "draws", "new patients", "estimated", "true", "bias", "error"]
    header += ["Spearman, classes", "Spearman, patients", "bounds held", "promised", "proven"]
    rows = [[*group, str(len(entries)), *summary_row(entries)] for group, entries in sorted(groups.items())]
    return table(header, rows) if rows else ""


def summary_row(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return patients, means, bias, error, rank correlations, and how many bounds held against what they promise."""
    classes = [case["classes"] for entry in entries for case in entry["cases"].values()]
    of_patients = list(_by_patient(entries))
    pairs = [(row["estimate"], row["dice"]) for case in of_patients for row in case.values()]
    estimated, true = np.array(pairs, float).reshape(-1, 2).mean(axis=0) if pairs else (None, None)
    bounds = [
        (row["lower"] <= row["dice"], row["coverage"])
        for case in classes
        for row in case.values()
        if row["lower"] is not None and row["dice"] is not None
    ]
    held, promised, proven = "", "", ""
    if bounds:
        held = f"{sum(kept for kept, _ in bounds)} of {len(bounds)} ({np.mean([kept for kept, _ in bounds]):.2f})"
        promised = number(float(np.mean([coverage for _, coverage in bounds])), 2)
        proven = number(float(np.mean([proven_coverage(coverage) for _, coverage in bounds])), 2)
    correlation = rank_correlation(classes)
    return [
        str(len(of_patients)),
        number(estimated),
        number(true),
        "" if estimated is None or true is None else f"{estimated - true:+.3f}",
        number(correlation["error"]),
        number(correlation["spearman"], 2),
        number(rank_correlation(of_patients)["spearman"], 2),
        held,
        promised,
        proven,
    ]


def _by_patient(entries: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, dict[str, float]]]:
    """Yield the mean estimated and true Dice of each patient of a draw, over scans and classes."""
    for entry in entries:
        patients: dict[str, list[tuple[float, float]]] = {}
        for case in entry["cases"].values():
            patients.setdefault(case["patient"], []).extend(
                (row["estimate"], row["dice"])
                for row in case["classes"].values()
                if row["estimate"] is not None and row["dice"] is not None
            )
        for pairs in patients.values():
            if pairs:
                estimate, dice = np.mean(pairs, axis=0).tolist()
                yield {"mean": {"estimate": estimate, "dice": dice}}


if __name__ == "__main__":
    main()
