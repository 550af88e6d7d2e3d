"""What is done to the planes of a volume: intensities windowed, sizes changed, cells counted.

Shape letters: K planes, H W pixels.
"""

from __future__ import annotations

import numpy as np

from nnunet_sam2.errors import InputError


def intensity_window(array_zyx: np.ndarray, lower_percentile: float, upper_percentile: float) -> tuple[float, float]:
    """Return the two percentiles of the voxels above the minimum; the whole range where they coincide."""
    if not 0 <= lower_percentile < upper_percentile <= 100:
        raise InputError(f"percentiles {lower_percentile} and {upper_percentile} must rise within 0 to 100")
    minimum, maximum = float(array_zyx.min()), float(array_zyx.max())
    if not (np.isfinite(minimum) and np.isfinite(maximum)):
        raise InputError("the volume holds NaN or infinite voxels; repair the image")
    above = array_zyx[array_zyx > minimum]
    if above.size == 0:
        return minimum, maximum
    low, high = (float(v) for v in np.percentile(above, (lower_percentile, upper_percentile)))
    return (low, high) if high > low else (minimum, maximum)


def overlap_matrix(length: int, cells: int) -> np.ndarray:
    """Return (cells, length) weights: the part of each of ``cells`` equal intervals that each pixel covers."""
    edges = np.arange(cells + 1) * (length / cells)
    pixels = np.arange(length)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.clip(covered, 0.0, None) * (cells / length), dtype=np.float32)


def resize(planes_khw: np.ndarray, shape_hw: tuple[int, int]) -> np.ndarray:
    """Resize K planes bilinearly to ``shape_hw``, antialiased where they shrink; (K, H, W) float32."""
    if planes_khw.shape[1:] == shape_hw:
        return np.asarray(planes_khw, dtype=np.float32)
    import torch
    from torch.nn.functional import interpolate

    planes = torch.from_numpy(np.ascontiguousarray(planes_khw, dtype=np.float32))[None]
    shrinks = shape_hw[0] < planes.shape[2] or shape_hw[1] < planes.shape[3]
    out = interpolate(planes, size=shape_hw, mode="bilinear", align_corners=False, antialias=shrinks)
    return np.asarray(out[0].numpy())
