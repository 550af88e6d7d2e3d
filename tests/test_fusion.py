"""Fusion of members."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from nnunet_sam2.labelling.fusion import FusionOptions, confidence_of, fuse
from nnunet_sam2.labelling.member import Member

SHAPE = (3, 4, 5)


def _random_members(count: int, classes: int = 2, *, background: bool = False) -> list[Member]:
    rng = np.random.default_rng(7)
    members = []
    for i in range(count):
        prob = rng.random((classes, *SHAPE), dtype=np.float32)
        members.append(
            Member(
                name=f"m{i}",
                prob_kzyx=prob / 2,
                background_zyx=rng.random(SHAPE, dtype=np.float32) if background else None,
                record={"support": f"s{i}"},
            )
        )
    return members


def test_the_streamed_mean_is_the_mean_of_all_members() -> None:
    members = _random_members(5)
    fused = fuse(iter(members), (1, 2), FusionOptions(components="none"))
    mean = np.mean([m.prob_kzyx for m in members], axis=0)
    score = np.concatenate([1 - mean.max(axis=0, keepdims=True), mean])
    assert np.array_equal(fused.label_zyx, score.argmax(axis=0))
    np.testing.assert_allclose(fused.prob_czyx, score / score.sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(fused.prob_czyx.sum(axis=0), 1.0, rtol=1e-5)


def test_members_are_asked_for_one_at_a_time() -> None:
    alive: list[int] = []

    def stream() -> Iterator[Member]:
        for i, member in enumerate(_random_members(4)):
            alive.append(i)
            yield member

    fused = fuse(stream(), (1, 2))
    assert alive == [0, 1, 2, 3]
    assert [m["support"] for m in fused.record["members"]] == ["s0", "s1", "s2", "s3"]


def test_members_count_by_their_weight_class_by_class() -> None:
    low, high = np.full((2, *SHAPE), 0.1, np.float32), np.full((2, *SHAPE), 0.4, np.float32)
    background = np.full(SHAPE, 0.5, np.float32)
    members = [
        Member(name="a", prob_kzyx=low, background_zyx=background, weight_k=np.array([3.0, 0.0])),
        Member(name="b", prob_kzyx=high, background_zyx=1.5 * background, weight_k=np.array([1.0, 2.0])),
    ]
    fused = fuse(members, (3, 7))
    # Class 3: (3 * 0.1 + 0.4) / 4; class 7: b alone; background: weights 1.5 and 1.5.
    score = np.array([0.625, 0.175, 0.4])
    np.testing.assert_allclose(fused.prob_czyx[:, 0, 0, 0], score / score.sum(), rtol=1e-5)
    assert [m["weights"] for m in fused.record["members"]] == [{"3": 3.0, "7": 0.0}, {"3": 1.0, "7": 2.0}]


@pytest.mark.parametrize("background", [False, True])
def test_equal_weights_are_no_weights(background: bool) -> None:
    plain = _random_members(4, background=background)
    weighted = [dataclasses.replace(m, weight_k=np.full(2, 0.25)) for m in plain]
    np.testing.assert_allclose(fuse(weighted, (1, 2)).prob_czyx, fuse(plain, (1, 2)).prob_czyx, rtol=1e-5)


def test_weights_that_leave_a_class_without_a_member_are_refused() -> None:
    (member,) = _random_members(1)
    with pytest.raises(ValueError, match="no member counts"):
        fuse([dataclasses.replace(member, weight_k=np.array([1.0, 0.0]))], (1, 2))
    with pytest.raises(ValueError, match="weights"):
        dataclasses.replace(member, weight_k=np.array([1.0, -1.0]))


def test_a_class_wins_only_above_a_half_where_no_background_is_given() -> None:
    prob = np.zeros((2, *SHAPE), np.float32)
    prob[0] = 0.45
    prob[1] = 0.40
    assert not fuse([Member(name="a", prob_kzyx=prob)], (3, 7)).label_zyx.any()
    prob[1] = 0.55
    assert (fuse([Member(name="a", prob_kzyx=prob)], (3, 7)).label_zyx == 7).all()


@pytest.mark.parametrize(("background", "wins"), [(0.4, 0), (0.2, 3)])
def test_an_exact_tie_goes_to_the_background_and_then_to_the_lower_value(background: float, wins: int) -> None:
    prob = np.full((2, *SHAPE), 0.4, np.float32)
    members = [
        Member(name=f"m{i}", prob_kzyx=prob, background_zyx=np.full(SHAPE, background, np.float32)) for i in range(2)
    ]
    for order in (members, members[::-1]):
        assert (fuse(order, (3, 7)).label_zyx == wins).all()


def test_a_background_of_its_own_is_used_and_may_be_mixed_with_members_without() -> None:
    prob = np.full((1, *SHAPE), 0.4, np.float32)
    given = Member(name="a", prob_kzyx=prob, background_zyx=np.full(SHAPE, 0.3, np.float32))
    assert (fuse([given], (1,)).label_zyx == 1).all()
    without = Member(name="b", prob_kzyx=prob)
    for order in ([given, without], [without, given]):
        fused = fuse(order, (1,))
        np.testing.assert_allclose(fused.prob_czyx[0], 0.45 / 0.85, rtol=1e-5)


def test_members_of_different_shape_and_no_member_are_refused() -> None:
    odd = Member(name="odd", prob_kzyx=np.zeros((2, 1, 1, 1), np.float32))
    with pytest.raises(ValueError, match="odd"):
        fuse([*_random_members(1), odd], (1, 2))
    with pytest.raises(ValueError, match="no member"):
        fuse([], (1,))


def test_confidence_falls_from_one_to_nothing_at_a_half() -> None:
    p = np.array([1.0, 0.9, 0.75, 0.5, 0.2], np.float32)
    entropy = confidence_of(p)
    np.testing.assert_allclose(entropy, [1.0, 1 - 0.4689956, 1 - 0.8112781, 0.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(confidence_of(p, "margin"), [1.0, 0.8, 0.5, 0.0, 0.0], atol=1e-6)


def test_what_the_component_filter_moved_is_not_trusted() -> None:
    prob = np.zeros((1, 4, 12, 12), np.float32)
    prob[0, :, :6, :6] = 0.98
    prob[0, 1, 10, 10] = 0.98
    fused = fuse([Member(name="a", prob_kzyx=prob)], (1,), FusionOptions(components="largest"))
    assert fused.label_zyx[1, 10, 10] == 0
    assert fused.confidence_zyx[1, 10, 10] == 0
    assert fused.confidence_zyx[0, 0, 0] > 0.8
    assert fused.record["removed_by_component_filter"] == {"1": 1}


def test_auto_filters_only_classes_that_are_single_in_the_labelled_cases() -> None:
    options = FusionOptions(single_component_classes=(2,))
    assert options.keep((1, 2)) == {2: "largest"}
    assert FusionOptions(components="confident").keep((1, 2)) == {1: "confident", 2: "confident"}
    with pytest.raises(ValueError, match="choose"):
        FusionOptions(components="biggest")  # type: ignore[arg-type]


def test_agreement_is_full_for_equal_members_and_lower_for_different_ones() -> None:
    prob = np.zeros((1, *SHAPE), np.float32)
    prob[0, :, :2] = 0.9
    same = fuse([Member(name="a", prob_kzyx=prob), Member(name="b", prob_kzyx=prob)], (1,))
    assert same.record["agreement"] == {"1": 1.0}
    other = fuse([Member(name="a", prob_kzyx=prob), Member(name="b", prob_kzyx=prob * 0.2)], (1,))
    assert other.record["agreement"]["1"] < 1.0


def test_labels_above_255_are_kept() -> None:
    prob = np.full((1, *SHAPE), 0.9, np.float32)
    label_zyx = fuse([Member(name="a", prob_kzyx=prob)], (300,)).label_zyx
    assert label_zyx.dtype == np.uint16
    assert (label_zyx == 300).all()
