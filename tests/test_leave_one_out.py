"""Choices and estimates on held-out labelled cases."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_sam2.labelling.leave_one_out import best_choices, dice_by_class, estimated_quality, mean_dice


def test_dice_counts_false_positives_and_leaves_out_what_nobody_has() -> None:
    label = np.array([[[1, 1, 2, 0]]])
    truth = np.array([[[1, 0, 0, 0]]])
    assert dice_by_class(label, truth, (1, 2, 3)) == {1: pytest.approx(2 / 3), 2: 0.0, 3: None}


def test_unjudged_voxels_do_not_count() -> None:
    label = np.array([[[1, 1, 1, 0]]])
    truth = np.array([[[1, 9, 9, 0]]])
    assert dice_by_class(label, truth, (1,), ignore_value=9) == {1: 1.0}
    assert dice_by_class(label, truth, (1,)) == {1: 0.5}


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        dice_by_class(np.zeros((1, 2, 2)), np.zeros((1, 2, 3)), (1,))


def test_quality_is_averaged_over_records_that_have_one() -> None:
    records = [
        {"dice_with_human_label": {"1": 0.5, "2": None}},
        {"dice_with_human_label": {"1": 0.7, "2": None}},
        {"dice_with_human_label": None},
    ]
    assert estimated_quality(records, (1, 2)) == {1: pytest.approx(0.6), 2: None}
    assert mean_dice([], (1,)) == {1: None}


ROWS = {
    "a": {"map": {1: 0.8, 2: 0.8, 3: None}, "decoder": {1: 0.9, 2: 0.5, 3: None}},
    "b": {"map": {1: 0.8, 2: 0.8, 3: None}, "decoder": {1: 0.78, 2: 0.85, 3: None}},
}


def test_each_class_takes_what_was_better_on_the_mean() -> None:
    assert best_choices(ROWS, (1, 2, 3), default="map") == {1: "decoder", 2: "map", 3: "map"}


def test_a_cases_own_row_has_no_say_in_its_own_choice() -> None:
    assert best_choices(ROWS, (1, 2, 3), default="map", without={"a"}) == {1: "map", 2: "decoder", 3: "map"}
    assert best_choices(ROWS, (1, 2, 3), default="map", without={"b"}) == {1: "decoder", 2: "map", 3: "map"}


def test_a_gain_that_is_too_small_and_no_check_at_all_keep_the_default() -> None:
    assert best_choices(ROWS, (1,), default="map", least_gain=0.05) == {1: "map"}
    assert best_choices({}, (1,), default="map") == {1: "map"}
