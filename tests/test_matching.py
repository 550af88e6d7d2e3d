"""Metrics by which slices are matched."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.support.distances import squared_distances
from nnunet_sam2.support.lpips_metric import LPIPS_SIZE, LpipsMetric
from nnunet_sam2.support.matching import METRICS, EmbeddingMetric, make_metric
from nnunet_sam2.support.pixel_metrics import PIXEL_SIZE, PsnrMetric, SsimMetric

LPIPS_TOLERANCE = 1e-6
"""Of LPIPS between descriptions against the lpips package's own calls: float32 sums in another order."""


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


def lpips_twin(alexnet_file: Path) -> torch.nn.Module:
    """The lpips package's own model with the same AlexNet; its constructor would download the weights otherwise."""
    from lpips import LPIPS
    from safetensors.torch import load_file
    from torchvision.models import alexnet

    with warnings.catch_warnings():
        # lpips asks torchvision in words that it would rather not hear any more.
        warnings.simplefilter("ignore", UserWarning)
        model = LPIPS(net="alex", pretrained=True, pnet_rand=True, verbose=False).eval()
    own = alexnet(weights=None).features
    own.load_state_dict({k.removeprefix("features."): v.float() for k, v in load_file(alexnet_file).items()})
    slices = (model.net.slice1, model.net.slice2, model.net.slice3, model.net.slice4, model.net.slice5)
    for part in slices:
        for name, module in part.named_children():
            module.load_state_dict(own[int(name)].state_dict())
    return model


def _assert_is_lpips(alexnet_file: Path) -> None:
    metric, twin = LpipsMetric(alexnet_file), lpips_twin(alexnet_file)
    images = _images(7, LPIPS_SIZE)
    images[6] = images[1]
    vectors = np.stack([metric.vector(image) for image in images])
    tensors = torch.from_numpy(images)
    with torch.no_grad():
        # The slow twin: a pair of network passes for each pair of images.
        pairs = [[float(twin(q[None], n[None], normalize=True)) for n in tensors[3:]] for q in tensors[:3]]
    for exact in (False, True):
        mine = metric.distances(vectors[:3], vectors[3:], exact=exact)
        np.testing.assert_allclose(mine, pairs, rtol=0, atol=LPIPS_TOLERANCE)
        assert np.array_equal(mine.argmin(axis=1), np.argmin(pairs, axis=1))
    assert metric.distances(vectors[1:2], vectors[6:], exact=True)[0, 0] == 0


def test_distances_of_descriptions_are_lpips_of_the_lpips_package(alexnet_file: Path) -> None:
    _assert_is_lpips(alexnet_file)


def test_they_are_lpips_with_the_real_weights_too(shared_weights: Path) -> None:
    file = shared_weights / "alexnet_features.safetensors"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    _assert_is_lpips(file)


def _pair_of_metric(metric: PsnrMetric | SsimMetric) -> tuple[np.ndarray, np.ndarray]:
    """Distances of two images to four others, and the images at the size of the comparison."""
    images = _images(6, PIXEL_SIZE)
    described = metric.describe(Frames.from_images(images), None, range(6))  # type: ignore[arg-type]  # reads pixels only
    return metric.distances(described[:2], described[2:]), images


def test_ssim_is_scikit_images() -> None:
    from skimage.metrics import structural_similarity

    distances, images = _pair_of_metric(SsimMetric())
    grey = images.mean(axis=1)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = [[structural_similarity(q, n, **options) for n in grey[2:]] for q in grey[:2]]
    np.testing.assert_allclose(1 - distances, expected, atol=1e-4)
    assert SsimMetric().natural(0.25) == 0.75


def test_psnr_is_scikit_images() -> None:
    from skimage.metrics import peak_signal_noise_ratio

    distances, images = _pair_of_metric(PsnrMetric())
    expected = [[peak_signal_noise_ratio(q, n, data_range=1.0) for n in images[2:]] for q in images[:2]]
    mine = [[PsnrMetric().natural(d) for d in row] for row in distances]
    np.testing.assert_allclose(mine, expected, rtol=1e-4)
    assert PsnrMetric().natural(0.0) is None


def test_embedding_distance_is_one_minus_cosine(backend: MetaSam2Backend) -> None:
    frames = Frames.from_images(_images(3))
    metric = EmbeddingMetric()
    vectors = metric.describe(frames, backend.embed(frames), range(3))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    distances = metric.distances(vectors[:1], vectors)
    np.testing.assert_allclose(distances[0], 1 - vectors @ vectors[0], atol=1e-5)
    assert distances.argmin() == 0
    assert metric.natural(0.25) == 0.75


def test_distances_by_product_are_those_by_difference() -> None:
    rng = np.random.default_rng(1)
    query, library = rng.normal(size=(3, 500)).astype(np.float32), rng.normal(size=(5, 500)).astype(np.float32)
    fast, slow = squared_distances(query, library), squared_distances(query, library, exact=True)
    np.testing.assert_allclose(fast, slow, rtol=1e-5)
    np.testing.assert_allclose(slow[1, 2], np.sum((query[1].astype(float) - library[2]) ** 2), rtol=1e-6)


def test_an_image_is_described_like_a_frame(backend: MetaSam2Backend, alexnet_file: Path) -> None:
    frames = Frames.from_images(_images(2))
    for metric in (EmbeddingMetric(), LpipsMetric(alexnet_file), SsimMetric(), PsnrMetric()):
        of_frame = metric.describe(frames, backend.embed(frames), [1])[0]
        np.testing.assert_allclose(metric.describe_image(frames.image(1), backend), of_frame, rtol=1e-4, atol=1e-6)


def test_metrics_are_found_by_name(alexnet_file: Path) -> None:
    assert [make_metric(name, str(alexnet_file)).name for name in METRICS] == list(METRICS)
    with pytest.raises(InputError, match="choose one of embedding, lpips, ssim, psnr"):
        make_metric("mse")


def test_lpips_takes_the_weights_that_torchvision_has_downloaded(
    alexnet_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match=r"needs AlexNet's weights.*alexnet-owt-7be5be79\.pth.*lpips_weights=FILE"):
        make_metric("lpips")
    from safetensors.torch import load_file

    (tmp_path / "checkpoints").mkdir()
    torch.save(load_file(alexnet_file), tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    assert make_metric("lpips").name == "lpips"


def test_wrong_weights_for_lpips_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        make_metric("lpips", str(tmp_path / "none.safetensors"))
    (tmp_path / "bad.pth").write_text("<html>not found</html>")
    with pytest.raises(InputError, match="cannot be read as weights"):
        make_metric("lpips", str(tmp_path / "bad.pth"))
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"lacks features\.0"):
        make_metric("lpips", str(tmp_path / "other.safetensors"))
