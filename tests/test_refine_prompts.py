"""Boxes, seeds and morphology: what strategy refine and others draw prompts from."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from nnunet_sam2.labelling.prompting.prompts import bounding_box, deepest_point, model_boxes, morph, seed_prompts, seeds
from nnunet_sam2.labelling.strategies.refine.passes import kept_components


def _disk(centre_yx: tuple[int, int], radius: float, side: int = 40) -> np.ndarray:
    y, x = np.mgrid[:side, :side]
    return np.asarray((y - centre_yx[0]) ** 2 + (x - centre_yx[1]) ** 2 <= radius**2)


def _at(mask_hw: np.ndarray, xy: np.ndarray) -> bool:
    return bool(mask_hw[int(xy[1]), int(xy[0])])


def test_the_seed_of_a_ring_lies_in_the_ring_where_its_centroid_does_not() -> None:
    ring = _disk((20, 20), 15) & ~_disk((20, 20), 9)
    centroid = np.array(ndimage.center_of_mass(ring))[::-1]
    assert not _at(ring, centroid)
    assert _at(ring, deepest_point(ring))


def test_a_seed_lies_where_no_other_class_is() -> None:
    ring, core = _disk((20, 20), 15), _disk((20, 20), 12)
    crescent = _disk((20, 30), 8)
    for mask, others, seed in zip(
        (ring, core, crescent),
        ((core, crescent), (ring, crescent), (ring, core)),
        seeds([ring, core, crescent]),
        strict=True,
    ):
        alone = mask & ~others[0] & ~others[1]
        assert seed.exclusive == bool(alone.any())
        assert _at(alone if seed.exclusive else mask, seed.xy)


def test_a_mask_that_others_cover_wholly_still_gets_a_seed_and_says_so() -> None:
    outer, inner = _disk((20, 20), 15), _disk((20, 20), 5)
    placed = seeds([outer, inner])
    assert [s.exclusive for s in placed] == [True, False]
    assert _at(inner, placed[1].xy)


def test_pieces_of_one_class_are_no_evidence_against_each_other() -> None:
    left, right, other = _disk((10, 8), 5), _disk((10, 30), 5), _disk((30, 20), 6)
    placed = seeds([left, right, other])
    prompts = seed_prompts(placed, [0, 0, 1], np.array([2.0, 2.0], np.float32))
    assert [positive.tolist() for _, positive in prompts] == [[True, False], [True, False], [True, False, False]]
    np.testing.assert_allclose(prompts[0][0][0], 2 * placed[0].xy)
    np.testing.assert_allclose(prompts[0][0][1], 2 * placed[2].xy)


def test_boxes_are_padded_by_a_part_of_their_sides_and_stay_in_the_frame() -> None:
    mask = np.zeros((40, 40), bool)
    mask[10:20, 0:30] = True
    np.testing.assert_allclose(bounding_box(mask, 0.1), [0, 9, 33, 21])
    np.testing.assert_allclose(model_boxes([mask], 0.1, 80), [[0, 18, 66, 42]])


def _slow(mask: np.ndarray, operation: str, element: str, radius: int) -> np.ndarray:
    """Morphology by moving the mask to every place of the element; outside of the frame nothing is known."""
    reach = np.arange(-radius, radius + 1)
    places = [(dy, dx) for dy in reach for dx in reach if element == "square" or dy**2 + dx**2 <= radius**2]
    side = mask.shape[0]

    def dilate(m: np.ndarray) -> np.ndarray:
        padded = np.pad(m, radius)
        return np.logical_or.reduce(
            [padded[radius + y : radius + y + side, radius + x : radius + x + side] for y, x in places]
        )

    if operation == "dilate":
        return dilate(mask)
    if operation == "erode":
        return ~dilate(~mask)
    return dilate(~dilate(~mask)) if operation == "open" else ~dilate(~dilate(mask))


@pytest.mark.parametrize("element", ["square", "disk"])
@pytest.mark.parametrize("operation", ["dilate", "erode", "open", "close"])
def test_morphology_does_what_its_definition_says(operation: str, element: str) -> None:
    rng = np.random.default_rng(4)
    mask = ndimage.gaussian_filter(rng.random((40, 40)), 2) > 0.5
    mask |= _disk((5, 20), 6)
    changed = morph(mask, operation, element, 2)
    assert (changed != mask).any()
    assert np.array_equal(changed, _slow(mask, operation, element, 2))


def test_morphology_never_leaves_nothing_and_borders_erode_nothing() -> None:
    small = _disk((20, 20), 2)
    assert np.array_equal(morph(small, "erode", "disk", 8), small)
    half = np.zeros((20, 20), bool)
    half[:, :10] = True
    np.testing.assert_array_equal(bounding_box(morph(half, "erode", "square", 3)), [0, 0, 7, 20])
    with pytest.raises(ValueError, match="no morphology"):
        morph(half, "blur", "square", 3)


def test_the_most_confident_component_prompts_and_a_sure_speck_does_not() -> None:
    prob = np.zeros((2, 4, 30, 30), np.float32)
    prob[1, :, 2:14, 2:14] = 0.7
    prob[1, :, 18:28, 18:28] = 0.9
    prob[1, 0, 28, 2] = 1.0
    prob[0] = 1 - prob[1]
    (kept,), (record,) = kept_components(prob, [True], least_share=0.1)
    assert np.array_equal(kept, prob[1] == np.float32(0.9))
    assert record["components"] == 3
    assert record["kept"] == [{"voxels": 400, "mean_probability": 0.9}]
    (every,), _ = kept_components(prob, [False], least_share=0.1)
    assert np.array_equal(every, (prob[1] > 0.5) & (prob[1] < 1))
    (speck,), _ = kept_components(prob, [True], least_share=0.0)
    assert speck.sum() == 1


def test_a_class_that_is_nowhere_keeps_nothing() -> None:
    prob = np.zeros((3, 2, 8, 8), np.float32)
    prob[0] = 1
    kept, records = kept_components(prob, [True, False], least_share=0.1)
    assert not kept.any()
    assert records == [{"components": 0}] * 2
