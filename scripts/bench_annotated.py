"""Measure labels from three abdominal scans that were annotated in part, and write docs/benchmarks/annotated.json.

``python scripts/bench_annotated.py``: the first support's label keeps the liver, the second's the kidneys, the third's
the spleen; new patients are labelled with the list of what was annotated, without it, and from the whole labels.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import PROJECT
from bench_sets import SETS, draw_cases, load_case

from nnunet_sam2.labelling.class_groups import GroupLabeller
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import FusionOptions
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.sam2.backend import load_backend
from nnunet_sam2.storage import write_json
from nnunet_sam2.support.cases import Support

RESULTS = PROJECT / "docs" / "benchmarks" / "annotated.json"
BENCH = SETS["chaos_t2_mr"]
VALUES = (1, 2, 3, 4)
KEPT = ((1,), (2, 3), (4,))


def main() -> None:
    """Label the queries of a draw in three ways and write what their Dice is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="seed of the draw")
    parser.add_argument("--queries", type=int, default=3)
    parser.add_argument("--sam2", default="embedded")
    parser.add_argument("-o", dest="output", type=Path, default=RESULTS)
    args = parser.parse_args()
    backend = load_backend(args.sam2, device="cpu", threads=1)
    given, asked = draw_cases(BENCH, len(KEPT), BENCH.queries, args.seed)
    whole = [load_case(BENCH, name, backend) for name in given]
    queries = [load_case(BENCH, name, backend) for name in asked[: args.queries]]
    ways = {
        "all annotated": whole,
        "in part, with the list": [_part(s, kept, kept) for s, kept in zip(whole, KEPT, strict=True)],
        "in part, without it": [_part(s, kept, None) for s, kept in zip(whole, KEPT, strict=True)],
    }
    rows = {name: _measured(supports, queries, backend) for name, supports in ways.items()}
    for name, row in rows.items():
        print(name, row)
    write_json(
        args.output,
        {"set": BENCH.name, "seed": args.seed, "supports": given, "queries": asked[: args.queries], "ways": rows},
    )


def _part(support: Support, kept: tuple[int, ...], annotated: tuple[int, ...] | None) -> Support:
    label_zyx = np.where(np.isin(support.label_zyx, kept), support.label_zyx, 0).astype(support.label_zyx.dtype)
    return dataclasses.replace(support, label_zyx=label_zyx, annotated=annotated)


def _measured(supports: list[Support], queries: list[Support], backend: Any) -> dict[str, Any]:
    begun = time.process_time()
    labeller = GroupLabeller(make_strategy("auto"), supports, VALUES)
    labeller.prepare(backend)
    single = single_component_classes([support.label_zyx for support in supports], VALUES)
    fusion = FusionOptions(single_component_classes=single)
    tables = []
    for query in queries:
        pseudo = labeller.label(query.as_query(), supports, backend, np.random.default_rng(0), fusion)
        tables.append(dice_by_class(pseudo.label_zyx, query.label_zyx, VALUES))
    names = {values[0]: name for name, values in BENCH.scored.items()}
    dice = {names[v]: round(float(np.mean([table[v] or 0.0 for table in tables])), 4) for v in VALUES}
    return {
        "dice": dice,
        "mean": round(float(np.mean(list(dice.values()))), 4),
        "core_seconds": round(time.process_time() - begun, 1),
    }


if __name__ == "__main__":
    main()
