"""Labels with a volume of 0 and 1 for each class: one label map, where no two classes overlap."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nnunet_sam2.errors import InputError

_TOLERANCE = 1e-3


def merge_one_hot(path: Path, volumes_czyx: np.ndarray, allowed: Iterable[int] | None = None) -> tuple[np.ndarray, str]:
    """Return (1, Z, Y, X) with each volume's class value, and which volume became which value in words.

    The volumes are the ``allowed`` values above 0 in ascending order, or 1, 2, ... where none are declared; one volume
    more than that, or a first one that is all that the others leave, is the background. Raises `InputError` for values
    other than 0 and 1, for volumes that overlap, and for a number of volumes that fits no declared classes.
    """
    masks = np.abs(volumes_czyx - 1.0) <= _TOLERANCE
    if not (masks | (np.abs(volumes_czyx) <= _TOLERANCE)).all():
        raise InputError(f"{path}: its {len(masks)} volumes hold other values than 0 and 1, so they are not one-hot")
    count = masks.sum(axis=0)
    if overlap := int(np.count_nonzero(count > 1)):
        raise InputError(
            f"{path}: its volumes overlap in {overlap} voxels, and a label map has one value a voxel; give what "
            "overlaps a value of its own, and name regions: --labels whole=1+2,core=2"
        )
    declared = None if allowed is None else sorted(set(allowed) - {0})
    surplus = 0 if declared is None else len(masks) - len(declared)
    if surplus not in (0, 1):
        raise InputError(
            f"{path} has {len(masks)} volumes, declared are {len(declared or ())} classes; correct --labels"
        )
    if surplus or (declared is None and (count == 1).all()):
        values = [0, *(declared or range(1, len(masks)))]
    else:
        values = declared or list(range(1, len(masks) + 1))
    merged = np.tensordot(np.array(values), masks, axes=1)
    return merged[None], ", ".join(f"volume {n} is {value or 'background'}" for n, value in enumerate(values, 1))
