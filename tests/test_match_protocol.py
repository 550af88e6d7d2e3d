"""What `match` compares and sends: metrics, the published protocol, what is refused, odd volumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_matching import lpips_twin

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.fusion import FusionOptions
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.labelling.strategies.match.strategy import Match
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.support.augment import Augmentation, augment_image, augment_masks
from nnunet_sam2.support.cases import Query, Support
from nnunet_sam2.support.distances import resized
from nnunet_sam2.support.lpips_metric import LPIPS_SIZE
from nnunet_sam2.support.matching import METRICS
from nnunet_sam2.volumes import Volume

SIZE = 64


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torchvision.models import alexnet

    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.safetensors"
    save_file({f"features.{k}": v for k, v in alexnet(weights=None).features.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=SIZE, threads=1)


def _case(backend: MetaSam2Backend, name: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    rng = np.random.default_rng(list(name.encode()))
    coarse = torch.from_numpy(rng.normal(size=(1, shape[0], 6, 6)).astype(np.float32))
    array = torch.nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear").numpy()
    volume = Volume(array_czyx=array, geometry=Geometry(shape_zyx=shape))
    frames = Frames.from_volume(volume, size=SIZE, slice_axis=0)
    return {"case_id": name, "frames": frames, "embeddings": backend.embed(frames), "geometry": volume.geometry}


def _query(backend: MetaSam2Backend, shape: tuple[int, int, int] = (3, 20, 24)) -> Query:
    return Query(**_case(backend, "query", shape))


def _support(
    backend: MetaSam2Backend,
    shape: tuple[int, int, int] = (4, 20, 24),
    *,
    name: str = "support",
    sizes: tuple[int, ...] = (0, 4, 9, 5),
    value: int = 1,
    ignored: tuple[int, ...] = (),
) -> Support:
    """A labelled case whose class is a square of the given size on each slice."""
    label = np.zeros(shape, np.uint8)
    for m, size in enumerate(sizes):
        label[m, 3 : 3 + size, 2 : 2 + size] = value
    for m in ignored:
        label[m, -1] = 9
    return Support(**_case(backend, name, shape), label_zyx=label, ignore_value=9)


def _members(
    backend: MetaSam2Backend, query: Query, supports: list[Support], classes: tuple[int, ...] = (1,), **options: Any
) -> list[Member]:
    strategy = make_strategy("match", options)
    return list(strategy.members(query, supports, classes, backend, np.random.default_rng(0)))


@pytest.mark.parametrize("metric", METRICS)
def test_by_every_metric_a_slice_is_most_like_itself(backend: MetaSam2Backend, alexnet_file: Path, metric: str) -> None:
    support = _support(backend)
    options = {"metric": metric, "augmentations": 1, "lpips_weights": str(alexnet_file)}
    (member,) = _members(backend, support.as_query(), [_support(backend, name="other"), support], **options)
    (pool,) = member.record["pools"]
    assert [(s["support"], s["slice"], s["variant"]) for s in pool["slices"]] == [
        ("support", n, None) for n in range(4)
    ]
    same = {"embedding": 1.0, "lpips": 0.0, "ssim": 1.0, "psnr": None}[metric]
    assert all(s[metric] == (same if same is None else pytest.approx(same, abs=1e-5)) for s in pool["slices"])


def test_lpips_chooses_as_pairwise_calls_of_the_lpips_package(backend: MetaSam2Backend, alexnet_file: Path) -> None:
    query, supports = _query(backend), [_support(backend), _support(backend, name="other")]
    options = {"metric": "lpips", "augmentations": 2, "shortlist": 8, "lpips_weights": str(alexnet_file)}
    members = _members(backend, query, supports, matches=24, **options)
    twin = lpips_twin(alexnet_file)
    by_name = {support.case_id: support for support in supports}
    for n in range(3):
        found = [member.record["pools"][0]["slices"][n] for member in members]
        pairwise = []
        for record in found:
            image = by_name[record["support"]].frames.image(record["slice"])
            if record["variant"]:
                image = augment_image(image, _variant(record))
            with torch.no_grad():
                pair = [resized(i, LPIPS_SIZE)[None] for i in (query.frames.image(n), image)]
                pairwise.append(float(twin(*pair, normalize=True)))
        np.testing.assert_allclose([record["lpips"] for record in found], pairwise, atol=1e-5)
        assert int(np.argmin(pairwise)) == 0
        assert len({str((r["support"], r["slice"], r["variant"])) for r in found}) == 24


def _variant(record: dict[str, Any]) -> Augmentation:
    values = {key: value for key, value in record["variant"].items() if key != "number"}
    return Augmentation(**{**values, "translation_xy": tuple(values["translation_xy"])})


def test_the_papers_preset_matches_one_slice_a_class_in_as_many_variants_as_it_says(
    backend: MetaSam2Backend, alexnet_file: Path
) -> None:
    query = _query(backend)
    first, second = _support(backend), _support(backend, name="other", value=2)
    (member,) = _members(backend, query, [first, second], (1, 2, 3), preset="paper", lpips_weights=str(alexnet_file))
    assert member.record["absent_in_all_supports"] == [3]
    assert not member.prob_kzyx[2].any()
    for pool, value, name in zip(member.record["pools"], (1, 2), ("support", "other"), strict=True):
        assert pool["classes"] == [value]
        # The original and N_T = 4 variants for each of the three query slices; the mask is largest on slice 2.
        assert pool["candidates"] == 1 + 4 * 3
        assert {(s["support"], s["slice"]) for s in pool["slices"]} == {(name, 2)}
        assert all(list(s["classes"]) == [str(value)] for s in pool["slices"])
    options = make_strategy("match", {"preset": "paper"}).options
    assert (options.metric, options.support_set, options.matches) == ("lpips", "slice", 1)
    assert Match(options).fusion(FusionOptions()).components == "none"


def test_the_clip_is_the_matched_slice_with_its_mask_and_the_query_slice(backend: MetaSam2Backend) -> None:
    query, support = _query(backend), _support(backend)
    (member,) = _members(backend, query, [support], support_set="slice", augmentations=2, metric="ssim")
    masks = support.frames.masks_to_model(support.label_zyx == 1)
    expected = []
    for n, record in enumerate(member.record["pools"][0]["slices"]):
        image, mask = support.frames.image(record["slice"]), masks[record["slice"]][None]
        if record["variant"]:
            image, mask = augment_image(image, _variant(record)), augment_masks(mask, _variant(record))
        clip = [(backend.embed(Frames.from_images(image[None])), 0), (query.embeddings, n)]
        (answer,) = backend.propagate(clip, {0: mask})
        expected.append(torch.sigmoid(answer.logits_kss))
        assert record["classes"]["1"]["iou"] == pytest.approx(float(answer.iou_k[0]), abs=1e-3)
    np.testing.assert_allclose(member.prob_kzyx, query.frames.to_volume(expected), atol=1e-5)


def test_slices_that_are_partly_judged_are_left_to_others_where_those_show_every_class(
    backend: MetaSam2Backend,
) -> None:
    query = _query(backend)
    for ignored, expected in (((2,), {0, 1, 3}), ((1, 2, 3), {0, 1, 2, 3})):
        support = _support(backend, ignored=ignored)
        members = _members(backend, query, [support], augmentations=0, matches=len(expected))
        seen = {s["slice"] for member in members for s in member.record["pools"][0]["slices"]}
        assert seen == expected


def test_one_slice_volumes_are_labelled(backend: MetaSam2Backend) -> None:
    support = _support(backend, (1, 22, 20), sizes=(9,))
    (member,) = _members(backend, _query(backend, (1, 20, 24)), [support])
    assert member.prob_kzyx.shape == (1, 1, 20, 24)
    assert member.prob_kzyx.any()


def test_a_support_that_is_larger_than_the_query_is_used(backend: MetaSam2Backend) -> None:
    support = _support(backend, (7, 40, 50), sizes=(9,) * 7)
    (member,) = _members(backend, _query(backend, (2, 20, 24)), [support], metric="psnr")
    assert all(slice_hw.any() for slice_hw in member.prob_kzyx[0])


def test_more_matches_than_candidates_are_refused_by_name(backend: MetaSam2Backend) -> None:
    with pytest.raises(InputError, match=r"matches=5: the supports \(support\) offer 4 candidates.*--set matches=4"):
        _members(backend, _query(backend), [_support(backend)], matches=5, augmentations=0)


@pytest.mark.parametrize("support_set", ["volumes", "slice"])
def test_a_class_that_is_missing_in_every_support_is_refused_where_it_is_the_only_one(
    backend: MetaSam2Backend, support_set: str
) -> None:
    with pytest.raises(InputError, match=r"no slice of the supports \(support\) shows a class"):
        _members(backend, _query(backend), [_support(backend)], (2,), support_set=support_set)


def test_missing_weights_are_refused_before_anything_is_read() -> None:
    strategy = make_strategy("match", {"metric": "lpips", "lpips_weights": "/nowhere/alexnet.pth"})
    with pytest.raises(InputError, match=r"/nowhere/alexnet\.pth does not exist"):
        strategy.check("case", 12)  # type: ignore[attr-defined]  # of this strategy
