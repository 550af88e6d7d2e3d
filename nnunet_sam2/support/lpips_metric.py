"""LPIPS with every image's features computed once: a distance is then a squared Euclidean one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.protocol import Embeddings, Sam2Backend
from nnunet_sam2.support.distances import resized, squared_distances

LPIPS_SIZE = 224
"""Side in pixels at which LPIPS compares; AlexNet was trained at it, and larger images cost quadratically more."""

_LAYERS_AFTER = (1, 4, 7, 9, 11)
"""Positions of the five ReLUs in torchvision's AlexNet ``features``, whose outputs LPIPS compares."""

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class LpipsMetric:
    """Compare by LPIPS with AlexNet (Zhang et al., CVPR 2018).

    The distance is the sum over five layers of the linear heads' weighted squared difference of unit-normalised
    features, averaged over the layer's positions. Features are scaled by the roots of the weights, so that the same
    number comes out as a squared Euclidean distance of two vectors.
    """

    name = "lpips"

    def __init__(self, alexnet_file: Path) -> None:
        """Load AlexNet's features from a file in torchvision's naming and the heads from the ``lpips`` package."""
        self._heads = _linear_heads()
        self._features = _alexnet_features(alexnet_file)

    def describe(self, frames: Frames, embeddings: Embeddings, indices: Sequence[int]) -> np.ndarray:
        """Return vectors (N, F), about 2 MB each; see `Metric.describe`."""
        return np.stack([self.vector(frames.image(n)) for n in indices])

    def describe_image(self, image_3ss: np.ndarray, backend: Sam2Backend) -> np.ndarray:
        """See `Metric.describe_image`."""
        return self.vector(image_3ss)

    def distances(self, query: np.ndarray, library: np.ndarray, *, exact: bool = False) -> np.ndarray:
        """See `Metric.distances`."""
        return squared_distances(query, library, exact=exact)

    def natural(self, distance: float) -> float | None:
        """Return LPIPS."""
        return distance

    @torch.no_grad()
    def vector(self, image_3ss: np.ndarray, *, size: int = LPIPS_SIZE) -> np.ndarray:
        """Describe an image (3, S, S), 0 to 1, by the vector whose squared distances are LPIPS; (F,) float32."""
        x = 2.0 * resized(image_3ss, size)[None] - 1.0
        x = (x - torch.tensor(_SHIFT)[:, None, None]) / torch.tensor(_SCALE)[:, None, None]
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


def downloaded_alexnet() -> Path:
    """Return the file that torchvision downloads AlexNet's weights to; raise `InputError` where it is not there."""
    from torchvision.models import AlexNet_Weights

    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.DEFAULT.url).name
    if not path.is_file():
        raise InputError(
            f"metric lpips needs AlexNet's weights, and {path} does not exist; give them with --set "
            f"lpips_weights=FILE, or fetch them: "
            f"python -c \"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\""
        )
    return path


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
