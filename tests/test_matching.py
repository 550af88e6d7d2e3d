"""Metrics by which slices are matched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.support.matching import EmbeddingMetric, LpipsMetric, make_metric, squared_distances


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet with drawn weights, in torchvision's naming, written once."""
    from torchvision.models import alexnet

    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.safetensors"
    save_file({f"features.{k}": v for k, v in alexnet(weights=None).features.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=64, threads=1)


def _images(count: int, size: int = 64) -> np.ndarray:
    rng = np.random.default_rng(2)
    coarse = torch.from_numpy(rng.random((count, 3, 8, 8), dtype=np.float32))
    return np.asarray(torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").numpy())


def _lpips_twin(alexnet_file: Path) -> torch.nn.Module:
    """The lpips package's own model with the same AlexNet; its constructor would download the weights otherwise."""
    from lpips import LPIPS
    from safetensors.torch import load_file
    from torchvision.models import alexnet

    model = LPIPS(net="alex", pretrained=True, pnet_rand=True, verbose=False).eval()
    own = alexnet(weights=None).features
    own.load_state_dict({k.removeprefix("features."): v.float() for k, v in load_file(alexnet_file).items()})
    slices = (model.net.slice1, model.net.slice2, model.net.slice3, model.net.slice4, model.net.slice5)
    for part in slices:
        for name, module in part.named_children():
            module.load_state_dict(own[int(name)].state_dict())
    return model


def _assert_is_lpips(alexnet_file: Path) -> None:
    metric, twin = LpipsMetric(alexnet_file), _lpips_twin(alexnet_file)
    images = _images(3)
    for a, b in ((0, 1), (1, 2), (0, 0)):
        mine = squared_distances(metric.vector(images[a], size=64), metric.vector(images[b], size=64)[None])[0]
        with torch.no_grad():
            theirs = float(twin(torch.from_numpy(images[a])[None], torch.from_numpy(images[b])[None], normalize=True))
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-7)


def test_the_vectors_squared_distance_is_lpips_of_the_lpips_package(alexnet_file: Path) -> None:
    _assert_is_lpips(alexnet_file)


def test_it_is_lpips_with_the_real_weights_too(shared_weights: Path) -> None:
    _assert_is_lpips(shared_weights / "alexnet_features.safetensors")


def test_embedding_distance_is_twice_one_minus_cosine(backend: MetaSam2Backend) -> None:
    frames = Frames.from_images(_images(3))
    metric = EmbeddingMetric()
    vectors = metric.describe(frames, backend.embed(frames), range(3))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    distances = squared_distances(vectors[0], vectors)
    np.testing.assert_allclose(distances, 2 - 2 * vectors @ vectors[0], atol=1e-5)
    assert distances.argmin() == 0


def test_an_image_is_described_like_a_frame(backend: MetaSam2Backend, alexnet_file: Path) -> None:
    frames = Frames.from_images(_images(2))
    for metric in (EmbeddingMetric(), LpipsMetric(alexnet_file)):
        of_frame = metric.describe(frames, backend.embed(frames), [1])[0]
        np.testing.assert_allclose(metric.describe_image(frames.image(1), backend), of_frame, rtol=1e-4, atol=1e-6)


def test_lpips_without_weights_or_with_wrong_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs AlexNet's weights"):
        make_metric("lpips", None)
    with pytest.raises(InputError, match="does not exist"):
        make_metric("lpips", str(tmp_path / "none.safetensors"))
    (tmp_path / "bad.pth").write_text("<html>not found</html>")
    with pytest.raises(InputError, match="cannot be read as weights"):
        make_metric("lpips", str(tmp_path / "bad.pth"))
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"lacks features\.0"):
        make_metric("lpips", str(tmp_path / "other.safetensors"))
