"""How a volume is laid before the eye: which axis is stepped through, and what is up, down, left and right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnunet_sam2.geometry import Geometry
from nnunet_sam2.orientation import physical_axes, turn_to

ANISOTROPIC = 1.2
"""Ratio of the largest spacing to the next from which on its axis is the one that is stepped through."""

_SIDES = (("R", "L"), ("A", "P"), ("I", "S"))
"""Names of the two ends of the physical axes x, y, z (LPS: values grow to the left, to the back and upwards)."""

_PLANES = ("sagittal", "coronal", "axial")
"""Name of the plane that is stepped through along x, y or z."""


@dataclass(frozen=True, kw_only=True)
class View:
    """Say how an array (Z, Y, X) becomes slices, rows and columns as radiologists look at them."""

    axes: tuple[int, int, int]
    """Array axis that is stepped through, that of the rows (downwards), that of the columns (to the right)."""
    flips: tuple[bool, bool]
    """Whether rows and columns are turned round; slices keep the file's order."""
    spacing_mm: tuple[float, float, float]
    """Spacing of slices, rows and columns."""
    plane: str
    letters: tuple[str, str, str, str] | None
    """Side of the patient at the left, right, top and bottom of the picture; None for pictures."""

    def apply(self, array_zyx: np.ndarray) -> np.ndarray:
        """Return the array as (slice, row, column), without a copy."""
        array = np.transpose(array_zyx, self.axes)
        return array[:, :: -1 if self.flips[0] else 1, :: -1 if self.flips[1] else 1]


def choose_view(geometry: Geometry, *, picture: bool = False) -> View:
    """Choose the view of a volume: along its coarsest axis, else axial; pictures stay as they are."""
    if picture:
        return View(axes=(0, 1, 2), flips=(False, False), spacing_mm=(1, 1, 1), plane="picture", letters=None)
    physical, grows = physical_axes(geometry.direction)
    spacing = geometry.spacing_zyx_mm
    order = np.argsort(spacing)
    coarsest = int(order[-1])
    through = coarsest if spacing[coarsest] > ANISOTROPIC * spacing[int(order[-2])] else physical.index(2)
    # Axial: rows to the back, columns to the left. Else rows run down from the head, columns to the left or the back.
    row_axis, col_axis = {2: (1, 0), 1: (2, 0), 0: (2, 1)}[physical[through]]
    rows, cols = physical.index(row_axis), physical.index(col_axis)
    flip_rows = grows[rows] == (row_axis == 2)
    low_high = _SIDES[row_axis][::-1] if row_axis == 2 else _SIDES[row_axis]
    return View(
        axes=(through, rows, cols),
        flips=(flip_rows, not grows[cols]),
        spacing_mm=(spacing[through], spacing[rows], spacing[cols]),
        plane=_PLANES[physical[through]],
        letters=(*_SIDES[col_axis], *low_high),
    )


def upright(array_zyx: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Return the array with axes upwards, to the back and to the patient's left, and its spacing in mm along them."""
    turn = turn_to(geometry)
    return turn.apply(array_zyx), turn.geometry(geometry).spacing_zyx_mm
