"""Groups of neighbouring classes that are thin in a look at all classes together, each worth a nearer look of its own.

Shape letters: K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.strategies.auto.alignment import Alignment
from nnunet_sam2.labelling.strategies.auto.zoom import Box, box_around
from nnunet_sam2.support.cases import Support

THIN_PIXELS = 24.0
"""Greatest thickness, at model size, below which a class is thin: three of the cells that labels are transferred in."""

LARGEST_GROUP = 0.25
"""Part of the area of a look at all classes that a group's look may have: it brings everything twice as near."""

MOST_GROUPS = 4

_SAMPLED = 4096
_OUTLIERS = 2.0
"""Percent of a class's points on each side that do not widen the box where they are sent to."""


def thin_groups(close_ups: Sequence[Support], class_values: Sequence[int]) -> list[tuple[int, ...]]:
    """Return groups of class values that are thin in the supports' close-ups, the nearest neighbours together.

    Two groups become one while their common box, on the mean of the supports, stays below `LARGEST_GROUP` of the
    close-up's area. Classes whose own box is larger than that are left to the look at all classes.
    """
    thin = [v for v in class_values if _thickness_pixels(close_ups, v) < THIN_PIXELS]
    groups: list[tuple[int, ...]] = [(v,) for v in thin if _share(close_ups, (v,)) <= LARGEST_GROUP]
    while len(groups) > 1:
        pairs = {(a, b): _share(close_ups, (*a, *b)) for a, b in combinations(groups, 2)}
        (a, b), share = min(pairs.items(), key=lambda item: (item[1], item[0]))
        if share > LARGEST_GROUP and len(groups) <= MOST_GROUPS:
            break
        groups = [group for group in groups if group not in (a, b)] + [tuple(sorted((*a, *b)))]
    return sorted(groups)


def _thickness_pixels(close_ups: Sequence[Support], value: int) -> float:
    """Return twice the largest distance to the border within a slice, in model pixels; the median over supports."""
    found = []
    for support in close_ups:
        label_nhw = support.frames.slices_first(support.label_zyx)
        counts = (label_nhw == value).sum(axis=(1, 2))
        if counts.any():
            height, width = support.frames.slice_shape_hw
            pixels = (support.frames.size / height, support.frames.size / width)
            mask_hw = np.pad(label_nhw[int(counts.argmax())] == value, 1)
            found.append(2.0 * float(distance_transform_edt(mask_hw, sampling=pixels).max()))
    return float(np.median(found)) if found else np.inf


def _share(close_ups: Sequence[Support], values: Sequence[int]) -> float:
    """Return which part of a close-up's area the classes' common box takes, on the mean of the supports."""
    boxes = [(s, box_around(np.isin(s.label_zyx, values), margin=0.0)) for s in close_ups]
    found = [box.share_of_slice(s.geometry.shape_zyx, s.frames.slice_axis) for s, box in boxes if box is not None]
    return float(np.mean(found)) if found else np.inf


def expected_box(
    values: Sequence[int],
    supports: Sequence[Support],
    alignments: Sequence[Alignment],
    found_zyx: np.ndarray,
    *,
    margin: float,
) -> Box | None:
    """Bound where classes are expected in a query: where supports' own are sent to, and where they were found.

    ``found_zyx`` is true where a look has found them. None where nobody has them.
    """
    ends = []
    for support, alignment in zip(supports, alignments, strict=True):
        points_m3 = np.argwhere(np.isin(support.label_zyx, values))
        if len(points_m3):
            points_m3 = points_m3[:: max(1, len(points_m3) // _SAMPLED)]
            places_m3 = torch.from_numpy((points_m3 + 0.5) / np.array(support.label_zyx.shape)).float()
            sent_m3 = alignment.send(places_m3).numpy()
            ends.append(np.percentile(sent_m3, (_OUTLIERS, 100.0 - _OUTLIERS), axis=0))
    mask_zyx = found_zyx.copy()
    if ends:
        low, high = np.clip(np.median(ends, axis=0), 0.0, 1.0) * np.array(found_zyx.shape)
        z, y, x = (slice(int(a), max(int(a) + 1, int(np.ceil(b)))) for a, b in zip(low, high, strict=True))
        mask_zyx[z, y, x] = True
    return box_around(mask_zyx, margin=margin)


def read_in(member: Member, nearer: Member, box: Box, positions: Sequence[int], share: float) -> Member:
    """Return a member in which a nearer look has a ``share`` in the classes that it was made for.

    ``nearer`` is on the grid of ``box`` and has all classes; ``positions`` say which of them count. The other classes
    and the background keep their proportions, so that nothing is lost or won but by these classes. In place: the
    member's own arrays are changed, for of many classes one more copy is too much.
    """
    prob_kzyx = member.prob_kzyx
    rest_zyx = 1.0 - prob_kzyx.max(axis=0) if member.background_zyx is None else member.background_zyx
    left_zyx = np.zeros_like(rest_zyx)
    before_zyx = np.zeros_like(rest_zyx)
    for k in positions:
        before_zyx += prob_kzyx[k]
        prob_kzyx[k] *= 1.0 - share
        prob_kzyx[k][box.part] += share * nearer.prob_kzyx[k]
        left_zyx += prob_kzyx[k]
    left_zyx = (1.0 - left_zyx).clip(0.0, 1.0) / (1.0 - before_zyx).clip(1e-3, 1.0)
    for k in range(len(prob_kzyx)):
        if k not in positions:
            prob_kzyx[k] *= left_zyx
    rest_zyx *= left_zyx
    return replace(member, background_zyx=rest_zyx)
