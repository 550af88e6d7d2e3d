"""Hashes by which an image is known again, however its file is written."""

from __future__ import annotations

import hashlib
from itertools import permutations

import numpy as np

from nnunet_sam2.geometry import Geometry


def voxel_hash(array_czyx: np.ndarray) -> str:
    """Compute the sha256 of an image's voxel values and shape.

    The same values give the same hash whatever the file's name, format, number type, compression or geometry.
    """
    # Adding 0 makes -0.0 and 0.0 the same bytes.
    values = np.ascontiguousarray(array_czyx, dtype="<f4") + np.float32(0)
    digest = hashlib.sha256(repr(tuple(array_czyx.shape)).encode())
    digest.update(values.tobytes())
    return digest.hexdigest()


def placed_voxel_hash(array_czyx: np.ndarray, geometry: Geometry) -> str:
    """Compute `voxel_hash` with the axes brought into patient order, each running towards left, posterior, superior.

    One image that is stored with turned or exchanged axes gives one hash, as long as its direction says so.
    """
    direction_xyz = np.reshape(geometry.direction, (3, 3))
    order = _patient_axes(direction_xyz)
    placed = array_czyx
    for axis_xyz in range(3):
        if direction_xyz[order.index(axis_xyz), axis_xyz] < 0:
            placed = np.flip(placed, axis=3 - axis_xyz)
    # order[i]: the array's (x, y, z) axis that runs along the patient's axis i; the array's last axis is x.
    wanted = [3 - order[2], 3 - order[1], 3 - order[0]]
    return voxel_hash(placed.transpose(0, *wanted))


def _patient_axes(direction_xyz: np.ndarray) -> list[int]:
    """Assign to each patient axis the array axis that runs most along it, each once."""
    strength = np.abs(direction_xyz)
    best = max(permutations(range(3)), key=lambda axes: sum(strength[i, axis] for i, axis in enumerate(axes)))
    return list(best)
