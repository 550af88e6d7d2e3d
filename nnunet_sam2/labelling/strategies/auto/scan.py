"""One volume's place in the body: the outline, table and air taken off, and what its slices look like.

Shape letters: N slices, H W pixels of a coarse slice, L lines of it, F numbers of a slice's description.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch.nn.functional import adaptive_avg_pool2d, grid_sample, normalize

from nnunet_sam2.frames import Frames
from nnunet_sam2.labelling.strategies.auto.alignment import Part
from nnunet_sam2.labelling.strategies.auto.zoom import Box, is_whole
from nnunet_sam2.planes import resize
from nnunet_sam2.sam2.protocol import Embeddings
from nnunet_sam2.support.cases import Support

_SIDE = 96
_BRIGHTEST_AIR = 0.1
"""Windowed intensity (0 to 1) that is never taken for air, however dark the body is beside something bright."""

_THINNEST = 5
"""Coarse pixels below which a bright band, such as a table, is no body."""

_FILLED = 0.85
"""Part of a slice's area from which on a body fills it: nothing is cut off then."""

_POOLED = 4
_SAMPLED = 8


def body_box(frames: Frames) -> Box:
    """Bound the body in the plane over all slices by the median of the slices' bounds; everything where it fills them.

    The body is the largest piece above a threshold (Otsu's, or less), opened so that tables fall off, holes filled.
    """
    height, width = frames.slice_shape_hw
    whole = _box(frames, 0, len(frames), (0.0, 1.0), (0.0, 1.0))
    coarse_nhw = np.stack([resize(frames.plane(n)[None], (_SIDE, _SIDE))[0] for n in range(len(frames))])
    if min(height, width) < _SIDE // 2 or coarse_nhw.min() == coarse_nhw.max():
        return whole
    threshold = min(float(threshold_otsu(coarse_nhw)) / 2.0, _BRIGHTEST_AIR)
    mask_nhw = ndimage.gaussian_filter(coarse_nhw, 1.0) > threshold
    mask_nhw = ndimage.binary_opening(mask_nhw, np.ones((1, _THINNEST, _THINNEST)))
    pieces_nhw, count = ndimage.label(mask_nhw)
    if not count:
        return whole
    mask_nhw = pieces_nhw == 1 + int(np.argmax(np.bincount(pieces_nhw.ravel())[1:]))
    bounds = []
    for across in (2, 1):
        lines_nl = mask_nhw.any(axis=across)
        shown_nl = lines_nl[lines_nl.any(axis=1)]
        first, last = shown_nl.argmax(axis=1), _SIDE - shown_nl[:, ::-1].argmax(axis=1)
        bounds.append((float(np.median(first)) / _SIDE, float(np.median(last)) / _SIDE))
    (top, bottom), (left, right) = bounds
    if (bottom - top) * (right - left) >= _FILLED:
        return whole
    return _box(frames, 0, len(frames), (top, bottom), (left, right))


def _box(frames: Frames, first: int, stop: int, rows: tuple[float, float], columns: tuple[float, float]) -> Box:
    """Return a box by slices and by fractions of a slice's rows and columns."""
    height, width = frames.slice_shape_hw
    starts = [int(rows[0] * height), int(columns[0] * width)]
    stops = [int(np.ceil(rows[1] * height)), int(np.ceil(columns[1] * width))]
    starts.insert(frames.slice_axis, first)
    stops.insert(frames.slice_axis, stop)
    return Box(start_zyx=(starts[0], starts[1], starts[2]), stop_zyx=(stops[0], stops[1], stops[2]))


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Hold what is known of one volume's place: its body's box, and slice descriptions taken within it."""

    body: Box
    fills: bool
    """True where the body fills the slices, or nothing tells it from what is around."""
    spacing_mm: float
    """From slice to slice."""
    descriptions_nf: torch.Tensor

    @classmethod
    def of(cls, frames: Frames, embeddings: Embeddings) -> Scan:
        """Look at one volume."""
        body = body_box(frames)
        fills = is_whole(body, frames.geometry.shape_zyx)
        part = Part.of(body, frames.geometry.shape_zyx)
        return cls(
            body=body,
            fills=fills,
            spacing_mm=frames.geometry.spacing_zyx_mm[frames.slice_axis],
            descriptions_nf=_descriptions(embeddings, part, frames.slice_axis),
        )

    @property
    def length_mm(self) -> float:
        """Return the extent along the slice axis."""
        return self.spacing_mm * len(self.descriptions_nf)


def _descriptions(embeddings: Embeddings, part: Part, slice_axis: int) -> torch.Tensor:
    """Describe slices by their embedding within a part of the plane, pooled to 4 x 4, unit length: (N, F)."""
    (top, left), (bottom, right) = (
        [place for axis, place in enumerate(end) if axis != slice_axis] for end in (part.start_zyx, part.stop_zyx)
    )
    steps = (torch.arange(_SAMPLED) + 0.5) / _SAMPLED
    rows, columns = (2.0 * (low + steps * (high - low)) - 1.0 for low, high in ((top, bottom), (left, right)))
    where = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flip(-1)[None]
    pooled = [
        adaptive_avg_pool2d(
            grid_sample(normalize(embeddings.top(n).cpu(), dim=0)[None], where, align_corners=False), _POOLED
        ).flatten()
        for n in range(len(embeddings))
    ]
    return normalize(torch.stack(pooled), dim=1)


def bodies_correspond(scans: Sequence[Scan], supports: Sequence[Support], class_values: Sequence[int]) -> bool:
    """Say whether places within the bodies mean the same in all scans, rather than places within whole slices.

    Only where every scan shows its body's outline; a fading coil or a crop draws one in some scans alone. Where there
    are two supports or more, the classes' middles must also lie nearer to each other within the bodies.
    """
    if any(scan.fills for scan in scans):
        return False
    apart_whole: list[float] = []
    apart_body: list[float] = []
    for value in class_values:
        middles = [
            (support, scan, np.argwhere(support.label_zyx == value).mean(axis=0) + 0.5)
            for support, scan in zip(supports, scans, strict=False)
            if (support.label_zyx == value).any()
        ]
        if len(middles) < 2:
            continue
        for table, boxes in (
            (apart_whole, [all_of(support) for support, _, _ in middles]),
            (apart_body, [scan.body for _, scan, _ in middles]),
        ):
            spots = []
            for (support, _, middle), box in zip(middles, boxes, strict=True):
                start, stop = np.array(box.start_zyx), np.array(box.stop_zyx)
                spots.append(np.delete((middle - start) / (stop - start), support.frames.slice_axis))
            # In millimetres of the first support, for a body is a smaller measure than a slice.
            first = middles[0][0]
            size = (np.array(boxes[0].stop_zyx) - boxes[0].start_zyx) * np.array(first.geometry.spacing_zyx_mm)
            table.append(np.abs(np.diff(spots, axis=0) * np.delete(size, first.frames.slice_axis)).mean())
    return not apart_body or float(np.mean(apart_body)) < float(np.mean(apart_whole))


def all_of(support: Support) -> Box:
    """Bound a whole volume."""
    return Box(start_zyx=(0, 0, 0), stop_zyx=support.geometry.shape_zyx)
