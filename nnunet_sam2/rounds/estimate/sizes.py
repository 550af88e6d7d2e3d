"""What a stage's time and memory are proportional to: slices that SAM 2 walks, tiles that nnU-Net predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nnunet_sam2.cohort.cohort import Case
from nnunet_sam2.geometry import Geometry, view_axes

_TILE_STEP = 0.5
"""nnU-Net's tiles overlap by half."""


def walked_axes(geometry: Geometry, slice_axis: int, *, several_views: bool) -> tuple[int, ...]:
    """Return the axes along which a strategy walks a volume; ``several_views`` where it takes what shows it well."""
    return view_axes(geometry, slice_axis) if several_views else (slice_axis,)


def walked_slices(shape_zyx: Sequence[int], axes: Sequence[int]) -> int:
    """Count the slices along the axes, all together."""
    return sum(shape_zyx[axis] for axis in axes)


def cells(image_size: int) -> int:
    """Count the locations of a slice's embedding."""
    return (image_size // 16) ** 2


def voxels(case: Case) -> int:
    """Count the voxels of a case's own grid."""
    return math.prod(case.geometry.shape_zyx)


def preprocessed_shape(
    shape_zyx: Sequence[int],
    spacing_zyx_mm: Sequence[float],
    target_spacing_mm: Sequence[float],
    transpose: Sequence[int] = (0, 1, 2),
) -> tuple[int, ...]:
    """Return a case's shape on nnU-Net's grid, before cropping; a 2D configuration does not resample across slices."""
    shape = [shape_zyx[axis] for axis in transpose]
    spacing = [spacing_zyx_mm[axis] for axis in transpose]
    target = list(target_spacing_mm)
    if len(target) < len(shape):
        target = [spacing[0], *target]
    return tuple(max(1, round(n * own / new)) for n, own, new in zip(shape, spacing, target, strict=True))


def tiles(shape: Sequence[int], patch_size: Sequence[int]) -> int:
    """Count the tiles of nnU-Net's sliding window; a 2D patch slides over every slice."""
    slices = shape[0] if len(patch_size) < len(shape) else 1
    sides = shape[-len(patch_size) :]
    steps = [math.ceil((max(n, p) - p) / (p * _TILE_STEP)) + 1 for n, p in zip(sides, patch_size, strict=True)]
    return slices * math.prod(steps)
