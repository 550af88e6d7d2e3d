"""What supports and query show of the same body: slices brought to one place along their axis, and the common part.

Shape letters: N slices of the query, M of a support, F numbers of a slice's description.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from nnunet_sam2.labelling.strategies.auto.alignment import Alignment
from nnunet_sam2.labelling.strategies.auto.scan import Scan, all_of
from nnunet_sam2.labelling.strategies.auto.zoom import Box
from nnunet_sam2.support.cases import Query, Support

LEAST_SLICES = 24
"""Stacks of fewer slices are planned on what they are to show: from end to end they show the same."""

_LEAST_SHARED = 0.4
"""Part of the shorter of two scans that must show the same for a place along the axis to be considered."""

_CLEARLY_BETTER = 0.05
"""Mean correlation of slices that a place along the axis must gain over both scans showing the same from end to end."""

_AROUND = 0.25
"""Part of the labelled extent along the axis that is looked at beyond it on each side."""


def shared_axis(supports: Sequence[Support], class_values: Sequence[int]) -> list[float]:
    """Return what is added to each support's millimetres along the slice axis so that the classes' middles agree."""
    middles: list[dict[int, float]] = []
    for support in supports:
        spacing_mm = support.geometry.spacing_zyx_mm[support.frames.slice_axis]
        counts = {v: (support.frames.slices_first(support.label_zyx) == v).sum(axis=(1, 2)) for v in class_values}
        middles.append(
            {
                v: float(np.average(np.arange(len(count)) + 0.5, weights=count)) * spacing_mm
                for v, count in counts.items()
                if count.any()
            }
        )
    offsets = [0.0] * len(supports)
    for _ in range(20):
        common = {
            v: float(np.median([middle[v] + o for middle, o in zip(middles, offsets, strict=True) if v in middle]))
            for v in {value for middle in middles for value in middle}
        }
        offsets = [float(np.median([common[v] - x for v, x in m.items()])) if m else 0.0 for m in middles]
    return offsets


def place_along_axis(query: Scan, supports: Sequence[Scan], offsets_mm: Sequence[float]) -> float | None:
    """Return what is added to the query's millimetres so that its slices meet those of the supports that look alike.

    None where no place is clearly better than taking all scans to show the same from end to end. One offset for the
    whole scan is the stiffest of monotone paths: it cannot follow noise, and what varies within a body is left to the
    registration of what was found. What all slices have in common is taken off first, else it is most of what is seen.
    """
    common_f = torch.cat([support.descriptions_nf for support in supports]).mean(dim=0)
    own_nf, *others = (normalize(scan.descriptions_nf - common_f, dim=1) for scan in (query, *supports))
    alike = [(own_nf @ other_nf.T).numpy() for other_nf in others]
    centres = np.arange(len(query.descriptions_nf)) + 0.5

    def scores(places: Sequence[np.ndarray]) -> np.ndarray:
        """Return how alike the slices are that meet in each support; -1 where too few do."""
        found = []
        for alike_nm, place_n in zip(alike, places, strict=True):
            number_n = np.floor(place_n).astype(int)
            shown = np.flatnonzero((number_n >= 0) & (number_n < alike_nm.shape[1]))
            # A slice that meets none is as good as one that meets any: else the best would be to meet few.
            total = alike_nm[shown, number_n[shown]].sum() + alike_nm.mean() * (len(number_n) - len(shown))
            found.append(total / len(number_n) if len(shown) >= _LEAST_SHARED * min(alike_nm.shape) else -1.0)
        return np.array(found)

    from_end_to_end = scores([centres / len(centres) * nm.shape[1] for nm in alike])
    reach = max([query.length_mm, *(scan.length_mm + abs(o) for scan, o in zip(supports, offsets_mm, strict=True))])
    shifts = np.arange(-reach, reach + query.spacing_mm, min(scan.spacing_mm for scan in (query, *supports)))
    gains = np.stack(
        [
            scores(
                [
                    (centres * query.spacing_mm + shift - offset) / scan.spacing_mm
                    for scan, offset in zip(supports, offsets_mm, strict=True)
                ]
            )
            - from_end_to_end
            for shift in shifts
        ]
    )
    best = int(np.argmax(gains.mean(axis=1)))
    return float(shifts[best]) if gains[best].mean() > _CLEARLY_BETTER else None


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Hold the parts of query and supports that show the same, and how places of the ones lie in the other."""

    query: Box
    supports: tuple[Box, ...]
    alignments: tuple[Alignment, ...]
    """Between the parts."""
    shift_mm: float | None
    """What was added to the query's millimetres along the slices; None: taken to show the same from end to end."""

    @property
    def record(self) -> dict[str, Any]:
        """Return what a label's record says of it."""
        return {
            "part_zyx": [list(self.query.start_zyx), list(self.query.stop_zyx)],
            "shift_mm": None if self.shift_mm is None else round(self.shift_mm, 1),
        }


def common_ground(
    query: Query,
    supports: Sequence[Support],
    scans: Sequence[Scan],
    class_values: Sequence[int],
    *,
    within_bodies: bool,
) -> Ground:
    """Find the parts of query and supports that show the same; whole volumes where they agree already.

    In the plane that is the body, where places ``within_bodies`` correspond (`bodies_correspond`); along the slices
    what lies around the labels of the supports, where the scans show different parts of the body.
    """
    mine, axis = Scan.of(query.frames, query.embeddings), query.frames.slice_axis
    own, boxes = Box(start_zyx=(0, 0, 0), stop_zyx=query.geometry.shape_zyx), [all_of(support) for support in supports]
    if not mine.fills and within_bodies:
        own, boxes = mine.body, [scan.body for scan in scans]
    offsets = shared_axis(supports, class_values)
    shift = place_along_axis(mine, scans, offsets)
    same = Ground(query=own, supports=tuple(boxes), alignments=(Alignment(),) * len(supports), shift_mm=None)
    if shift is None:
        return same
    ranges = []
    for i, (support, scan) in enumerate(zip(supports, scans, strict=True)):
        shown = np.flatnonzero(np.isin(support.frames.slices_first(support.label_zyx), class_values).any(axis=(1, 2)))
        first, stop = (0, len(support.frames)) if not len(shown) else (int(shown[0]), int(shown[-1]) + 1)
        reach = max(1, round(_AROUND * (stop - first)))
        first, stop = max(0, first - reach), min(len(support.frames), stop + reach)
        boxes[i] = _with_slices(boxes[i], axis, first, stop)
        ranges.append((first * scan.spacing_mm + offsets[i], stop * scan.spacing_mm + offsets[i]))
    first = int(np.floor((min(low for low, _ in ranges) - shift) / mine.spacing_mm))
    stop = int(np.ceil((max(high for _, high in ranges) - shift) / mine.spacing_mm))
    first, stop = max(0, first), min(len(query.frames), stop)
    if first >= stop:  # nothing that is labelled lies in the query, by a place that rests on what lies around alone
        return same
    own = _with_slices(own, axis, first, stop)
    length_mm = (stop - first) * mine.spacing_mm
    alignments = tuple(
        Alignment().with_axis(axis, (high - low) / length_mm, (low - shift - first * mine.spacing_mm) / length_mm)
        for low, high in ranges
    )
    return Ground(query=own, supports=tuple(boxes), alignments=alignments, shift_mm=shift)


def _with_slices(box: Box, axis: int, first: int, stop: int) -> Box:
    starts, stops = list(box.start_zyx), list(box.stop_zyx)
    starts[axis], stops[axis] = first, stop
    return Box(start_zyx=(starts[0], starts[1], starts[2]), stop_zyx=(stops[0], stops[1], stops[2]))
