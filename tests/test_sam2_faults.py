"""SAM 2 under adverse conditions: too little memory, a library that is missing, classes that no support shows."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from lively_sam2 import drifting_images, lively_model, make_backend, masks
from scipy.spatial.transform import Rotation

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.labeller import label_cases
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.storage import file_hash
from nnunet_sam2.volumes import Volume, read_label

UNTRAINED = ["--sam2", "untrained", "--image-size", "64", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def untrained() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=64, threads=1)


def _require_same(one: Any, other: Any) -> None:
    """Fail beyond rounding to half precision: with several threads a batch's size decides the order of sums."""
    for i in range(len(one)):
        for a, b in zip((one.top(i), *one.high(i)), (other.top(i), *other.high(i)), strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-3, atol=2e-3)


def test_a_batch_that_finds_no_memory_is_halved_with_the_same_result_and_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, frames = lively_model(), Frames.from_images(drifting_images())
    whole = make_backend(model)
    expected = whole.embed(frames)
    small = make_backend(model)
    small._batch = 8
    encode, sizes = small._encode, []

    def little_room(images: np.ndarray) -> Any:
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(images)

    monkeypatch.setattr(small, "_encode", little_room)
    _require_same(small.embed(frames), expected)
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    small._cache._latest.clear()
    small.embed(frames)
    assert 8 not in sizes[7:], "the batch that is known to fit is kept"
    assert capsys.readouterr().out.count("2 images are encoded at once") == 1
    small._batch = 1
    small._cache._latest.clear()
    monkeypatch.setattr(small, "_encode", lambda images: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(torch.OutOfMemoryError):
        small.embed(frames)


def test_sam2s_compiled_extension_is_not_needed_and_its_absence_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sam2._C", None)
    backend = make_backend(lively_model())
    embeddings = backend.embed(Frames.from_images(drifting_images()[:3]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = backend.propagate([(embeddings, i) for i in range(3)], {0: masks((8, 8, 40, 40))})
    assert [answer.frame for answer in answers] == [1, 2]


def test_precision_and_cudnn_switches_are_the_callers_after_every_call() -> None:
    def state() -> tuple[Any, ...]:
        return (
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_default_dtype(),
            torch.random.get_rng_state().sum().item(),
        )

    before = state()
    backend = make_backend(lively_model(), precision="bfloat16")
    embeddings = backend.embed(Frames.from_images(drifting_images()[:2]))
    backend.propagate([(embeddings, 0), (embeddings, 1)], {0: masks((8, 8, 40, 40))})
    backend.decode(embeddings, 0, boxes_k4=np.array([[8.0, 8.0, 40.0, 40.0]]))
    assert state() == before


@pytest.mark.parametrize("strategy", ["auto", "transfer"])
def test_a_class_that_no_support_shows_is_left_out_of_the_label(
    strategy: str, cohort: Cohort, untrained: MetaSam2Backend, tmp_path: Path
) -> None:
    case = cohort.unlabelled[0].case_id
    labels = {}
    for name, table in (("plain", cohort.labels), ("ghost", {**cohort.labels, "ghost": 3})):
        label_cases(
            cohort=dataclasses.replace(cohort, labels=table),
            backend=untrained,
            out=tmp_path / name,
            case_ids=[case],
            support_ids=[cohort.labelled[0].case_id],
            strategy=make_strategy(strategy),
            seed=1,
            save_probabilities=False,
        )
        labels[name] = read_label(tmp_path / name / f"{case}.nii.gz")[0]
    assert 3 not in labels["ghost"]
    assert np.array_equal(labels["ghost"], labels["plain"])


def test_the_same_seed_and_cached_embeddings_give_the_same_bytes(
    cohort: Cohort, untrained: MetaSam2Backend, tmp_path: Path
) -> None:
    case = cohort.unlabelled[0].case_id
    hashes = set()
    for name, cache in (("first", None), ("filling", tmp_path / "cache"), ("cached", tmp_path / "cache")):
        label_cases(
            cohort=cohort,
            backend=load_backend("untrained", device="cpu", image_size=64, threads=1, cache_dir=cache),
            out=tmp_path / name,
            case_ids=[case],
            support_ids=[c.case_id for c in cohort.labelled],
            strategy=make_strategy("transfer", {"decoder": "off"}),
            seed=1,
            save_probabilities=True,
        )
        hashes.add(tuple(file_hash(p) for p in sorted((tmp_path / name).rglob(f"{case}.n*"))))
    assert len(hashes) == 1


ORIENTATIONS = {
    "RAS": np.eye(3),
    "left-handed": np.diag([-1.0, 1.0, 1.0]),
    "PIR": np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]),
    "ASL": np.array([[0.0, 0, -1], [1, 0, 0], [0, 1, 0]]),
    "oblique": Rotation.from_euler("xyz", [12, -27, 41], degrees=True).as_matrix(),
    "oblique, left-handed": Rotation.from_euler("xyz", [12, -27, 41], degrees=True).as_matrix() @ np.diag([1, -1.0, 1]),
}


def test_every_orientation_survives_the_way_from_convert_to_the_label(
    tmp_path: Path, fresh_roots: Path, untrained: MetaSam2Backend
) -> None:
    source, affines, images = tmp_path / "source", {}, {}
    for i, (name, direction) in enumerate(ORIENTATIONS.items()):
        case = name.replace(", ", "_")
        affine = np.eye(4)
        affine[:3, :3] = direction @ np.diag([0.9, 1.1, 4.0])
        affine[:3, 3] = (-90.5, 33.25, 7.125)
        values = np.random.default_rng(i).integers(0, 500, (14, 12, 3)).astype(np.int16)
        values[4:10, 3:9] += 900
        label = (values > 700).astype(np.uint8)
        affines[case], images[case] = affine, values
        for kind, array in (("images", values), ("labels", label)):
            if kind == "labels" and i >= 2:
                continue
            (source / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, affine), source / kind / f"{case}.nii.gz")
    assert main(["convert", str(source), "-d", "7", "-n", "T"]) == 0
    raw, out = fresh_roots / "nnUNet_raw/Dataset007_T", tmp_path / "out"
    assert main(["label", "-d", "7", "-o", str(out), *UNTRAINED, "--strategy", "transfer", "--set", "decoder=off"]) == 0
    cohort = json.loads((raw / "cohort.json").read_text())
    for case in cohort["cases"]:
        written = nibabel.load(raw / case["images"][0])
        assert np.allclose(written.affine, affines[case["id"]], atol=1e-4)
        assert np.array_equal(np.asarray(written.dataobj), images[case["id"]])
        if case["role"] == "unlabelled":
            label = nibabel.load(out / f"{case['id']}.nii.gz")
            assert np.allclose(label.affine, affines[case["id"]], atol=1e-4)
            assert label.shape == images[case["id"]].shape


@pytest.mark.parametrize(
    ("shape_zyx", "spacing"),
    [
        ((1, 37, 512), (1.0, 1.0, 1.0)),
        ((40, 1, 1), (1.0, 1.0, 1.0)),
        ((2, 30, 20), (0.3, 0.3, 6.0)),
        ((1200, 3, 4), (1.0, 1.0, 1.0)),
        ((1, 4096, 4096), (1.0, 1.0, 1.0)),
    ],
)
def test_odd_shapes_are_shown_slice_by_slice_and_come_back_in_place(
    shape_zyx: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    values = np.zeros((1, *shape_zyx), np.float32)
    values[0, shape_zyx[0] // 2 :] = 1
    geometry = Geometry(shape_zyx=shape_zyx, spacing_xyz_mm=spacing)
    frames = Frames.from_volume(Volume(array_czyx=values, geometry=geometry), size=64)
    mask = np.zeros(shape_zyx, bool)
    mask[:, : max(1, shape_zyx[1] // 2)] = True
    assert len(frames) == shape_zyx[0]
    assert frames.image(len(frames) - 1).shape == (3, 64, 64)
    model = frames.masks_to_model(mask)
    assert model.shape == (shape_zyx[0], 64, 64)
    back = frames.to_volume(np.asarray(model, np.float32)[None])
    assert back.shape == (1, *shape_zyx)
    assert ((back[0] > 0.5) == mask).mean() > 0.97
