"""Distrust maps on disk, in a batch's image and through augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_sam2.errors import InputError
from nnunet_sam2.storage import file_hash
from nnunet_sam2.trainers.dataset import (
    DistrustedImage,
    RoundDataset,
    distrust_from_confidence,
    open_maps,
    write_distrust,
)
from nnunet_sam2.trainers.transforms import _walk, carry_distrust, make_repeatable

SHAPE = (9, 14, 12)


@pytest.fixture
def distrust_zyx() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


def stock_transforms(patch_size: tuple[int, ...], *, dummy_2d: bool = False) -> Any:
    """Build the augmentation that stock nnU-Net trains with, with rotation as wide as it gets."""
    return nnUNetTrainer.get_training_transforms(
        patch_size,
        (-np.pi, np.pi),
        [[1] * len(patch_size), [0.5] * len(patch_size)],
        tuple(range(len(patch_size))),
        dummy_2d,
        use_mask_for_norm=[False],
    )


def test_confidence_becomes_distrust() -> None:
    confidence = np.array([0.0, 0.5, 1.0, 1.2, -0.1], dtype=np.float32)
    assert distrust_from_confidence(confidence).tolist() == [255, 128, 0, 0, 255]
    assert distrust_from_confidence(confidence).dtype == np.uint8


def test_a_map_is_read_back_as_written_and_written_the_same_twice(tmp_path: Path, distrust_zyx: np.ndarray) -> None:
    first = write_distrust(tmp_path / "a", "case", distrust_zyx, (8, 8, 8))
    second = write_distrust(tmp_path / "b", "case", distrust_zyx, (8, 8, 8))
    assert file_hash(first) == file_hash(second)
    np.testing.assert_array_equal(open_maps(tmp_path / "a", "case", SHAPE)[:][0], distrust_zyx)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["case.b2nd"]


def test_a_case_without_a_map_is_trusted(tmp_path: Path) -> None:
    assert open_maps(tmp_path, "case", SHAPE) is None


def test_a_map_of_another_shape_is_refused_by_name(tmp_path: Path, distrust_zyx: np.ndarray) -> None:
    write_distrust(tmp_path, "case", distrust_zyx[1:], (8, 8, 8))
    with pytest.raises(InputError, match=r"case\.b2nd is uint8 \(1, 8, 14, 12\)"):
        open_maps(tmp_path, "case", SHAPE)


@pytest.mark.parametrize("bbox", [[[2, 8], [0, 14], [3, 9]], [[-3, 5], [6, 20], [-2, 16]], [[4, 5], [-5, 20], [0, 12]]])
def test_a_crop_is_the_crop_of_image_and_map_joined(tmp_path: Path, distrust_zyx: np.ndarray, bbox: list) -> None:
    image_czyx = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    write_distrust(tmp_path, "case", distrust_zyx, (8, 8, 8))
    lazy = DistrustedImage(image_czyx, open_maps(tmp_path, "case", SHAPE))
    slow = np.concatenate((image_czyx, distrust_zyx[None].astype(np.float32) / 255))
    assert lazy.shape == slow.shape
    np.testing.assert_array_equal(crop_and_pad_nd(lazy, bbox, 0), crop_and_pad_nd(slow, bbox, 0))
    trusted = DistrustedImage(image_czyx, None)
    assert not crop_and_pad_nd(trusted, bbox, 0)[-1].any()


def test_a_round_knows_who_labelled_which_case() -> None:
    class Stock:
        identifiers = ("a", "b", "c")

    dataset = RoundDataset(Stock(), pseudo_cases=("c", "a"))
    assert (dataset.labelled_identifiers, dataset.pseudo_identifiers) == (["b"], ["a", "c"])


@pytest.mark.parametrize(("shape", "dummy_2d"), [((20, 24, 22), False), ((24, 28), False), ((6, 24, 24), True)])
def test_the_map_moves_with_the_labels_and_the_image_is_augmented_as_without_it(shape: tuple, dummy_2d: bool) -> None:
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 2 * n) for n in shape], indexing="ij"))
    labels = torch.from_numpy(((grid.min(0) > -0.5) & (grid.max(0) < 0.3)).astype(np.int16))[None]
    image = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1))
    stock, ours = stock_transforms(shape, dummy_2d=dummy_2d), carry_distrust(stock_transforms(shape, dummy_2d=dummy_2d))
    for transforms in (stock, ours):
        make_repeatable(transforms)
    overlaps, moved = [], 0
    for seed in range(25):
        results = []
        for transforms, channels in ((stock, image.clone()), (ours, torch.cat((image, labels.float())))):
            np.random.seed(seed)
            torch.manual_seed(seed)
            results.append(transforms(image=channels, segmentation=labels.clone()))
        plain, carried = results
        assert torch.equal(carried["image"][:-1], plain["image"])
        assert all(torch.equal(a, b) for a, b in zip(carried["segmentation"], plain["segmentation"], strict=True))
        mask, target = carried["image"][-1:] > 0.5, carried["segmentation"][0] > 0
        overlaps.append(2 * (mask & target).sum().item() / (mask.sum() + target.sum()).item())
        assert carried["image"][-1].min() >= -1e-6
        assert carried["image"][-1].max() <= 1 + 1e-6
        moved += int(not torch.equal(carried["image"][-1].round(), carried["image"][-1]))
    assert moved >= 3, "no sample was rotated or scaled: the test shows nothing"
    assert min(overlaps) > 0.97


def test_nothing_in_a_repeatable_augmentation_depends_on_timing() -> None:
    transforms = stock_transforms((16, 16, 16))
    blurs = [transform for transform in _walk(transforms) if isinstance(transform, GaussianBlurTransform)]
    assert [blur.benchmark for blur in blurs] == [True]
    make_repeatable(transforms)
    assert [blur.benchmark for blur in blurs] == [False]
