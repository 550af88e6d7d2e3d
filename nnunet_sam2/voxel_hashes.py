"""Hashes by which an image is known again, however its file is written."""

from __future__ import annotations

import hashlib

import numpy as np

from nnunet_sam2.geometry import Geometry
from nnunet_sam2.orientation import turn_to


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
    return voxel_hash(turn_to(geometry).apply(array_czyx))
