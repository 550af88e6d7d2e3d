"""Variants of support slices."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nnunet_sam2.support.augment import (
    Augmentation,
    AugmentOptions,
    augment_image,
    augment_masks,
    draw_augmentation,
)

STILL = Augmentation(
    rotation_degrees=0.0,
    scale=1.0,
    shear_degrees=0.0,
    translation_xy=(0.0, 0.0),
    brightness=0.0,
    contrast=1.0,
    saturation=1.0,
    gamma=1.0,
)


def _square(size: int = 64) -> np.ndarray:
    mask_ss = np.zeros((size, size), bool)
    mask_ss[20:36, 12:28] = True
    return mask_ss


def _image(mask_ss: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(mask_ss, 0.7, 0.2).astype(np.float32)[None], 3, axis=0)


def test_the_identity_changes_nothing() -> None:
    image = _image(_square())
    np.testing.assert_allclose(augment_image(image, STILL), image, atol=1e-5)
    assert np.array_equal(augment_masks(_square()[None], STILL)[0], _square())


def test_image_and_mask_move_together() -> None:
    variant = dataclasses.replace(
        STILL, rotation_degrees=12.0, scale=1.1, shear_degrees=4.0, translation_xy=(0.05, -0.04)
    )
    moved = augment_image(_image(_square()), variant)[0]
    mask = augment_masks(_square()[None], variant)[0]
    overlap = (moved > 0.45) & mask
    assert 2 * overlap.sum() / ((moved > 0.45).sum() + mask.sum()) > 0.99
    assert not np.array_equal(mask, _square())


def test_translation_goes_where_it_says_and_scale_grows() -> None:
    right = augment_masks(_square()[None], dataclasses.replace(STILL, translation_xy=(0.125, 0.0)))[0]
    assert np.array_equal(right, np.roll(_square(), 8, axis=1))
    larger = augment_masks(_square()[None], dataclasses.replace(STILL, scale=1.2))[0]
    assert larger.sum() == pytest.approx(1.44 * _square().sum(), rel=0.1)


def test_colours_touch_the_image_alone() -> None:
    variant = dataclasses.replace(STILL, brightness=0.1, contrast=1.3, gamma=0.8)
    image = augment_image(_image(_square()), variant)
    assert not np.allclose(image, _image(_square()), atol=0.02)
    assert image.min() >= 0
    assert image.max() <= 1
    assert np.array_equal(augment_masks(_square()[None], variant)[0], _square())


def test_saturation_leaves_grey_images_alone() -> None:
    image = _image(_square())
    np.testing.assert_allclose(augment_image(image, dataclasses.replace(STILL, saturation=0.3)), image, atol=1e-5)
    image[0] += 0.1
    assert not np.allclose(augment_image(image, dataclasses.replace(STILL, saturation=0.3)), image, atol=0.01)


def test_hue_turns_colours_and_leaves_grey_images_alone() -> None:
    turned = dataclasses.replace(STILL, hue=1 / 3)
    np.testing.assert_allclose(augment_image(_image(_square()), turned), _image(_square()), atol=1e-5)
    red = np.zeros((3, 8, 8), np.float32)
    red[0] = 0.8
    green = augment_image(red, turned)
    np.testing.assert_allclose(green[1], 0.8, atol=1e-5)
    np.testing.assert_allclose(green[[0, 2]], 0.0, atol=1e-5)


def test_hue_changes_no_other_draw() -> None:
    plain, hued = (draw_augmentation(AugmentOptions(hue=h), np.random.default_rng(3)) for h in (0.0, 0.2))
    assert hued.hue != 0
    assert dataclasses.replace(hued, hue=0.0) == plain


def test_the_same_seed_draws_the_same_and_stays_in_bounds() -> None:
    options = AugmentOptions()
    assert draw_augmentation(options, np.random.default_rng(3)) == draw_augmentation(options, np.random.default_rng(3))
    rng = np.random.default_rng(0)
    drawn = [draw_augmentation(options, rng) for _ in range(50)]
    assert all(abs(v.rotation_degrees) <= options.rotation_degrees for v in drawn)
    assert all(abs(v.scale - 1) <= options.scale for v in drawn)
    assert len({v.rotation_degrees for v in drawn}) == 50


@pytest.mark.parametrize(
    "changes", [{"scale": 1.0}, {"hue": 0.6}, {"rotation_degrees": -1.0}, {"contrast": float("nan")}]
)
def test_bounds_that_make_no_image_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        AugmentOptions(**changes)
