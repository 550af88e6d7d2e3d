"""When the loop stops, and which round it keeps."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_sam2.rounds.ending.convergence import (
    Change,
    RoundOutcome,
    StopReason,
    best_round,
    class_change,
    kept_round,
    stop_reason,
    summarise_change,
)

RULE = {"round_limit": 6, "mean_change": 0.01, "worst_tenth_change": 0.05, "validation_drop": 0.02}


def _outcome(number: int, *, mean: float | None = None, worst: float = 0.0, dice: float | None = None) -> RoundOutcome:
    change = None if mean is None else Change(by_case={}, mean=mean, worst_tenth=worst)
    return RoundOutcome(number=number, change=change, validation_dice=dice)


def test_change_is_one_minus_dice_for_each_class_that_either_map_has() -> None:
    before = np.array([[[1, 1, 0, 0]]])
    now = np.array([[[1, 0, 0, 2]]])
    change = class_change(before, now, (1, 2, 3))
    assert change == pytest.approx({1: 1 - 2 / 3, 2: 1.0})


def test_equal_maps_do_not_change() -> None:
    label = np.random.default_rng(0).integers(0, 3, (4, 5, 6))
    assert class_change(label, label, (1, 2)) == {1: 0.0, 2: 0.0}


def test_the_worst_tenth_is_the_mean_of_the_largest_tenth_of_the_pairs() -> None:
    change = summarise_change({f"case{i}": {1: i / 100, 2: 0.0} for i in range(10)})
    assert change.mean == pytest.approx(0.0225)
    assert change.worst_tenth == pytest.approx((0.09 + 0.08) / 2)


def test_the_worst_tenth_of_few_pairs_is_the_worst_pair() -> None:
    assert summarise_change({"a": {1: 0.3}, "b": {1: 0.1}}).worst_tenth == pytest.approx(0.3)


def test_the_first_round_has_nothing_to_converge_to() -> None:
    assert stop_reason([_outcome(1)], **RULE) is None


def test_small_mean_and_small_worst_tenth_together_are_convergence() -> None:
    assert stop_reason([_outcome(1), _outcome(2, mean=0.01, worst=0.05)], **RULE) is StopReason.CONVERGED
    assert stop_reason([_outcome(1), _outcome(2, mean=0.01, worst=0.06)], **RULE) is None
    assert stop_reason([_outcome(1), _outcome(2, mean=0.02, worst=0.02)], **RULE) is None


def _followed(labels: list[np.ndarray]) -> StopReason | None:
    """Follow label maps round by round as the loop does, to the first reason to stop other than the limit."""
    outcomes = [_outcome(1)]
    for n in range(1, len(labels)):
        change = class_change(labels[n - 1], labels[n], (1,))[1]
        outcomes.append(_outcome(n + 1, mean=change, worst=change))
        two = class_change(labels[n - 2], labels[n], (1,))[1] if n > 1 else None
        reason = stop_reason(outcomes, **{**RULE, "round_limit": 99}, two_round_change=two)
        if reason:
            return reason
    return None


def _noisy(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(label.shape) < 0.05, 1 - label, label)


def test_labels_that_chance_alone_changes_have_converged_and_those_on_their_way_have_not() -> None:
    rng = np.random.default_rng(0)
    still = np.zeros((40, 40, 40), np.uint8)
    still[8:28, 8:28, 8:28] = 1
    assert _followed([_noisy(still, rng) for _ in range(4)]) is StopReason.CONVERGED
    assert _followed([_noisy(np.roll(still, 2 * n, axis=0), rng) for n in range(6)]) is None
    assert _followed([np.roll(still, 2 * n, axis=0) for n in range(6)]) is None
    assert _followed([np.roll(still, 4 * (n % 2), axis=0) for n in range(6)]) is None


def test_a_small_step_after_a_large_one_is_not_taken_for_noise() -> None:
    rounds = [_outcome(1), _outcome(2, mean=0.3, worst=0.3), _outcome(3, mean=0.1, worst=0.2)]
    assert stop_reason(rounds, **RULE, two_round_change=0.35) is None
    assert stop_reason(rounds, **RULE, two_round_change=0.105) is StopReason.CONVERGED


def test_the_round_limit_stops_what_does_not_converge() -> None:
    rounds = [_outcome(1), *(_outcome(n, mean=0.5, worst=0.9) for n in range(2, 7))]
    assert stop_reason(rounds[:5], **RULE) is None
    assert stop_reason(rounds, **RULE) is StopReason.ROUND_LIMIT


def test_a_fall_of_validation_dice_outranks_convergence() -> None:
    rounds = [_outcome(0, dice=0.8), _outcome(1, dice=0.9), _outcome(2, mean=0.0, dice=0.87)]
    assert stop_reason(rounds, **RULE) is StopReason.VALIDATION_FELL


def test_a_fall_within_the_tolerance_goes_on() -> None:
    rounds = [_outcome(0, dice=0.8), _outcome(1, dice=0.81), _outcome(2, mean=0.5, worst=0.5, dice=0.795)]
    assert stop_reason(rounds, **RULE) is None


def test_a_first_round_worse_than_the_baseline_stops_and_the_baseline_is_kept() -> None:
    rounds = [_outcome(0, dice=0.9), _outcome(1, dice=0.7)]
    assert stop_reason(rounds, **RULE) is StopReason.VALIDATION_FELL
    assert best_round(rounds) == 0


def test_the_best_round_has_the_highest_validation_dice_and_the_later_of_equals_wins() -> None:
    rounds = [_outcome(0, dice=0.7), _outcome(1, dice=0.9), _outcome(2, dice=0.9), _outcome(3, dice=0.85)]
    assert best_round(rounds) == 2


def test_where_people_had_their_word_the_best_round_that_knows_it_is_kept_unless_it_is_much_worse() -> None:
    rounds = [_outcome(0, dice=0.70), _outcome(1, dice=0.80), _outcome(2, dice=0.79), _outcome(3, dice=0.785)]
    assert kept_round(rounds, since=0, drop=0.02) == 1
    assert kept_round(rounds, since=2, drop=0.02) == 2
    assert kept_round(rounds, since=2, drop=0.005) == 1
    assert kept_round(rounds, since=4, drop=0.02) == 1
    unknown = [_outcome(n) for n in range(3)]
    assert kept_round(unknown, since=1, drop=0.02) == 2


def test_without_validation_the_last_round_is_kept() -> None:
    assert best_round([_outcome(0), _outcome(1), _outcome(2)]) == 2
