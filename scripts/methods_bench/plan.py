"""Which cells there are, in which order, and with how many queries: costs are rough, and decide nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from methods_bench.tasks import FEW_SHOT, set_of
from methods_bench.variants import COPIES, DEFORMABLE, STUDENT, Variant

SET_NAMES = ("hippocampus", "chaos_t2_mr", "acdc", "acdc_ssl4mis", "btcv_ct", "ddsm_tissue", FEW_SHOT)
SUPPORTS = (1, 3, 8)
FEW_SHOT_QUERIES = 11
"""All patients of chaos_t2_mr but the one that supports."""

CALIBRATED = ("transfer", "auto", "match", "guided", "refine", "refine, paper", "chain")
"""Variants whose estimates are calibrated: each support is labelled from other patients as well."""

VOLUMES = ("hippocampus", "chaos_t2_mr", "btcv_ct")
"""Sets whose scans are thick enough to be registered in three dimensions."""

PICTURES = ("ddsm_tissue",)
"""Sets of single images, for which `chain` was made."""

_LEAST_QUERIES = 2
_WHOLE = (*COPIES, *CALIBRATED)
"""Variants that label all queries of a set, whatever it takes."""


@dataclass(frozen=True, kw_only=True)
class _Shape:
    slices: int
    classes: int


_SHAPES = {
    "hippocampus": _Shape(slices=40, classes=2),
    "chaos_t2_mr": _Shape(slices=35, classes=4),
    "acdc": _Shape(slices=10, classes=3),
    "acdc_ssl4mis": _Shape(slices=10, classes=3),
    "btcv_ct": _Shape(slices=150, classes=13),
    "ddsm_tissue": _Shape(slices=1, classes=1),
    # Four tasks of one class.
    FEW_SHOT: _Shape(slices=140, classes=1),
}


@dataclass(frozen=True, kw_only=True)
class _Rate:
    """Seconds of one core with the embedded model at 256 pixels."""

    a_slice: float = 0.0
    a_mask: float = 0.0
    """For each slice and class."""
    a_walk: float = 0.0
    """For each slice, class and support."""
    once: float = 0.0
    """For a cell, whatever its queries."""
    most_supports: int = 8


_RATES = {
    "copy": _Rate(a_slice=0.0005),
    "copy, registered": _Rate(a_slice=0.03),
    DEFORMABLE: _Rate(a_slice=0.5),
    "transfer": _Rate(a_slice=0.04, a_mask=0.01, once=5.0),
    "auto": _Rate(a_slice=0.22, once=25.0),
    "refine": _Rate(a_slice=0.02, once=3.0),
    "refine, paper": _Rate(a_slice=0.05),
    "match": _Rate(a_slice=0.03, once=3.0),
    "match, paper": _Rate(a_mask=0.1),
    "guided": _Rate(a_mask=0.02, once=3.0),
    "guided, paper": _Rate(a_mask=0.03, once=90.0),
    "insert": _Rate(a_walk=0.05, most_supports=4),
    "insert, paper": _Rate(a_walk=0.08),
    "chain": _Rate(once=8.0),
    "chain, paper": _Rate(once=8.0),
}
_UNKNOWN = _Rate(a_walk=0.1)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Name one measurement."""

    set_name: str
    supports: int
    variant: Variant
    queries: int
    seconds: float
    """Roughly, on one core."""

    @property
    def key(self) -> str:
        """Return the name of the cell's row among the results, without the seed."""
        return f"{self.set_name}/{self.supports}"


def planned(
    variants: Sequence[Variant],
    *,
    sets: Sequence[str],
    supports: Sequence[int],
    queries: int | None,
    seconds_a_cell: float,
    times: float = 1.0,
    calibrated: Sequence[str] = CALIBRATED,
) -> list[Cell]:
    """Return the cells, the cheap ones first.

    `insert` and the papers' presets label the first queries of a set alone where all of them would take longer than
    ``seconds_a_cell``, but at least two; ``queries`` sets another number for all. ``times`` says how much slower the
    model is than the embedded one.
    """
    cells = []
    for name in sets:
        most = FEW_SHOT_QUERIES if name == FEW_SHOT else set_of(name).queries
        for count in [1] if name == FEW_SHOT else [n for n in supports if n <= set_of(name).most_supports]:
            for variant in variants:
                if variant.strategy == "chain" and name not in PICTURES:
                    continue
                if variant.strategy == DEFORMABLE and name not in VOLUMES:
                    continue
                a_query, once = (seconds * times for seconds in _seconds(variant, name, count))
                asked = min(queries or most, most)
                if queries is None and variant.name not in _WHOLE and a_query * most > seconds_a_cell:
                    asked = min(most, max(_LEAST_QUERIES, int(seconds_a_cell / a_query)))
                labelled = asked + (count if variant.name in calibrated and count > 1 else 0)
                seconds = once + a_query * labelled
                cells.append(Cell(set_name=name, supports=count, variant=variant, queries=asked, seconds=seconds))
    lenders = {cell.key: cell.seconds for cell in cells if cell.variant.name == STUDENT}

    def turn(cell: Cell) -> float:
        # What redraws the student's maps comes after them, so that they are there.
        return cell.seconds + (lenders.get(cell.key, 0.0) if cell.variant.strategy == "refine" else 0.0)

    return sorted(cells, key=turn)


def _seconds(variant: Variant, name: str, supports: int) -> tuple[float, float]:
    shape, rate = _SHAPES[name], _RATES.get(variant.name, _UNKNOWN)
    a_slice = rate.a_slice + shape.classes * (rate.a_mask + rate.a_walk * min(supports, rate.most_supports))
    tasks = 4 if name == FEW_SHOT else 1
    return a_slice * shape.slices, rate.once * tasks
