"""A loop that collapses is stopped by name, and one that does not is left alone."""

from __future__ import annotations

import pytest

from nnunet_sam2.rounds.ending.collapse import (
    Signs,
    confirmed_errors,
    drifted_volume,
    label_collapse,
    swinging_labels,
    vanished_class,
)
from nnunet_sam2.rounds.ending.convergence import RoundOutcome, StopReason
from nnunet_sam2.rounds.options import RunOptions

RULE = {"volume_drift": 2.0, "empty_rise": 0.25, "oscillation": 0.5, "settled_change": 0.01}
HUMAN = Signs(volume_mm3={1: 1000.0, 2: 500.0}, empty_share={1: 0.0, 2: 0.1})


def _signs(
    volumes: tuple[float, ...] = (1000.0, 500.0),
    empty: tuple[float, ...] = (0.0, 0.0),
    *,
    agreement: float | None = None,
    two_round_change: float | None = None,
) -> Signs:
    return Signs(
        volume_mm3=dict(enumerate(volumes, 1)),
        empty_share=dict(enumerate(empty, 1)),
        agreement=agreement,
        two_round_change=two_round_change,
    )


def _outcomes(*dices: float | None) -> list[RoundOutcome]:
    return [RoundOutcome(number=i, change=None, validation_dice=dice) for i, dice in enumerate(dices)]


def _agreeing(*agreements: float) -> dict[int, Signs]:
    return {i: _signs(agreement=agreed) for i, agreed in enumerate(agreements, 1)}


def test_the_first_round_has_nothing_to_drift_from() -> None:
    assert label_collapse({1: _signs((1.0, 1.0), (1.0, 1.0))}, HUMAN, {}, **RULE) is None


def test_a_class_that_grows_away_from_human_volumes_is_a_drift_with_its_numbers() -> None:
    ending = drifted_volume(_signs((1000.0, 600.0)), _signs((1000.0, 1300.0)), HUMAN, factor=2.0)
    assert ending is not None
    assert ending.reason is StopReason.VOLUME_DRIFT
    assert ending.numbers == {"class": 2, "mm3": 1300.0, "first_round": 600.0, "human": 500.0, "limit": 2.0}
    assert "class 2" in ending.evidence["text"]


def test_a_class_that_shrinks_away_from_human_volumes_is_a_drift_too() -> None:
    ending = drifted_volume(_signs((900.0,)), _signs((300.0,)), HUMAN, factor=2.0)
    assert ending is not None


def test_a_class_that_comes_closer_to_human_volumes_is_no_drift_however_far_it_moves() -> None:
    assert drifted_volume(_signs((5000.0, 100.0)), _signs((1100.0, 450.0)), HUMAN, factor=2.0) is None


def test_a_class_that_vanishes_from_cases_is_named_with_the_shares() -> None:
    ending = vanished_class(_signs(), _signs(empty=(0.0, 0.5)), HUMAN, rise=0.25)
    assert ending is not None
    assert ending.reason is StopReason.EMPTY_CLASS
    assert (ending.numbers["class"], ending.numbers["share"]) == (2, 0.5)


def test_a_class_that_was_as_rare_from_the_start_or_is_as_rare_in_human_labels_has_not_vanished() -> None:
    rare = Signs(volume_mm3={1: 10.0}, empty_share={1: 0.7})
    assert vanished_class(_signs(empty=(0.6,)), _signs(empty=(0.7,)), HUMAN, rise=0.25) is None
    assert vanished_class(_signs(empty=(0.2,)), _signs(empty=(0.7,)), rare, rise=0.25) is None


def test_labels_that_swing_between_two_states_oscillate() -> None:
    ending = swinging_labels(0.20, 0.21, 0.02, 0.5, 0.01)
    assert ending is not None
    assert ending.reason is StopReason.OSCILLATION
    assert ending.numbers["two_round_change"] == 0.02


@pytest.mark.parametrize(
    ("previous", "change", "two_rounds"),
    [
        (0.20, 0.10, 0.30),  # on their way
        (0.10, 0.10, 0.10),  # jitter about a point: as far from either
        (0.20, 0.10, 0.04),  # swinging, but coming to rest
        (0.02, 0.009, 0.001),  # settled
        (None, 0.2, None),  # the second round
    ],
)
def test_labels_that_approach_jitter_or_settle_do_not_oscillate(
    previous: float | None, change: float, two_rounds: float | None
) -> None:
    assert swinging_labels(previous, change, two_rounds, 0.5, 0.01) is None


def test_falling_validation_with_labels_that_follow_the_student_is_confirmation() -> None:
    ending = confirmed_errors(_outcomes(0.80, 0.85, 0.82), _agreeing(0.80, 0.90), drop=0.02)
    assert ending is not None
    assert ending.reason is StopReason.CONFIRMATION
    assert ending.numbers["validation_dice"] == [0.85, 0.82]


def test_two_small_falls_in_a_row_are_confirmation_where_agreement_rises_with_each() -> None:
    outcomes = _outcomes(0.80, 0.850, 0.843, 0.836)
    assert confirmed_errors(outcomes, _agreeing(0.80, 0.85, 0.90), drop=0.02) is not None
    assert confirmed_errors(outcomes, _agreeing(0.80, 0.85, 0.84), drop=0.02) is None


def test_a_fall_with_labels_that_leave_the_student_is_no_confirmation() -> None:
    assert confirmed_errors(_outcomes(0.80, 0.85, 0.80), _agreeing(0.90, 0.80), drop=0.02) is None


def test_without_validation_there_is_no_confirmation() -> None:
    assert confirmed_errors(_outcomes(None, None, None), _agreeing(0.8, 0.9), drop=0.02) is None


def test_signs_survive_the_ledger() -> None:
    signs = _signs(agreement=0.9, two_round_change=0.1)
    assert Signs.from_json(signs.to_json()) == signs


# Mean volumes of the classes in mm3: round 1, round 2, human labels; agreement in both rounds; mean change; validation
# Dice. Measured on the runs of docs/benchmarks/loop.json and on the demo; no class is missing anywhere.
REAL = {
    "hippocampus": (
        (1767.25, 1691.1),
        (1760.35, 1588.98),
        (1767.63, 1612.88),
        (0.968, 0.982),
        0.0356,
        (0.833, 0.857, 0.865),
    ),
    "chaos_t2_mr": (
        (1760225.0, 228209.0, 188128.0, 294280.0),
        (1644188.0, 228449.0, 185416.0, 271319.0),
        (1831076.0, 204078.0, 230992.0, 337657.0),
        (0.615, 0.859),
        0.0667,
        (None, None, None),
    ),
    "demo": (
        (58830.8, 11278.0),
        (58466.8, 11410.2),
        (56510.6, 14370.3),
        (0.920, 0.964),
        0.0280,
        (None, None, None),
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_runs_raise_no_alarm(name: str) -> None:
    first, second, human, agreement, change, dice = REAL[name]
    signs = {1: _signs(first, agreement=agreement[0]), 2: _signs(second, agreement=agreement[1])}
    options = RunOptions()
    rule = {
        "volume_drift": options.volume_drift,
        "empty_rise": options.empty_rise,
        "oscillation": options.oscillation,
        "settled_change": options.mean_change,
    }
    reference = Signs(volume_mm3=dict(enumerate(human, 1)), empty_share={})
    assert label_collapse(signs, reference, {2: change}, **rule) is None
    assert confirmed_errors(_outcomes(*dice), signs, drop=options.validation_drop) is None
