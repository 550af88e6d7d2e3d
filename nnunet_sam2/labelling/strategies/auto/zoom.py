"""Zoom: the part of a volume that the labels fill, seen at the model's full size.

A structure that is a few cells of the embedding wide in the whole slice is many cells wide in a close-up, and places in
close-ups of different subjects are alike, whatever lies around: the box takes the place of a registration.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nnunet_sam2.labelling.components import measured_components
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support

_CRUMB = 0.02
"""Part of a class's largest piece below which a piece does not open the box."""

_FAINT = 0.02
"""Probability that a class must reach somewhere to say where it is."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """Bound a part of a volume, in voxels; ``stop_zyx`` is the first voxel beyond."""

    start_zyx: tuple[int, int, int]
    stop_zyx: tuple[int, int, int]

    @property
    def part(self) -> tuple[slice, slice, slice]:
        """Return the part as an index into an array on the volume's grid."""
        z, y, x = (slice(a, b) for a, b in zip(self.start_zyx, self.stop_zyx, strict=True))
        return z, y, x

    def share_of_slice(self, shape_zyx: Sequence[int], slice_axis: int) -> float:
        """Return which part of a slice's area lies within, 0 to 1."""
        sides = [
            (b - a) / n
            for axis, (a, b, n) in enumerate(zip(self.start_zyx, self.stop_zyx, shape_zyx, strict=True))
            if axis != slice_axis
        ]
        return float(np.prod(sides))


def box_around(mask_zyx: np.ndarray, *, margin: float) -> Box | None:
    """Bound what is true, with ``margin`` of its own extent (and one voxel at least) on each side; None for nothing."""
    starts, stops = [], []
    for axis in range(3):
        shown = np.flatnonzero(mask_zyx.any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(shown):
            return None
        low, high = int(shown[0]), int(shown[-1]) + 1
        reach = max(1, round(margin * (high - low)))
        starts.append(max(0, low - reach))
        stops.append(min(mask_zyx.shape[axis], high + reach))
    return Box(start_zyx=(starts[0], starts[1], starts[2]), stop_zyx=(stops[0], stops[1], stops[2]))


def labelled_part(
    label_zyx: np.ndarray,
    prob_czyx: np.ndarray,
    class_values: Sequence[int],
    *,
    expected: Collection[int] = (),
) -> np.ndarray:
    """Return where the classes are, bool, without pieces so small that they are more likely stray than meant.

    A class of ``expected`` that wins nowhere, because it is thinner than what the map resolves, is taken to be where
    its probability is above half of its own highest one.
    """
    kept_zyx = np.zeros(label_zyx.shape, bool)
    for channel, value in enumerate(class_values, start=1):
        mask_zyx = label_zyx == value
        if value in expected and not mask_zyx.any():
            highest = float(prob_czyx[channel].max())
            mask_zyx = prob_czyx[channel] > 0.5 * highest if highest >= _FAINT else mask_zyx
        components_zyx, voxels, _ = measured_components(mask_zyx, None)
        if len(voxels):
            large = np.flatnonzero(voxels >= _CRUMB * voxels.max()) + 1
            kept_zyx |= np.isin(components_zyx, large)
    return kept_zyx


def close_up(case: Any, box: Box, backend: Sam2Backend) -> Any:
    """Return a query or a support as what lies within the box, encoded anew; its slices fill the model's frame."""
    frames = case.frames.cropped(box.start_zyx, box.stop_zyx)
    changed: dict[str, Any] = {
        "frames": frames,
        "embeddings": backend.embed(frames),
        "geometry": frames.geometry,
        "student_prob_czyx": None,
    }
    if isinstance(case, Support):
        changed["label_zyx"] = np.ascontiguousarray(case.label_zyx[box.part])
    return replace(case, **changed)


def put_back(member: Member, box: Box, query: Query) -> Member:
    """Return a close-up's member on the whole query's grid; all is background beyond the box."""
    shape_zyx = query.geometry.shape_zyx
    prob_kzyx = np.zeros((len(member.prob_kzyx), *shape_zyx), np.float32)
    z, y, x = box.part
    prob_kzyx[:, z, y, x] = member.prob_kzyx
    background_zyx = np.ones(shape_zyx, np.float32)
    inside_zyx = member.background_zyx
    background_zyx[box.part] = 1.0 - member.prob_kzyx.max(axis=0) if inside_zyx is None else inside_zyx
    return replace(member, prob_kzyx=prob_kzyx, background_zyx=background_zyx)


def is_whole(box: Box, shape_zyx: Sequence[int]) -> bool:
    """Say whether a box bounds a whole volume."""
    return box.start_zyx == (0, 0, 0) and box.stop_zyx == tuple(shape_zyx)


class CloseUps:
    """Offer parts of supports, the same objects every time, so that their memory is built once."""

    def __init__(self) -> None:
        # A support is kept beside its part, so that its id cannot be taken over by another.
        self._parts: dict[tuple[int, Box], tuple[Support, Support]] = {}
        self._boxes: dict[int, Box] = {}

    def cut(self, support: Support, box: Box, backend: Sam2Backend) -> Support:
        """Return the part of a support within a box; the support itself where that is all of it."""
        key = (id(support), box)
        if key not in self._parts:
            whole = is_whole(box, support.geometry.shape_zyx)
            part = support if whole else close_up(support, box, backend)
            self._parts[key] = support, part
            self._boxes[id(part)] = box
        return self._parts[key][1]

    def box_of(self, part: Support) -> Box:
        """Return the box that a part was cut by."""
        return self._boxes[id(part)]

    def of(
        self,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        *,
        margin: float,
        largest: float,
    ) -> list[Support]:
        """Return what the labels fill of the supports that show a class; none where they would hardly be nearer.

        That is where the boxes' median share of the slice's area is above ``largest``.
        """
        boxes = [box_around(np.isin(support.label_zyx, class_values), margin=margin) for support in supports]
        shown = [(support, box) for support, box in zip(supports, boxes, strict=True) if box is not None]
        shares = [box.share_of_slice(s.geometry.shape_zyx, s.frames.slice_axis) for s, box in shown]
        if not shares or float(np.median(shares)) > largest:
            return []
        return [self.cut(support, box, backend) for support, box in shown]
