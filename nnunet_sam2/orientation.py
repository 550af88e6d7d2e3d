"""Anatomical orientation: which way a grid's axes run in the patient, and arrays brought to one order and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from nnunet_sam2.geometry import IDENTITY_DIRECTION, Geometry

_ENDS = (("R", "L"), ("A", "P"), ("I", "S"))
"""Names of the two ends of the patient's axes x, y, z, in which values grow to the left, to the back and upwards."""

_ORDERS = np.array(list(permutations(range(3))))
_MOST_CODES, _MOST_NAMES = 5, 3
_DECIMALS = 6
"""Direction cosines are compared to so many decimals: headers that differ in rounding alone are the same."""


def patient_axes(direction: Sequence[float], reference: Sequence[float] = IDENTITY_DIRECTION) -> list[int]:
    """Assign to each patient axis (x, y, z) the array axis (x, y, z) that runs most along it, each once.

    ``direction`` has SimpleITK's nine cosines. With ``reference`` the axes are those of another grid instead of the
    patient's own. Oblique axes go where they agree most on the whole.
    """
    strength = np.abs(_relative(direction, reference))
    return [int(axis) for axis in _ORDERS[int(np.argmax(strength[np.arange(3), _ORDERS].sum(axis=1)))]]


def physical_axes(
    direction: Sequence[float], reference: Sequence[float] = IDENTITY_DIRECTION
) -> tuple[list[int], list[bool]]:
    """Return, for each array axis (z, y, x), the patient axis (x 0, y 1, z 2) that it follows, and whether it grows."""
    order, matrix = patient_axes(direction, reference), _relative(direction, reference)
    physical = [order.index(axis_xyz) for axis_xyz in (2, 1, 0)]
    return physical, [bool(matrix[physical[axis], 2 - axis] >= 0) for axis in range(3)]


def axis_code(direction: Sequence[float]) -> str:
    """Name the orientation by the ends that the axes x, y, z of the file run to, e.g. ``LPS`` or ``RAS``."""
    physical, grows = physical_axes(direction)
    return "".join(_ENDS[physical[axis]][grows[axis]] for axis in (2, 1, 0))


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Say how arrays (..., Z, Y, X) of a file are brought to another order of axes: exchanged and flipped, no more."""

    axes: tuple[int, int, int] = (0, 1, 2)
    """The file's array axis that becomes the first, second and third."""
    flips: tuple[bool, bool, bool] = (False, False, False)
    """Whether that axis is turned round."""

    @property
    def changes(self) -> bool:
        """Return whether anything is turned at all."""
        return self != Turn()

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Return an array of the file, (..., Z, Y, X), in the new order; itself where nothing is turned."""
        if not self.changes:
            return array
        # A copy, so that what is computed does not depend, in its last bits, on how the file was stored.
        return np.ascontiguousarray(self._flipped(np.transpose(array, self._after(array, self.axes))))

    def undo(self, array: np.ndarray) -> np.ndarray:
        """Return an array in the new order as the file has it: undoes `apply`."""
        if not self.changes:
            return array
        back = [self.axes.index(axis) for axis in range(3)]
        return np.ascontiguousarray(np.transpose(self._flipped(array), self._after(array, back)))

    def geometry(self, geometry: Geometry) -> Geometry:
        """Return the grid in the new order: the same voxels in the same places."""
        if not self.changes:
            return geometry
        spacing_xyz, columns = geometry.spacing_xyz_mm, np.reshape(geometry.direction, (3, 3))
        shape_xyz = geometry.shape_zyx[::-1]
        origin_xyz = np.asarray(geometry.origin_xyz_mm)
        # The axes x, y, z of the new grid, each with the file's axis and whether that is flipped.
        turned = [(2 - self.axes[axis], self.flips[axis]) for axis in (2, 1, 0)]
        for axis, flip in turned:
            if flip:
                origin_xyz = origin_xyz + columns[:, axis] * spacing_xyz[axis] * (shape_xyz[axis] - 1)
        signed = np.stack([-columns[:, axis] if flip else columns[:, axis] for axis, flip in turned], axis=1)
        (x, y, z), (sx, sy, sz) = origin_xyz, (spacing_xyz[axis] for axis, _ in turned)
        first, second, third = (geometry.shape_zyx[axis] for axis in self.axes)
        return replace(
            geometry,
            shape_zyx=(first, second, third),
            spacing_xyz_mm=(sx, sy, sz),
            origin_xyz_mm=(float(x), float(y), float(z)),
            # Adding 0 makes -0.0 and 0.0 the same.
            direction=tuple(float(v) + 0.0 for v in signed.ravel()),
        )

    @staticmethod
    def _after(array: np.ndarray, axes: Iterable[int]) -> list[int]:
        leading = array.ndim - 3
        return [*range(leading), *(leading + axis for axis in axes)]

    def _flipped(self, array: np.ndarray) -> np.ndarray:
        return np.flip(array, axis=tuple(axis - 3 for axis, flip in enumerate(self.flips) if flip))


def turn_to(geometry: Geometry, reference: Sequence[float] = IDENTITY_DIRECTION) -> Turn:
    """Return what brings a grid's axes next to those of ``reference``.

    By default array axes then run upwards, to the back and to the patient's left, which is how SimpleITK gives a volume
    of identity direction.
    """
    physical, grows = physical_axes(geometry.direction, reference)
    z, y, x = (physical.index(patient) for patient in (2, 1, 0))
    return Turn(axes=(z, y, x), flips=(not grows[z], not grows[y], not grows[x]))


def common_direction(geometries: Iterable[Geometry]) -> tuple[float, ...]:
    """Return the direction to which all of some grids are brought: the one among them that agrees most with the others.

    It is taken as it is after `turn_to` the patient's axes, so that how files are stored has no part in it. For
    straight grids it is the identity. Planes that are oblique in every patient (short axis of the heart) lie near to
    each other, though perhaps on both sides of where the nearest of the patient's axes changes: next to one of them
    they all show the same plane.
    """
    counts: dict[tuple[float, ...], int] = {}
    for geometry in geometries:
        turned = turn_to(geometry).geometry(geometry).direction
        key = tuple(round(value, _DECIMALS) + 0.0 for value in turned)
        counts[key] = counts.get(key, 0) + 1
    known = list(counts)
    if len(known) < 2:
        return known[0] if known else IDENTITY_DIRECTION
    matrices = np.reshape(known, (-1, 3, 3))
    strength = np.abs(np.einsum("aji,bjk->abik", matrices, matrices))
    agreement = np.max([strength[:, :, np.arange(3), order].sum(axis=2) for order in _ORDERS], axis=0)
    scores = np.round(agreement @ np.array([counts[key] for key in known]), _DECIMALS)
    return known[int(np.argmax(scores))]


def orientation_note(geometries: Mapping[str, Geometry], direction: Sequence[float]) -> str | None:
    """Say how the files of which cases are stored where not all are turned alike next to ``direction``, else None."""
    if len({turn_to(geometry, direction) for geometry in geometries.values()}) < 2:
        return None
    cases: dict[str, list[str]] = {}
    for case_id, geometry in geometries.items():
        cases.setdefault(axis_code(geometry.direction), []).append(case_id)
    codes = sorted(cases, key=lambda code: (-len(cases[code]), code))
    # The many are what is usual; who wants to look will look at the others.
    few = [f"{code} {len(cases[code])}: {_some(cases[code])}" for code in codes[1:_MOST_CODES]]
    more = f"; {len(codes) - _MOST_CODES} orientations more" if len(codes) > _MOST_CODES else ""
    return (
        f"the images are stored in several orientations ({codes[0]} {len(cases[codes[0]])}; {'; '.join(few)}{more}); "
        "all are looked at in one, as their headers say, and every label is written as its image is stored"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(sorted(names)[:_MOST_NAMES])
    return shown + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")


def _relative(direction: Sequence[float], reference: Sequence[float]) -> np.ndarray:
    """Return the direction's columns in the axes of the reference, (3, 3)."""
    return np.asarray(np.reshape(reference, (3, 3)).T @ np.reshape(direction, (3, 3)))
