"""Distances between the surfaces of two masks, in mm.

Shape letters: M surface elements or border voxels, D axes (two or three).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from scipy.ndimage import binary_erosion
from scipy.spatial import KDTree


def hausdorff(
    one: np.ndarray, other: np.ndarray, spacing: Sequence[float], percentiles: Sequence[float]
) -> list[float]:
    """Return the Hausdorff distance of two masks that are not empty, the greater of both directions', by percentile.

    Measured between the centres of border voxels, those with a neighbour across a face that the mask lacks; percentiles
    are interpolated. 100 is the distance itself.
    """
    borders = [np.argwhere(mask & ~binary_erosion(mask)) * np.asarray(spacing, float) for mask in (one, other)]
    there, back = _apart(borders[0], borders[1]), _apart(borders[1], borders[0])
    return [float(max(np.percentile(there, p), np.percentile(back, p))) for p in percentiles]


def surface_dice(one: np.ndarray, other: np.ndarray, spacing: Sequence[float], tolerance_mm: float) -> float:
    """Return the share of both masks' surfaces that lies within a tolerance of the other (Nikolov et al., JMIR 2021).

    The surface runs half-way between voxel centres, where marching cubes puts it; each of its elements counts by its
    area (in a plane: its length). The masks are not empty.
    """
    (points, areas), (others, other_areas) = (_elements(mask, spacing) for mask in (one, other))
    near, other_near = _apart(points, others) <= tolerance_mm, _apart(others, points) <= tolerance_mm
    return float((areas[near].sum() + other_areas[other_near].sum()) / (areas.sum() + other_areas.sum()))


def _apart(points_md: np.ndarray, others_md: np.ndarray) -> np.ndarray:
    """Return each point's distance to the nearest of the others, float64 (M,)."""
    return np.asarray(KDTree(others_md).query(points_md)[0])


def _elements(mask: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return where a mask's surface has an element, mm (M, D), and the elements' areas (M,)."""
    padded = np.pad(mask, 1).astype(np.uint8)
    corners = list(product((0, 1), repeat=mask.ndim))
    shape = tuple(n + 1 for n in mask.shape)
    code = np.zeros(shape, np.uint8)
    for n, corner in enumerate(corners):
        part = tuple(slice(c, c + size) for c, size in zip(corner, shape, strict=True))
        code |= padded[part] << (len(corners) - 1 - n)
    places_md = np.argwhere((code > 0) & (code < 2 ** len(corners) - 1))
    areas_m = _area_of_code(tuple(float(mm) for mm in spacing))[code[tuple(places_md.T)]]
    return places_md * np.asarray(spacing, float), areas_m


@lru_cache(maxsize=16)
def _area_of_code(spacing: tuple[float, ...]) -> np.ndarray:
    """Return the area of the surface between the corners of a cell, by which of them are inside, as a binary number.

    The first corner is the highest bit. Inside and outside may be exchanged: the smaller side is what is cut off.
    """
    corners = 2 ** len(spacing)
    areas = np.zeros(2**corners)
    for code in range(1, 2**corners - 1):
        inside = code if code.bit_count() <= corners // 2 else 2**corners - 1 - code
        cell = np.array([inside >> bit & 1 for bit in reversed(range(corners))], float).reshape((2,) * len(spacing))
        areas[code] = _length(cell, spacing) if len(spacing) == 2 else _area(cell, spacing)
    return areas


def _area(cell: np.ndarray, spacing: tuple[float, ...]) -> float:
    from skimage.measure import marching_cubes, mesh_surface_area

    vertices, faces, _, _ = marching_cubes(cell, 0.5, spacing=spacing, method="lorensen")
    return float(mesh_surface_area(vertices, faces))


def _length(cell: np.ndarray, spacing: tuple[float, ...]) -> float:
    """Return the length of the line between a square's corners: straight across, or across one or two of them."""
    if cell.sum() == 2:
        if cell[0].all() or cell[1].all():
            return spacing[1]
        if cell[:, 0].all() or cell[:, 1].all():
            return spacing[0]
    return float(cell.sum()) * math.hypot(*spacing) / 2.0
