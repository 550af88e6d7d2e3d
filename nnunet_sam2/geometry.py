"""Where a volume's voxels lie in space, and when two volumes lie in the same place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

SPACING_TOLERANCE_MM = 1e-3
"""Largest difference of two spacings, in millimetres, that still counts as equal."""

ORIGIN_TOLERANCE_MM = 1e-2
"""Largest difference of two origins, in millimetres, that still counts as equal."""

DIRECTION_TOLERANCE = 1e-3
"""Largest difference of two direction cosines that still counts as equal."""

IDENTITY_DIRECTION = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)

ANISOTROPY_THRESHOLD = 1.5
"""How many times the next largest spacing an axis must have to be taken for the slice axis."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Hold the grid of a volume: array shape in (z, y, x), physical quantities in SimpleITK's (x, y, z)."""

    shape_zyx: tuple[int, int, int]
    spacing_xyz_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    origin_xyz_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = IDENTITY_DIRECTION

    def __post_init__(self) -> None:
        if len(self.shape_zyx) != 3 or min(self.shape_zyx) < 1:
            raise ValueError(f"shape_zyx must be three positive lengths, got {self.shape_zyx}")
        if len(self.spacing_xyz_mm) != 3 or not all(np.isfinite(s) and s > 0 for s in self.spacing_xyz_mm):
            raise ValueError(f"spacing_xyz_mm must be three positive lengths, got {self.spacing_xyz_mm}")
        if len(self.origin_xyz_mm) != 3 or len(self.direction) != 9:
            raise ValueError("origin_xyz_mm needs 3 and direction 9 values")

    @property
    def spacing_zyx_mm(self) -> tuple[float, float, float]:
        """Return the spacing in array order."""
        x, y, z = self.spacing_xyz_mm
        return (z, y, x)

    def mismatch(self, other: Geometry) -> str | None:
        """Describe the first difference beyond the named tolerances, or return None where the grids are the same."""
        if self.shape_zyx != other.shape_zyx:
            return f"shape (z, y, x) {self.shape_zyx} against {other.shape_zyx}"
        for name, mine, theirs, tolerance in (
            ("spacing (x, y, z) in mm", self.spacing_xyz_mm, other.spacing_xyz_mm, SPACING_TOLERANCE_MM),
            ("origin (x, y, z) in mm", self.origin_xyz_mm, other.origin_xyz_mm, ORIGIN_TOLERANCE_MM),
            ("direction cosines", self.direction, other.direction, DIRECTION_TOLERANCE),
        ):
            difference = float(np.max(np.abs(np.subtract(mine, theirs))))
            if not difference <= tolerance:
                return f"{name} {_short(mine)} against {_short(theirs)} (tolerance {tolerance:g})"
        return None

    def cropped(self, start_zyx: tuple[int, int, int], stop_zyx: tuple[int, int, int]) -> Geometry:
        """Return the grid of the voxels from ``start_zyx`` up to ``stop_zyx``, in the same place."""
        step_xyz = np.multiply(start_zyx[::-1], self.spacing_xyz_mm)
        x, y, z = np.asarray(self.origin_xyz_mm) + np.reshape(self.direction, (3, 3)) @ step_xyz
        (z0, y0, x0), (z1, y1, x1) = start_zyx, stop_zyx
        return replace(self, shape_zyx=(z1 - z0, y1 - y0, x1 - x0), origin_xyz_mm=(float(x), float(y), float(z)))

    def to_json(self) -> dict[str, Any]:
        """Return the geometry as a JSON value."""
        return {
            "shape_zyx": list(self.shape_zyx),
            "spacing_xyz_mm": list(self.spacing_xyz_mm),
            "origin_xyz_mm": list(self.origin_xyz_mm),
            "direction": list(self.direction),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Geometry:
        """Rebuild a geometry from `to_json`."""
        z, y, x = (int(n) for n in value["shape_zyx"])
        sx, sy, sz = (float(v) for v in value["spacing_xyz_mm"])
        ox, oy, oz = (float(v) for v in value["origin_xyz_mm"])
        return cls(
            shape_zyx=(z, y, x),
            spacing_xyz_mm=(sx, sy, sz),
            origin_xyz_mm=(ox, oy, oz),
            direction=tuple(float(v) for v in value["direction"]),
        )


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in values) + ")"


def choose_slice_axis(geometry: Geometry) -> int:
    """Return the array axis (z, y, x) whose spacing is clearly the largest, else 0; a single slice has its own."""
    if (single := single_slice_axis(geometry)) is not None:
        return single
    spacing = geometry.spacing_zyx_mm
    largest = int(np.argmax(spacing))
    others = max(s for axis, s in enumerate(spacing) if axis != largest)
    return largest if spacing[largest] > ANISOTROPY_THRESHOLD * others else 0


def single_slice_axis(geometry: Geometry) -> int | None:
    """Return the array axis along which there is one slice alone; None where there are more, or no plane at all."""
    shape_zyx = geometry.shape_zyx
    return shape_zyx.index(1) if shape_zyx[0] == 1 or shape_zyx.count(1) == 1 else None


def view_axes(geometry: Geometry, slice_axis: int, *, least_slices: int = 16) -> tuple[int, ...]:
    """Return the axes along which a volume's slices show it about as finely as along ``slice_axis``, that one first.

    Across a clearly larger spacing slices are stretched and say little; a thin slab has too few.
    """
    spacing, shape = geometry.spacing_zyx_mm, geometry.shape_zyx
    if min(shape) < least_slices or max(spacing) > ANISOTROPY_THRESHOLD * min(spacing):
        return (slice_axis,)
    return (slice_axis, *(axis for axis in range(3) if axis != slice_axis))
