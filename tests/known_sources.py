"""Sources of known quality, made from true labels by named corruptions and with a named boldness."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion, distance_transform_edt, gaussian_filter, shift
from scipy.special import expit

SHAPE = (10, 40, 40)
VALUES = (1, 2)

Mask = np.ndarray
Corruption = Callable[[Mask, int, np.random.Generator], Mask]


def true_label(rng: np.random.Generator) -> np.ndarray:
    """Draw two ellipsoids of classes 1 and 2, beside each other."""
    zyx = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"), axis=-1)
    label_zyx = np.zeros(SHAPE, np.uint8)
    for value, centre, radii in ((1, (0.0, -0.2, -0.35), (0.7, 0.5, 0.45)), (2, (0.0, 0.3, 0.4), (0.7, 0.4, 0.4))):
        moved = np.array(centre) + rng.uniform(-0.1, 0.1, 3)
        label_zyx[(((zyx - moved) / (np.array(radii) * rng.uniform(0.85, 1.1))) ** 2).sum(axis=-1) < 1] = value
    return label_zyx


def _wobble(mask_zyx: Mask, value: int, rng: np.random.Generator, voxels: float) -> Mask:
    field_zyx = gaussian_filter(rng.normal(size=mask_zyx.shape), (1.5, 3, 3))
    return np.asarray(depth(mask_zyx) + voxels * field_zyx / field_zyx.std() > 0)


def _islands(mask_zyx: Mask, value: int, rng: np.random.Generator) -> Mask:
    spots_zyx = gaussian_filter(rng.normal(size=mask_zyx.shape), 1.5)
    return np.asarray(mask_zyx | (spots_zyx > np.quantile(spots_zyx, 0.98)))


CORRUPTIONS: dict[str, Corruption] = {
    "slight wobble": lambda m, v, rng: _wobble(m, v, rng, 0.8),
    "wobble": lambda m, v, rng: _wobble(m, v, rng, 1.6),
    "shift": lambda m, v, rng: shift(m.astype(np.float32), (0, 2, 2), order=0) > 0.5,
    "erosion": lambda m, v, rng: binary_erosion(m, iterations=2),
    "dilation": lambda m, v, rng: binary_dilation(m, iterations=2),
    "missing organ": lambda m, v, rng: m & (v != 2),
    "islands": _islands,
}

BOLDNESS = {"over-confident": 4.0, "well calibrated": 1.0, "under-confident": 0.4}
"""Factors of the log-odds."""


def make_source(label_zyx: np.ndarray, corruption: str, boldness: str, rng: np.random.Generator) -> np.ndarray:
    """Return probabilities (C, Z, Y, X) as they are stored, whose doubt lies around the corrupted borders."""
    wrong = [CORRUPTIONS[corruption](label_zyx == value, value, rng) for value in VALUES]
    log_odds = [BOLDNESS[boldness] * 1.7 * depth(mask_zyx) for mask_zyx in wrong]
    class_kzyx = np.stack([expit(odds) for odds in log_odds])
    prob_czyx = np.concatenate([np.prod(1 - class_kzyx, axis=0, keepdims=True), class_kzyx])
    return np.rint(255 * prob_czyx / prob_czyx.sum(axis=0)).astype(np.uint8)


def depth(mask_zyx: Mask) -> np.ndarray:
    """Return the distance to the border in voxels, positive inside, everywhere finite."""
    if not mask_zyx.any():
        return np.full(mask_zyx.shape, -20.0)
    return np.where(mask_zyx, distance_transform_edt(mask_zyx) - 0.5, 0.5 - distance_transform_edt(~mask_zyx))
