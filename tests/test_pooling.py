"""SAM 2 and the student pooled in log-odds: on sources of known quality the better one is followed."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from known_sources import BOLDNESS, CORRUPTIONS, VALUES, make_source, true_label

from nnunet_sam2.labelling.fusion import FusionOptions, as_probability, normalised
from nnunet_sam2.labelling.leave_one_out import DiceTable, dice_by_class, mean_dice
from nnunet_sam2.labelling.pooling import fuse_sources, source_weights
from nnunet_sam2.labelling.temperature import at_temperature, fit_temperature

SHAPE = (3, 4, 5)
PLAIN = FusionOptions(components="none")


def _sources() -> dict[str, np.ndarray]:
    """SAM 2 sees class 1 on the left half and class 2 nowhere; the student sees class 2 on the right."""
    sam2 = np.zeros((3, *SHAPE), np.float32)
    student = np.zeros((3, *SHAPE), np.float32)
    sam2[1, ..., :2], sam2[0, ..., 2:] = 0.8, 0.8
    sam2[0, ..., :2], sam2[2, ..., 2:] = 0.2, 0.2
    student[0, ..., :2], student[2, ..., 2:] = 0.8, 0.8
    student[1, ..., :2], student[0, ..., 2:] = 0.2, 0.2
    return {"sam2": sam2, "student": student}


def _dice(prob_or_label: np.ndarray, truth_zyx: np.ndarray) -> DiceTable:
    label_zyx = prob_or_label.argmax(axis=0) if prob_or_label.ndim == 4 else prob_or_label
    return dice_by_class(label_zyx, truth_zyx, VALUES)


def _fit(prob_czyx: np.ndarray, truth_zyx: np.ndarray) -> float:
    return fit_temperature(normalised(as_probability(prob_czyx)), truth_zyx)


def _mean(tables: list[DiceTable]) -> float:
    return float(np.mean([dice for dice in mean_dice(tables, VALUES).values() if dice is not None]))


def test_the_fused_label_follows_the_better_source_whatever_is_wrong_with_the_other_and_however_bold_it_is() -> None:
    rng = np.random.default_rng(0)
    truths = [true_label(rng) for _ in range(2)]
    made, quality, temperatures = {}, {}, {}
    for key in product(CORRUPTIONS, BOLDNESS):
        made[key] = [make_source(truth, *key, rng) for truth in truths]
        quality[key] = mean_dice([_dice(p, t) for p, t in zip(made[key], truths, strict=True)], VALUES)
        temperatures[key] = float(np.mean([_fit(p, t) for p, t in zip(made[key], truths, strict=True)]))
    gains = {}
    for n, ((corruption, bold), own) in enumerate(product(made, BOLDNESS)):
        if corruption == "slight wobble":
            continue
        # Whether the teacher is better or its student must make no difference.
        names = ("sam2", "student") if n % 2 else ("student", "sam2")
        keys = dict(zip(names, (("slight wobble", own), (corruption, bold)), strict=True))
        fused = [
            fuse_sources(
                {name: made[key][i] for name, key in keys.items()},
                VALUES,
                quality={name: quality[key] for name, key in keys.items()},
                temperatures={name: temperatures[key] for name, key in keys.items()},
                options=PLAIN,
            ).label_zyx
            for i in range(len(truths))
        ]
        best = max(_mean([quality[key]]) for key in keys.values())
        gains[corruption, bold, own] = _mean([_dice(f, t) for f, t in zip(fused, truths, strict=True)]) - best
    assert min(gains.values()) > -0.003, {key: round(gain, 4) for key, gain in gains.items() if gain < 0}
    assert np.mean(list(gains.values())) > 0.005


def test_an_over_confident_source_wins_no_border_by_its_boldness() -> None:
    rng = np.random.default_rng(1)
    truth_zyx = true_label(rng)
    fine, shifted = (make_source(truth_zyx, c, "well calibrated", rng) for c in ("slight wobble", "shift"))
    quality = {"sam2": _dice(fine, truth_zyx), "student": _dice(shifted, truth_zyx)}
    dices = []
    for factor in (1.0, 3.0):
        bold = at_temperature(normalised(as_probability(shifted)), 1.0 / factor)
        found = {"sam2": fine, "student": bold}
        temperatures = {name: _fit(prob_czyx, truth_zyx) for name, prob_czyx in found.items()}
        pooled = fuse_sources(found, VALUES, quality=quality, temperatures=temperatures, options=PLAIN)
        dices.append(_mean([_dice(pooled.label_zyx, truth_zyx)]))
    assert dices[1] == pytest.approx(dices[0], abs=0.01)
    assert min(dices) > _mean([quality["sam2"]]) - 0.003


def test_each_class_is_taken_from_the_source_that_is_better_at_it() -> None:
    quality = {"sam2": {1: 0.9, 2: 0.3}, "student": {1: 0.3, 2: 0.9}}
    fused = fuse_sources(_sources(), (1, 2), quality=quality, options=PLAIN)
    assert (fused.label_zyx[..., :2] == 1).all()
    assert (fused.label_zyx[..., 2:] == 2).all()
    worse = {"sam2": {1: 0.3, 2: 0.9}, "student": {1: 0.9, 2: 0.3}}
    assert not fuse_sources(_sources(), (1, 2), quality=worse, options=PLAIN).label_zyx.any()


def test_where_quality_is_equal_the_surer_source_wins_unless_it_is_known_to_be_too_sure() -> None:
    sources = _sources()
    sources["sam2"][1, ..., :2], sources["sam2"][0, ..., :2] = 0.99, 0.01
    quality: dict[str, DiceTable] = {"sam2": {1: 0.8, 2: 0.8}, "student": {1: 0.8, 2: 0.8}}
    assert (fuse_sources(sources, (1, 2), quality=quality).label_zyx[..., :2] == 1).all()
    calmed = fuse_sources(sources, (1, 2), quality=quality, temperatures={"sam2": 4.0}, options=PLAIN)
    assert not (calmed.label_zyx[..., :2] == 1).any()


def test_one_source_alone_keeps_its_label_and_is_as_sure_as_its_temperature_says() -> None:
    prob = _sources()["sam2"]
    fused = fuse_sources({"sam2": prob}, (1, 2), options=PLAIN)
    np.testing.assert_allclose(fused.prob_czyx, normalised(prob), atol=1 / 255)
    surer = fuse_sources({"sam2": prob}, (1, 2), temperatures={"sam2": 0.5}, options=PLAIN)
    np.testing.assert_array_equal(surer.label_zyx, fused.label_zyx)
    assert surer.prob_czyx[1, 0, 0, 0] == pytest.approx(0.8**2 / (0.8**2 + 0.2**2), abs=0.001)


def test_background_far_from_every_organ_stays_certain_at_any_temperature_and_with_many_classes() -> None:
    prob = np.zeros((14, *SHAPE), np.float32)
    prob[0] = 1.0
    fused = fuse_sources({"sam2": prob}, tuple(range(1, 14)), temperatures={"sam2": 4.0}, options=PLAIN)
    assert fused.prob_czyx[0].min() > 0.99


def test_stored_bytes_count_as_probabilities() -> None:
    prob = _sources()["sam2"]
    stored = np.round(prob * 255).astype(np.uint8)
    fused = fuse_sources({"sam2": stored}, (1, 2), options=PLAIN)
    np.testing.assert_allclose(fused.prob_czyx, prob, atol=1 / 255)


def test_sources_of_different_shape_and_more_than_two_are_refused() -> None:
    a, b = np.zeros((3, 1, 1, 1), np.float32), np.zeros((3, 1, 1, 2), np.float32)
    with pytest.raises(ValueError, match="differ in shape"):
        fuse_sources({"a": a, "b": b}, (1, 2))
    with pytest.raises(ValueError, match="one or two"):
        fuse_sources({"a": a, "b": a, "c": a}, (1, 2))


def test_a_source_weighs_by_the_share_of_the_disagreement_in_which_it_is_right() -> None:
    # Errors of 0.1 and 0.2 and a disagreement of 0.2: three quarters of it are the second's fault.
    weights = source_weights({"sam2": {1: 0.9}, "student": {1: 0.8}}, {1: 0.8}, (1,))
    mine, theirs = 0.75 * 0.9, 0.25 * 0.8
    np.testing.assert_allclose(weights["sam2"], [mine / (mine + theirs)], rtol=1e-6)
    np.testing.assert_allclose(weights["sam2"] + weights["student"], 1.0)


def test_more_disagreement_than_both_errors_explain_is_sooner_the_worse_sources_fault() -> None:
    expected, puzzling = (
        source_weights({"sam2": {1: 0.9}, "student": {1: 0.7}}, {1: agreed}, (1,))["sam2"][0] for agreed in (0.6, 0.1)
    )
    assert puzzling == expected > 0.75


def test_unknown_quality_counts_as_the_mean_of_what_is_known() -> None:
    weights = source_weights({"sam2": {1: 0.8, 2: None}, "student": {}}, {1: 0.5, 2: 0.5}, (1, 2))
    np.testing.assert_allclose(weights["sam2"], [0.5, 0.5])


def test_a_source_that_never_finds_a_class_has_no_say_in_it() -> None:
    weights = source_weights({"sam2": {1: 0.7}, "student": {1: 0.0}}, {1: 0.0}, (1,))
    np.testing.assert_allclose(weights["student"], [0.0])
