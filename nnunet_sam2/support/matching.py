"""How alike two slices are: by SAM 2's own embeddings, or by LPIPS.

Both metrics turn an image into one vector, such that the squared Euclidean distance of two vectors is the metric; a
slice's best match in a library is then one matrix product away.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate, normalize

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.protocol import Embeddings, Sam2Backend

LPIPS_SIZE = 224
"""Side in pixels at which LPIPS compares; AlexNet was trained at it, and larger images cost quadratically more."""

_POOLED = 8
_LAYERS_AFTER = (1, 4, 7, 9, 11)
"""Positions of the five ReLUs in torchvision's AlexNet ``features``, whose outputs LPIPS compares."""

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class Metric(Protocol):
    """Turn slices into vectors (N, F) whose squared Euclidean distance says how unlike two slices are."""

    name: str

    def describe(self, frames: Frames, embeddings: Embeddings, indices: Sequence[int]) -> np.ndarray:
        """Describe some frames of a volume, (N, F) float32."""
        ...

    def describe_image(self, image_3ss: np.ndarray, backend: Sam2Backend) -> np.ndarray:
        """Describe one image, (F,) float32."""
        ...


def squared_distances(query_f: np.ndarray, library_nf: np.ndarray) -> np.ndarray:
    """Compute the squared Euclidean distance of one vector to N others, (N,) float64."""
    difference_nf = library_nf.astype(np.float64) - query_f.astype(np.float64)
    return np.asarray(np.einsum("nf,nf->n", difference_nf, difference_nf))


class EmbeddingMetric:
    """Compare pooled SAM 2 embeddings: the squared distance is twice (1 - cosine). Needs no other weights."""

    name = "embedding"

    def describe(self, frames: Frames, embeddings: Embeddings, indices: Sequence[int]) -> np.ndarray:
        """See `Metric.describe`."""
        return np.stack([_pooled(embeddings.top(n)) for n in indices])

    def describe_image(self, image_3ss: np.ndarray, backend: Sam2Backend) -> np.ndarray:
        """See `Metric.describe_image`."""
        return _pooled(backend.embed(Frames.from_images(image_3ss[None])).top(0))


class LpipsMetric:
    """Compare by LPIPS with AlexNet (Zhang et al., CVPR 2018).

    The distance is the sum over five layers of the linear heads' weighted squared difference of unit-normalised
    features, averaged over the layer's positions. Features are scaled by the roots of the weights, so that the same
    number comes out as a squared Euclidean distance.
    """

    name = "lpips"

    def __init__(self, alexnet_file: Path) -> None:
        """Load AlexNet's features from a file in torchvision's naming and the heads from the ``lpips`` package."""
        self._heads = _linear_heads()
        self._features = _alexnet_features(alexnet_file)

    def describe(self, frames: Frames, embeddings: Embeddings, indices: Sequence[int]) -> np.ndarray:
        """See `Metric.describe`."""
        return np.stack([self.vector(frames.image(n)) for n in indices])

    def describe_image(self, image_3ss: np.ndarray, backend: Sam2Backend) -> np.ndarray:
        """See `Metric.describe_image`."""
        return self.vector(image_3ss)

    @torch.no_grad()
    def vector(self, image_3ss: np.ndarray, *, size: int = LPIPS_SIZE) -> np.ndarray:
        """Describe an image (3, S, S), 0 to 1, by the vector whose squared distances are LPIPS; (F,) float32."""
        image = torch.from_numpy(np.ascontiguousarray(image_3ss, np.float32))[None]
        if image.shape[-1] != size:
            image = interpolate(image, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
        x = (2.0 * image - 1.0 - torch.tensor(_SHIFT)[:, None, None]) / torch.tensor(_SCALE)[:, None, None]
        parts = []
        for layer, module in enumerate(self._features):
            x = module(x)
            if layer in _LAYERS_AFTER:
                weight_c = self._heads[_LAYERS_AFTER.index(layer)]
                # lpips adds its small number to the norm, not under the root.
                unit = x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
                positions = unit.shape[2] * unit.shape[3]
                parts.append((unit * (weight_c / positions).sqrt()[:, None, None]).flatten())
        return np.asarray(torch.cat(parts).numpy())


def make_metric(name: str, weights: str | None) -> Metric:
    """Build a metric by name: ``embedding``, or ``lpips`` with the file of AlexNet's weights."""
    if name == "embedding":
        return EmbeddingMetric()
    if name != "lpips":
        raise InputError(f"no matching metric {name!r}; choose embedding or lpips")
    if weights is None:
        raise InputError("metric lpips needs AlexNet's weights: --set lpips_weights=/path/to/alexnet.safetensors")
    return LpipsMetric(Path(weights).expanduser())


def _pooled(top_chw: torch.Tensor) -> np.ndarray:
    pooled = adaptive_avg_pool2d(top_chw.cpu()[None], _POOLED).flatten()
    return np.asarray(normalize(pooled, dim=0).numpy())


def _linear_heads() -> list[torch.Tensor]:
    import importlib.util

    spec = importlib.util.find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("metric lpips needs the lpips package: pip install 'nnunet_sam2[lpips]'")
    # Read as a file: importing the package would pull in its plotting and training parts.
    path = Path(next(iter(spec.submodule_search_locations))) / "weights" / "v0.1" / "alex.pth"
    if not path.is_file():
        raise InputError(f"{path} is missing; install lpips 0.1.4 anew")
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{i}.model.1.weight"].flatten() for i in range(len(_LAYERS_AFTER))]


def _alexnet_features(path: Path) -> Any:
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; give AlexNet's weights in torchvision's naming (features.0.weight ...)"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} cannot be read as weights ({type(error).__name__}); get the file again") from None
    from torchvision.models import alexnet

    features = alexnet(weights=None).features[: _LAYERS_AFTER[-1] + 1]
    wanted = {key: state.get(f"features.{key}") for key in features.state_dict()}
    missing = sorted(key for key, value in wanted.items() if value is None)
    if missing:
        raise InputError(f"{path} lacks features.{missing[0]}; it is not an AlexNet in torchvision's naming")
    try:
        features.load_state_dict({key: value.float() for key, value in wanted.items() if value is not None})
    except RuntimeError as error:
        raise InputError(f"{path} is not AlexNet ({str(error).splitlines()[-1].strip()})") from None
    for module in features:
        if hasattr(module, "inplace"):
            # The features are kept; the next ReLU must not overwrite them.
            module.inplace = False
    return features.eval().requires_grad_(False)
