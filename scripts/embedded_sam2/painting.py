"""How a label volume becomes an image: tissue intensities, texture, shading, blur and noise, all drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage


@dataclass(frozen=True, kw_only=True, eq=False)
class Contrast:
    """Hold how each label looks: mean, strength and grain of its texture, before gamma; 0 to 1."""

    mean_l: np.ndarray
    texture_l: np.ndarray
    grain_l: np.ndarray
    """Standard deviation of the texture's smoothing, as a part of the image's side."""
    gamma: float


@dataclass(frozen=True, kw_only=True)
class Acquisition:
    """Hold what a scanner adds."""

    blur: float
    """In pixels."""
    noise: float
    noise_grain: float
    rician: bool
    bias: float
    gradient: float
    """Difference between the two ends of the image along a random direction, as with a surface coil."""
    seed: int


def draw_contrast(n_labels: int, rng: np.random.Generator) -> Contrast:
    """Draw the look of ``n_labels`` labels; some share an intensity, so that place and shape must tell them apart."""
    mean = rng.uniform(0.05, 1.0, n_labels)
    if rng.random() < 0.6:
        kinds = rng.uniform(0.05, 1.0, int(rng.integers(3, 7)))
        mean = np.clip(rng.choice(kinds, n_labels) + rng.normal(0, 0.05, n_labels), 0.02, 1.0)
    mean[0] = rng.choice([0.0, rng.uniform(0, 1)], p=[0.75, 0.25])
    strength = rng.choice([0.0, 0.04, 0.1, 0.2], n_labels, p=[0.25, 0.4, 0.25, 0.1]) * rng.uniform(0.5, 1.5, n_labels)
    if mean[0] == 0:
        strength[0] = 0
    contrast = Contrast(
        mean_l=mean,
        texture_l=strength,
        grain_l=rng.choice([0.004, 0.01, 0.025, 0.05], n_labels),
        gamma=float(np.exp(rng.normal(0, 0.3))),
    )
    return contrast if rng.random() < 0.85 else replace(contrast, mean_l=1.0 - mean)


def vary_contrast(contrast: Contrast, rng: np.random.Generator, strength: float = 0.04) -> Contrast:
    """Draw the look of the same tissues in another subject of the same protocol."""
    noise = rng.normal(0, strength, len(contrast.mean_l))
    noise[0] = 0
    return replace(
        contrast,
        mean_l=np.clip(contrast.mean_l + noise, 0, 1),
        gamma=contrast.gamma * float(np.exp(rng.normal(0, 2 * strength))),
    )


def draw_acquisition(rng: np.random.Generator) -> Acquisition:
    """Draw a scanner, from clean to poor."""
    return Acquisition(
        blur=float(rng.choice([0.0, rng.uniform(0.3, 1.5)], p=[0.2, 0.8])),
        noise=float(rng.choice([0.0, 0.02, 0.05, 0.1], p=[0.2, 0.4, 0.3, 0.1]) * rng.uniform(0.5, 1.5)),
        noise_grain=float(rng.choice([0.0, rng.uniform(0.4, 1.0)], p=[0.6, 0.4])),
        rician=bool(rng.random() < 0.4),
        bias=float(rng.choice([0.0, rng.uniform(0.05, 0.5)], p=[0.4, 0.6])),
        gradient=float(rng.choice([0.0, rng.normal(0, 0.5)], p=[0.7, 0.3])),
        seed=int(rng.integers(2**31)),
    )


def paint(labels_zyx: np.ndarray, contrast: Contrast, acquisition: Acquisition) -> np.ndarray:
    """Paint a label volume; (Z, Y, X) float32, about 0 to 1, the same for the same arguments."""
    rng = np.random.default_rng(acquisition.seed)
    side = max(labels_zyx.shape[1:])
    image = contrast.mean_l.astype(np.float32)[labels_zyx]
    present = np.unique(labels_zyx)
    for grain in np.unique(contrast.grain_l[present]):
        strength = np.where(contrast.grain_l == grain, contrast.texture_l, 0).astype(np.float32)[labels_zyx]
        if strength.any():
            image += strength * _noise(labels_zyx.shape, grain * side, rng)
    image = np.clip(image, 0, 1.2) ** np.float32(contrast.gamma)
    if acquisition.blur:
        image = ndimage.gaussian_filter(image, (0.3, acquisition.blur, acquisition.blur))
    if acquisition.bias:
        coarse = rng.normal(0, acquisition.bias, (2, 4, 4)).astype(np.float32)
        image *= np.exp(_stretched(coarse, labels_zyx.shape))
    if acquisition.gradient:
        angle = rng.uniform(0, 2 * np.pi)
        rows = np.linspace(-0.5, 0.5, labels_zyx.shape[1], dtype=np.float32)[:, None] * np.float32(np.sin(angle))
        columns = np.linspace(-0.5, 0.5, labels_zyx.shape[2], dtype=np.float32)[None] * np.float32(np.cos(angle))
        image *= np.exp(np.float32(acquisition.gradient) * (rows + columns))
    if acquisition.noise:
        noise = _noise(labels_zyx.shape, acquisition.noise_grain, rng) * np.float32(acquisition.noise)
        if acquisition.rician:
            second = rng.standard_normal(labels_zyx.shape, dtype=np.float32) * np.float32(acquisition.noise)
            image = np.sqrt((image + noise) ** 2 + second**2)
        else:
            image = image + noise
    return np.asarray(image, np.float32)


def _noise(shape_zyx: tuple[int, ...], sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Draw unit-variance noise smoothed in the plane by ``sigma`` pixels, coarse where it is smooth."""
    step = max(1, int(sigma / 1.5))
    small = (shape_zyx[0], -(-shape_zyx[1] // step) + 1, -(-shape_zyx[2] // step) + 1)
    noise = rng.standard_normal(small, dtype=np.float32)
    if sigma > 0.3:
        noise = ndimage.gaussian_filter(noise, (0.5, sigma / step, sigma / step), truncate=2.5)
        noise /= max(float(noise.std()), 1e-6)
    if step > 1:
        noise = ndimage.zoom(noise, (1, step, step), order=1)
    return noise[:, : shape_zyx[1], : shape_zyx[2]]


def _stretched(coarse: np.ndarray, shape_zyx: tuple[int, ...]) -> np.ndarray:
    index = [np.linspace(0, n - 1, size) for n, size in zip(coarse.shape, shape_zyx, strict=True)]
    where = np.stack(np.meshgrid(*index, indexing="ij"))
    return np.asarray(ndimage.map_coordinates(coarse, where, order=1, mode="nearest", output=np.float32))
