"""Surface distances against MONAI's, which take ten seconds to import."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from scipy.ndimage import gaussian_filter

from nnunet_sam2.surfaces import hausdorff, surface_dice


def _masks(kind: str, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.random(shape) < 0.4, rng.random(shape) < 0.3
    if kind == "filling":
        return np.ones(shape, bool), rng.random(shape) < 0.95
    if kind == "voxels":
        one, other = np.zeros(shape, bool), np.zeros(shape, bool)
        one.flat[0] = other.flat[-1] = True
        return one, other
    smooth = gaussian_filter(rng.normal(size=shape), 1.5)
    return smooth > 0.02, np.roll(smooth, 1, axis=0) > 0.05


@pytest.mark.parametrize("kind", ["blobs", "noise", "filling", "voxels"])
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((9, 11, 13), (2.5, 0.8, 1.1)), ((6, 6, 6), (1.0, 1.0, 1.0)), ((17, 23), (0.7, 1.9))],
)
def test_distances_are_those_of_monai(kind: str, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    for seed in range(3):
        one, other = _masks(kind, shape, seed)
        ours = [*hausdorff(one, other, spacing, (95, 100)), *(surface_dice(one, other, spacing, mm) for mm in (0.5, 1))]
        given = [torch.from_numpy(mask.astype(np.float32))[None, None] for mask in (one, other)]
        whole = {"include_background": True, "spacing": list(spacing)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of MONAI's own deprecated arguments
            theirs = [
                compute_hausdorff_distance(*given, percentile=95, **whole),
                compute_hausdorff_distance(*given, **whole),
                *(compute_surface_dice(*given, [mm], use_subvoxels=True, **whole) for mm in (0.5, 1)),
            ]
        assert ours == pytest.approx([float(value) for value in theirs], rel=1e-5)


def test_equal_masks_are_no_distance_apart() -> None:
    mask, _ = _masks("blobs", (8, 9, 10), 1)
    assert hausdorff(mask, mask, (1, 2, 3), (95, 100)) == [0.0, 0.0]
    assert surface_dice(mask, mask, (1, 2, 3), 0.0) == 1.0
