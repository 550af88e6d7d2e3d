"""Label maps on a coarse grid of cubes: what the page makes surfaces of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_sam2.geometry import Geometry
from nnunet_sam2.report.view import upright

_BORDER = 2
"""Background around the grid, in cubes, so that smoothed surfaces close."""

_SURFACE_SIDES = ((64, 150_000), (48, 60_000), (36, 0))
"""Longest side of the grid for the 3D view, and the budget from which on it is taken."""


def nearest(size: int, wanted: int) -> np.ndarray:
    """Return which of ``size`` samples lie nearest to ``wanted`` evenly spread ones."""
    return np.minimum((np.arange(wanted) + 0.5) * size / wanted, size - 1).astype(int)


def surface_grid(
    geometry: Geometry, labels: Mapping[str, np.ndarray], budget: int
) -> tuple[bytes, dict[str, Any] | None]:
    """Resample the label maps onto a coarse grid of cubes, upright, for the 3D view; (Z, Y, X), one after another."""
    if not labels:
        return b"", None
    longest = next(side for side, least in _SURFACE_SIDES if budget >= least)
    turned = {name: upright(array, geometry) for name, array in labels.items()}
    arrays = {name: array for name, (array, _) in turned.items()}
    spacing = next(iter(turned.values()))[1]
    box = _tight_box(list(arrays.values()))
    if box is None or min(next(iter(arrays.values())).shape) < 2:
        return b"", None
    extents = [(high - low) * mm for (low, high), mm in zip(box, spacing, strict=True)]
    step = max(max(extents) / longest, min(spacing))
    index = [_grid(low, high, mm, step) for (low, high), mm in zip(box, spacing, strict=True)]
    parts = [np.pad(array[np.ix_(*index)], _BORDER).tobytes() for array in arrays.values()]
    header = {
        "names": list(arrays),
        "shape": [len(i) + 2 * _BORDER for i in index],
        "step_mm": step,
        # Slices thicker than a cube leave stairs, which the page smooths over as many cubes.
        "smooth": [max(1, round(mm / step / 2)) for mm in spacing],
    }
    return b"".join(parts), header


def _tight_box(labels: Sequence[np.ndarray]) -> list[tuple[int, int]] | None:
    box = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        seen = np.flatnonzero(np.any([(array > 0).any(axis=others) for array in labels], axis=0))
        if not seen.size:
            return None
        box.append((int(seen[0]), int(seen[-1]) + 1))
    return box


def _grid(low: int, high: int, spacing_mm: float, step_mm: float) -> np.ndarray:
    count = max(2, round((high - low) * spacing_mm / step_mm))
    return low + nearest(high - low, count)
