"""What to look at first: each sign can put a case on top, and every place has its reason."""

from __future__ import annotations

import itertools

import pytest

from nnunet_sam2.review.order import WEIGHTS, Rank, Signs, in_order, rank_case, reasons, unlikeness, worth_of

NAMES = {1: "liver", 2: "spleen"}


def test_worth_rises_with_every_sign_and_stays_between_nothing_and_one() -> None:
    assert worth_of(Signs(doubt=0.0)) == 0
    assert worth_of(Signs(doubt=1.0)) == 1
    levels = (None, 0.0, 0.3, 1.0)
    for name in WEIGHTS:
        for others in itertools.product(levels, repeat=3):
            fixed = dict(zip([n for n in WEIGHTS if n != name], others, strict=True))
            found = [worth_of(Signs(**fixed, **{name: level})) for level in (0.0, 0.2, 0.9)]
            assert found == sorted(found)
            assert all(0 <= worth <= 1 for worth in found)


def test_the_formula_is_the_one_that_is_documented() -> None:
    signs = Signs(doubt=0.4, change=0.2, disagreement=0.1, unlike=None)
    assert worth_of(signs) == pytest.approx(1 - 0.6 * 0.9 * 0.95)
    assert worth_of(Signs()) == pytest.approx(0.5)


def test_a_good_estimate_does_not_hide_a_label_that_moved_or_is_unlike_the_labelled_ones() -> None:
    quiet = Signs(doubt=0.1, change=0.0, unlike=0.0)
    assert worth_of(Signs(doubt=0.1, change=0.8, unlike=0.0)) > worth_of(quiet) + 0.3
    assert worth_of(Signs(doubt=0.1, change=0.0, unlike=0.9)) > worth_of(quiet) + 0.3


def test_a_volume_within_the_labelled_ones_is_like_them_and_twice_the_largest_is_not() -> None:
    assert unlikeness(5.0, [4.0, 6.0]) == 0
    assert unlikeness(12.0, [4.0, 6.0]) == pytest.approx(0.632, abs=0.001)
    assert unlikeness(2.0, [4.0, 6.0]) == pytest.approx(unlikeness(12.0, [4.0, 6.0]))
    assert unlikeness(60.0, [4.0, 6.0]) > 0.95
    assert unlikeness(5.0, []) is None


def test_a_case_is_worth_its_worst_open_class_and_says_why() -> None:
    rank = rank_case({1: Signs(doubt=0.1), 2: Signs(doubt=0.6, change=0.4)}, NAMES)
    assert rank.worst == 2
    assert rank.value == pytest.approx(1 - 0.4 * 0.8)
    assert rank.why == ("spleen: estimated Dice 0.40", "changed by 0.40 since the round before")
    assert rank_case({1: Signs(doubt=0.02)}, NAMES).why == ("liver: nothing stands out",)
    assert rank_case({}, NAMES) == Rank(value=0.0, by_class={}, worst=None, why=())


def test_missing_and_rejected_classes_with_a_newer_label_come_first_by_name() -> None:
    ranks = {
        "low": rank_case({1: Signs(doubt=0.9, change=0.5)}, NAMES),
        "again": rank_case({1: Signs(again=True)}, NAMES),
        "missing": rank_case({1: Signs(missing=True), 2: Signs(doubt=0.9)}, NAMES),
        "decided": rank_case({}, NAMES),
        "good": rank_case({1: Signs(doubt=0.05)}, NAMES),
    }
    assert in_order(ranks) == ["again", "missing", "low", "good", "decided"]
    assert reasons(Signs(again=True))[0][1] == "rejected before, and this is a newer label"
