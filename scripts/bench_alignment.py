"""Place cut scans along their slices and write docs/benchmarks/alignment.json and its table.

``python scripts/bench_alignment.py --cache-dir DIR`` takes draws of three labelled cases and cuts new scans to 60 % of
their slices: the first ones, the last ones, the middle. It says how far, in millimetres, the middles of the classes lie
from those of the supports when scans are taken to show the same from end to end, and when `auto` places them. Whole
scans show whether anything is placed that needs no place. Nothing is labelled: a draw is seconds beside its encoding.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import PROJECT
from bench_sets import SETS, draw_cases, load_case
from marked_table import replace_marked
from methods_bench.cells import table

from nnunet_sam2.labelling.strategies.auto.field_of_view import place_along_axis, shared_axis
from nnunet_sam2.labelling.strategies.auto.scan import Scan
from nnunet_sam2.sam2.backend import load_backend
from nnunet_sam2.storage import read_json, write_json
from nnunet_sam2.support.cases import Support

RESULTS = PROJECT / "docs" / "benchmarks" / "alignment.json"
PAGE = PROJECT / "docs" / "benchmarks.md"
SET_NAMES = ("btcv_ct", "chaos_t2_mr", "hippocampus")
CUTS = {"whole": (0.0, 1.0), "first 60 %": (0.0, 0.6), "last 60 %": (0.4, 1.0), "middle 60 %": (0.2, 0.8)}
SUPPORTS = 3


def main() -> None:
    """Measure all draws, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the table from the results that are there")
    parser.add_argument("--draws", type=int, default=3, help="seeds from 0 on")
    parser.add_argument("--cache-dir", type=Path, default=None, help="keep embeddings between runs")
    args = parser.parse_args()
    if not args.table:
        write_json(RESULTS, {"rows": [row for seed in range(args.draws) for row in _measured(seed, args.cache_dir)]})
    replace_marked(PAGE, "alignment", _table(read_json(RESULTS)["rows"]))


def _measured(seed: int, cache: Path | None) -> list[dict[str, Any]]:
    backend = load_backend("embedded", device="cpu", threads=1, cache_dir=cache)
    rows = []
    for name in SET_NAMES:
        bench = SETS[name]
        values = tuple(sorted({value for part in bench.scored.values() for value in part}))
        given, asked = draw_cases(bench, SUPPORTS, min(bench.queries, 6), seed)
        supports = [load_case(bench, case, backend) for case in given]
        scans = [Scan.of(support.frames, support.embeddings) for support in supports]
        offsets, middles = shared_axis(supports, values), [_middles(support, values) for support in supports]
        for case in asked:
            query = load_case(bench, case, backend)
            scan, own = Scan.of(query.frames, query.embeddings), _middles(query, values)
            for cut, (low, high) in CUTS.items():
                first, stop = (round(end * len(query.frames)) for end in (low, high))
                part = replace(scan, descriptions_nf=scan.descriptions_nf[first:stop])
                start_mm, stop_mm = first * scan.spacing_mm, stop * scan.spacing_mm
                shown = {value: mm - start_mm for value, mm in own.items() if start_mm <= mm < stop_mm}
                if not shown:
                    continue
                shift = place_along_axis(part, scans, offsets)
                ends = [
                    (shown[v] / part.length_mm * other.length_mm, shown[v] + (shift or 0.0) - offset, middle[v])
                    for other, offset, middle in zip(scans, offsets, middles, strict=True)
                    for v in shown
                    if v in middle
                ]
                apart = {
                    "from end to end": float(np.mean([abs(proportional - mm) for proportional, _, mm in ends])),
                    "moved": float(np.mean([abs(moved - mm) for _, moved, mm in ends])),
                }
                rows.append(
                    {
                        "set": name,
                        "seed": seed,
                        "case": case.split(".")[0],
                        "cut": cut,
                        "placed": shift is not None,
                        "end_to_end_mm": round(apart["from end to end"], 2),
                        "auto_mm": round(apart["from end to end" if shift is None else "moved"], 2),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def _middles(case: Support, values: Sequence[int]) -> dict[int, float]:
    """Return where the classes' middles lie along the slices, in millimetres from the first slice's outer face."""
    label_nhw, spacing_mm = case.frames.slices_first(case.label_zyx), case.geometry.spacing_zyx_mm
    found = {}
    for value in values:
        counts = (label_nhw == value).sum(axis=(1, 2))
        if counts.any():
            middle = float(np.average(np.arange(len(counts)) + 0.5, weights=counts))
            found[value] = middle * spacing_mm[case.frames.slice_axis]
    return found


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for name in SET_NAMES:
        for cut in CUTS:
            mine = [row for row in rows if row["set"] == name and row["cut"] == cut]
            if mine:
                before, after = ([row[key] for row in mine] for key in ("end_to_end_mm", "auto_mm"))
                placed = sum(row["placed"] for row in mine)
                figures = [f"{np.mean(before):.1f}", f"{np.mean(after):.1f}", f"{max(after):.1f}"]
                lines.append([name, cut, str(len(mine)), f"{placed} of {len(mine)}", *figures])
    return table(["set", "slices", "scans", "placed", "end to end, mm", "as placed, mm", "farthest, mm"], lines)


if __name__ == "__main__":
    main()
