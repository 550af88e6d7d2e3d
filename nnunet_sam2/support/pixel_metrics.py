"""SSIM and PSNR between one image and many, on descriptions that are the images themselves.

Shape letters: N library images, Q query images, G side of an image in pixels, H side of a filtered one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.protocol import Embeddings, Sam2Backend
from nnunet_sam2.support.distances import resized, squared_distances

PIXEL_SIZE = 128
"""Side in pixels at which images are compared: finer detail says little about which slice it is."""

_SIGMA, _REACH = 1.5, 5
_C1, _C2 = 0.01**2, 0.03**2
"""Gaussian window and constants of Wang et al. (IEEE TIP 2004), for intensities from 0 to 1."""


class PsnrMetric:
    """Compare by the mean squared difference, which orders slices as the peak signal-to-noise ratio does."""

    name = "psnr"

    def describe(self, frames: Frames, embeddings: Embeddings, indices: Sequence[int]) -> np.ndarray:
        """See `Metric.describe`."""
        return np.stack([_flat(frames.image(n)) for n in indices])

    def describe_image(self, image_3ss: np.ndarray, backend: Sam2Backend) -> np.ndarray:
        """See `Metric.describe_image`."""
        return _flat(image_3ss)

    def distances(self, query: np.ndarray, library: np.ndarray, *, exact: bool = False) -> np.ndarray:
        """See `Metric.distances`."""
        return squared_distances(query, library, exact=exact) / query.shape[1]

    def natural(self, distance: float) -> float | None:
        """Return the peak signal-to-noise ratio in dB."""
        return -10.0 * math.log10(distance) if distance > 0 else None


class SsimMetric:
    """Compare by 1 - SSIM (Wang et al., IEEE TIP 2004), colours averaged to grey.

    As scikit-image's ``structural_similarity`` with ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``;
    here means and variances are filtered once an image, and for a pair the product alone.
    """

    name = "ssim"

    def describe(self, frames: Frames, embeddings: Embeddings, indices: Sequence[int]) -> np.ndarray:
        """See `Metric.describe`."""
        return np.stack([_grey(frames.image(n)) for n in indices])

    def describe_image(self, image_3ss: np.ndarray, backend: Sam2Backend) -> np.ndarray:
        """See `Metric.describe_image`."""
        return _grey(image_3ss)

    def distances(self, query: np.ndarray, library: np.ndarray, *, exact: bool = False) -> np.ndarray:
        """See `Metric.distances`; there is one way only."""
        query_qgg, library_ngg = torch.from_numpy(query), torch.from_numpy(library)
        mean_qhh, mean_nhh = _filtered(query_qgg), _filtered(library_ngg)
        variance_qhh = _filtered(query_qgg.square()) - mean_qhh.square()
        variance_nhh = _filtered(library_ngg.square()) - mean_nhh.square()
        rows = []
        for image_gg, mean_hh, variance_hh in zip(query_qgg, mean_qhh, variance_qhh, strict=True):
            product_nhh = mean_nhh * mean_hh
            covariance_nhh = _filtered(library_ngg * image_gg) - product_nhh
            likeness = (2.0 * product_nhh + _C1) * (2.0 * covariance_nhh + _C2)
            likeness /= (mean_nhh.square() + mean_hh.square() + _C1) * (variance_nhh + variance_hh + _C2)
            rows.append(1.0 - likeness.mean(dim=(1, 2), dtype=torch.float64))
        return np.asarray(torch.stack(rows).numpy())

    def natural(self, distance: float) -> float | None:
        """Return the SSIM."""
        return 1.0 - distance


def _flat(image_3ss: np.ndarray) -> np.ndarray:
    return np.asarray(resized(image_3ss, PIXEL_SIZE).flatten().numpy())


def _grey(image_3ss: np.ndarray) -> np.ndarray:
    return np.asarray(resized(image_3ss, PIXEL_SIZE).mean(dim=0).numpy())


def _filtered(images_ngg: torch.Tensor) -> torch.Tensor:
    """Filter with the Gaussian window where it lies inside the image, (N, H, H)."""
    window_hg = _window(images_ngg.shape[-1])
    return window_hg @ images_ngg @ window_hg.T


@cache
def _window(side: int) -> torch.Tensor:
    """Return the filter along one axis as a band matrix: on images this small, products beat convolutions."""
    offsets = torch.arange(-_REACH, _REACH + 1, dtype=torch.float64)
    taps = torch.exp(-0.5 * (offsets / _SIGMA).square())
    band = torch.zeros(side - 2 * _REACH, side, dtype=torch.float64)
    for row in range(len(band)):
        band[row, row : row + len(taps)] = taps / taps.sum()
    return band.float()
