"""Component filters keep what an anatomist would keep."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_sam2.labelling.components import filter_components, keep_component, single_component_classes
from nnunet_sam2.labelling.largest import keep_largest


def _two_blobs() -> np.ndarray:
    mask_zyx = np.zeros((6, 12, 12), bool)
    mask_zyx[1:5, 1:5, 1:5] = True
    mask_zyx[2:4, 8:10, 8:10] = True
    return mask_zyx


def test_the_largest_component_is_kept() -> None:
    kept = keep_component(_two_blobs())
    assert kept.sum() == 64
    assert kept[2, 2, 2]


def test_the_confident_component_is_kept_but_not_a_single_voxel() -> None:
    mask_zyx = _two_blobs()
    mask_zyx[0, 11, 11] = True
    prob_zyx = np.where(mask_zyx, 0.6, 0.0).astype(np.float32)
    prob_zyx[2:4, 8:10, 8:10] = 0.9
    prob_zyx[0, 11, 11] = 1.0
    kept = keep_component(mask_zyx, prob_zyx, keep="confident")
    assert kept.sum() == 8
    assert kept[2, 8, 8]


def test_keeping_the_confident_component_needs_probabilities() -> None:
    with pytest.raises(ValueError, match="needs prob_zyx"):
        keep_component(_two_blobs(), keep="confident")


def test_diagonal_neighbours_are_one_component_as_in_3d_full_connectivity() -> None:
    mask_zyx = np.zeros((3, 3, 3), bool)
    mask_zyx[0, 0, 0] = mask_zyx[1, 1, 1] = mask_zyx[2, 2, 2] = True
    assert keep_component(mask_zyx).sum() == 3


def test_an_empty_mask_stays_empty() -> None:
    assert not keep_component(np.zeros((2, 3, 4), bool)).any()


def test_a_class_is_single_only_if_it_is_one_piece_in_every_case_that_has_it() -> None:
    whole = np.zeros((6, 12, 12), np.uint8)
    whole[1:5, 1:5, 1:5] = 1
    whole[1:5, 7:11, 7:11] = 2
    split = np.zeros((6, 12, 12), np.uint8)
    split[_two_blobs()] = 2
    assert single_component_classes([whole], (1, 2, 3)) == (1, 2)
    assert single_component_classes([whole, split], (1, 2, 3)) == (1,)


def test_an_island_goes_to_the_class_around_it() -> None:
    label_zyx = np.full((4, 10, 10), 2, np.uint8)
    label_zyx[:, :, :3] = 1
    label_zyx[1:3, 5:7, 7:9] = 1
    prob_czyx = np.zeros((3, 4, 10, 10), np.float32)
    prob_czyx[1] = np.where(label_zyx == 1, 0.6, 0.3)
    prob_czyx[2] = np.where(label_zyx == 2, 0.6, 0.3)
    prob_czyx[0] = 0.1
    filtered_zyx, taken = filter_components(label_zyx, prob_czyx, (1, 2), keep={1: "largest", 2: "largest"})
    assert taken == {1: 8, 2: 0}
    assert (filtered_zyx[1:3, 5:7, 7:9] == 2).all()


def test_a_dropped_island_does_not_make_an_island_of_the_next_class() -> None:
    label_zyx = np.zeros((4, 12, 12), np.uint8)
    label_zyx[:, :4, :4] = 1
    label_zyx[:, :4, 4:8] = 2
    label_zyx[1:3, 10:12, 10:12] = 1
    prob_czyx = np.zeros((3, 4, 12, 12), np.float32)
    for channel in range(3):
        prob_czyx[channel] = np.where(label_zyx == channel, 0.6, 0.1)
    prob_czyx[2, 1:3, 10:12, 10:12] = 0.4
    filtered_zyx, _ = filter_components(label_zyx, prob_czyx, (1, 2), keep={1: "largest", 2: "largest"})
    assert not filtered_zyx[:, 10:, 10:].any()


def test_classes_not_named_are_left_alone() -> None:
    label_zyx = _two_blobs().astype(np.uint8)
    prob_czyx = np.stack([1.0 - label_zyx, label_zyx]).astype(np.float32)
    filtered_zyx, taken = filter_components(label_zyx, prob_czyx, (1,), keep={})
    assert np.array_equal(filtered_zyx, label_zyx)
    assert taken == {}


def test_of_classes_that_are_one_piece_the_largest_is_kept_and_the_others_stay_as_they_are() -> None:
    label = np.zeros((3, 12, 12), np.uint8)
    label[0, 1:5, 1:5] = 1
    label[2, 10, 10] = 1
    label[1, 8:10, 1:3] = 2
    label[1, 1, 10] = 2
    kept, dropped = keep_largest(label, (1,))
    assert dropped == 1
    assert kept[2, 10, 10] == 0
    assert (kept == 1).sum() == 16
    np.testing.assert_array_equal(kept == 2, label == 2)
    assert label[2, 10, 10] == 1
    assert keep_largest(np.zeros((2, 3, 4), np.uint8), (1, 2))[1] == 0
