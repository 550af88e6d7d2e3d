"""Variants of a support slice: one affine map for image and masks, colours for the image alone.

Shape letters: K masks, S side of the square frame in pixels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.nn.functional import affine_grid, grid_sample

_HALF_CIRCLE = 0.5


@dataclass(frozen=True, kw_only=True)
class AugmentOptions:
    """Bound what is drawn; every quantity is uniform within plus or minus its bound, scales and factors around 1."""

    rotation_degrees: float = 15.0
    scale: float = 0.15
    shear_degrees: float = 5.0
    translation: float = 0.05
    """As a part of the frame's side."""
    brightness: float = 0.1
    """Added to intensities, which lie in 0 to 1."""
    contrast: float = 0.2
    saturation: float = 0.2
    """Without effect on grey images."""
    gamma: float = 0.2
    hue: float = 0.0
    """As a part of the colour circle; without effect on grey images."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} must be a number not below 0")
        if max(self.scale, self.contrast, self.saturation, self.gamma) >= 1:
            raise ValueError("scale, contrast, saturation and gamma must lie below 1")
        if self.hue > _HALF_CIRCLE:
            raise ValueError(f"hue={self.hue} must not exceed {_HALF_CIRCLE}: half the colour circle is all of it")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Hold one drawn variant; applying it needs no randomness."""

    rotation_degrees: float
    scale: float
    shear_degrees: float
    translation_xy: tuple[float, float]
    brightness: float
    contrast: float
    saturation: float
    gamma: float
    hue: float = 0.0

    def matrix(self) -> np.ndarray:
        """Return the 2 x 3 map from places in the variant to places in the original, in -1 to 1, (x, y)."""
        turn, shear = math.radians(self.rotation_degrees), math.tan(math.radians(self.shear_degrees))
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        linear = rotation @ np.array([[1.0, shear], [0.0, 1.0]]) / self.scale
        shift = -linear @ (2.0 * np.array(self.translation_xy))
        return np.concatenate([linear, shift[:, None]], axis=1).astype(np.float32)


def draw_augmentation(options: AugmentOptions, rng: np.random.Generator) -> Augmentation:
    """Draw one variant within the options' bounds."""

    def within(bound: float) -> float:
        return float(rng.uniform(-bound, bound))

    return Augmentation(
        rotation_degrees=within(options.rotation_degrees),
        scale=1.0 + within(options.scale),
        shear_degrees=within(options.shear_degrees),
        translation_xy=(within(options.translation), within(options.translation)),
        brightness=within(options.brightness),
        contrast=1.0 + within(options.contrast),
        saturation=1.0 + within(options.saturation),
        gamma=1.0 + within(options.gamma),
        # Drawn last and only where asked for, so that it changes no other draw.
        hue=within(options.hue) if options.hue else 0.0,
    )


def augment_image(image_3ss: np.ndarray, variant: Augmentation) -> np.ndarray:
    """Apply the affine map (bilinear, zero outside), then the colours; (3, S, S) float32, 0 to 1."""
    warped = _warp(image_3ss.astype(np.float32), variant, mode="bilinear")
    grey_ss = warped.mean(axis=0, keepdims=True)
    coloured = grey_ss + variant.saturation * (warped - grey_ss)
    coloured = np.clip(coloured, 0.0, 1.0)
    if variant.hue:
        coloured = _turned(coloured, variant.hue)
    coloured = coloured ** np.float32(variant.gamma)
    mean = float(coloured.mean())
    return np.asarray(np.clip(mean + variant.contrast * (coloured - mean) + variant.brightness, 0.0, 1.0), np.float32)


def augment_masks(masks_kss: np.ndarray, variant: Augmentation) -> np.ndarray:
    """Apply the affine map to boolean masks (K, S, S); no colour touches them."""
    return _warp(masks_kss.astype(np.float32), variant, mode="bilinear") >= 0.5


def _turned(image_3ss: np.ndarray, hue: float) -> np.ndarray:
    from torchvision.transforms.v2.functional import adjust_hue

    return np.asarray(adjust_hue(torch.from_numpy(image_3ss), hue).numpy())


def _warp(planes_kss: np.ndarray, variant: Augmentation, *, mode: str) -> np.ndarray:
    planes = torch.from_numpy(planes_kss)[None]
    grid = affine_grid(torch.from_numpy(variant.matrix())[None], list(planes.shape), align_corners=False)
    return np.asarray(grid_sample(planes, grid, mode=mode, padding_mode="zeros", align_corners=False)[0].numpy())
