"""How alike two slices are: by SAM 2's own embeddings, by LPIPS, by SSIM or by PSNR.

A metric describes each slice once; distances are taken between descriptions, so that nothing is encoded for a pair.
Shape letters: N library slices, Q query slices, F numbers of a description, S model size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, normalize

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.protocol import Embeddings, Sam2Backend
from nnunet_sam2.support.distances import squared_distances

METRICS = ("embedding", "lpips", "ssim", "psnr")

_POOLED = 8


class Metric(Protocol):
    """Turn slices into descriptions, and descriptions into distances; a smaller distance is more alike."""

    name: str

    def describe(self, frames: Frames, embeddings: Embeddings, indices: Sequence[int]) -> np.ndarray:
        """Describe some frames of a volume, (N, ...) float32."""
        ...

    def describe_image(self, image_3ss: np.ndarray, backend: Sam2Backend) -> np.ndarray:
        """Describe one image, (...) float32."""
        ...

    def distances(self, query: np.ndarray, library: np.ndarray, *, exact: bool = False) -> np.ndarray:
        """Compare Q descriptions with N others, (Q, N) float64; ``exact`` takes no short cut that costs digits."""
        ...

    def natural(self, distance: float) -> float | None:
        """Return a distance as the number that the metric is known by; None where that is infinite."""
        ...


class EmbeddingMetric:
    """Compare pooled SAM 2 embeddings by 1 - cosine. Needs no other weights."""

    name = "embedding"

    def describe(self, frames: Frames, embeddings: Embeddings, indices: Sequence[int]) -> np.ndarray:
        """Return unit-length vectors (N, F); see `Metric.describe`."""
        return np.stack([_pooled(embeddings.top(n)) for n in indices])

    def describe_image(self, image_3ss: np.ndarray, backend: Sam2Backend) -> np.ndarray:
        """See `Metric.describe_image`."""
        return _pooled(backend.embed(Frames.from_images(image_3ss[None])).top(0))

    def distances(self, query: np.ndarray, library: np.ndarray, *, exact: bool = False) -> np.ndarray:
        """See `Metric.distances`."""
        return 0.5 * squared_distances(query, library, exact=exact)

    def natural(self, distance: float) -> float | None:
        """Return the cosine."""
        return 1.0 - distance


def make_metric(name: str, weights: str | None = None) -> Metric:
    """Build a metric by name; ``weights`` is the file of AlexNet's weights for ``lpips``.

    Without a file, LPIPS takes AlexNet from where torchvision keeps what it has downloaded.
    """
    if name == "embedding":
        return EmbeddingMetric()
    if name == "lpips":
        from nnunet_sam2.support.lpips_metric import LpipsMetric, downloaded_alexnet

        return LpipsMetric(Path(weights).expanduser() if weights is not None else downloaded_alexnet())
    if name in METRICS:
        from nnunet_sam2.support.pixel_metrics import PsnrMetric, SsimMetric

        return SsimMetric() if name == "ssim" else PsnrMetric()
    raise InputError(f"no matching metric {name!r}; choose one of {', '.join(METRICS)}")


def _pooled(top_chw: torch.Tensor) -> np.ndarray:
    pooled = adaptive_avg_pool2d(top_chw.cpu()[None], _POOLED).flatten()
    return np.asarray(normalize(pooled, dim=0).numpy())
