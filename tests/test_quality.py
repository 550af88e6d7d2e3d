"""Estimated Dice: what is seen of a pseudo-label, what is made of it, and how far the bounds hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.special import expit

from nnunet_sam2.labelling.member import PseudoLabel
from nnunet_sam2.labelling.quality.calibration import Calibration, Pair, bound_among, bound_rank, proven_coverage
from nnunet_sam2.labelling.quality.coverage import check_coverage
from nnunet_sam2.labelling.quality.features import CaseFeatures, Features, confidence_features, member_features
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.quality.record import calibration_of, quality_record, read_estimates, read_features

CLASSES = (1, 2)


def _features(level: float, **changes: object) -> Features:
    values: dict = {
        "voxels": 100,
        "shown_in": 1.0,
        "reverse": {"a": level, "b": level + 0.05},
        "agreement": {"a": level},
        "inside": level,
        "stability": level,
        **changes,
    }
    return Features(**values)


def _pairs(count: int, rng: np.random.Generator, *, noise: float = 0.3) -> list[Pair]:
    """Cases whose Dice follows their features, with an offset a class and noise in logits."""
    pairs = []
    for number in range(count):
        features: CaseFeatures = {}
        dice: dict[int, float | None] = {}
        for value in CLASSES:
            level = float(expit(rng.normal(0.0, 1.0)))
            features[value] = _features(
                level,
                inside=float(expit(rng.normal(0.0, 1.0))),
                stability=min(1.0, level + 0.02),
            )
            truth = np.log(level / (1 - level)) + 0.5 * (value - 1.5) + rng.normal(0.0, noise)
            dice[value] = float(expit(truth))
        pairs.append(Pair(case_id=f"case{number:03d}", features=features, dice=dice))
    return pairs


def _calibration(pairs: list[Pair], **options: float) -> Calibration:
    return Calibration(class_values=CLASSES, pairs=tuple(pairs), options=QualityOptions(**options))  # type: ignore[arg-type]


def test_a_sure_and_compact_label_has_better_confidence_features_than_a_vague_one() -> None:
    label_zyx = np.zeros((1, 8, 8), np.uint8)
    label_zyx[0, 2:6, 2:6] = 1
    sure = np.where(label_zyx == 1, 0.9, 0.1)
    vague = np.where(label_zyx == 1, 0.55, 0.45)
    sharp = confidence_features(label_zyx, np.stack([1 - sure, sure]), 1, 1)
    blurred = confidence_features(label_zyx, np.stack([1 - vague, vague]), 1, 1)
    assert (sharp["inside"], sharp["rim"], sharp["stability"]) == (pytest.approx(0.9), pytest.approx(0.9), 1.0)
    assert blurred["inside"] == pytest.approx(0.55)
    # Sixteen sure voxels; all sixty-four are possible.
    assert blurred["stability"] == pytest.approx(2 * 16 / (16 + 64))


def test_a_ragged_label_is_less_smooth_than_a_round_one_of_the_same_size() -> None:
    z, y, x = np.ogrid[:12, :12, :12]
    ball_zyx = ((z - 6) ** 2 + (y - 6) ** 2 + (x - 6) ** 2 <= 16).astype(np.uint8)
    torn_zyx = np.random.default_rng(0).permuted(ball_zyx, axis=0)
    found = [confidence_features(m, np.stack([1.0 - m, m]), 1, 1)["smoothness"] for m in (ball_zyx, torn_zyx)]
    assert found[0] > 0.85
    assert found[1] < 0.8
    # In one slice nothing can follow on, and a round picture is smooth.
    assert confidence_features(ball_zyx[6:7], np.stack([1.0 - ball_zyx[6:7], ball_zyx[6:7]]), 1, 1)["smoothness"] > 0.85


def test_what_is_frayed_has_little_core_and_the_edge_of_the_volume_is_no_border() -> None:
    full_zyx = np.ones((4, 6, 6), np.uint8)
    holed_zyx = full_zyx.copy()
    holed_zyx[::2, ::2, ::2] = 0
    full, holed = (confidence_features(m, np.stack([1.0 - m, m]), 1, 1)["core"] for m in (full_zyx, holed_zyx))
    assert full == 1.0
    assert holed < 0.7


def test_sams_own_iou_is_found_wherever_strategies_record_it() -> None:
    members = [
        {"name": "insert", "classes": {"1": {"estimated_iou": 0.5}, "2": {"absent_in_all_supports": True}}},
        {"name": "guided", "slices": [{"classes": {"1": {"iou": [0.1, 0.7]}}}, {"classes": [1]}]},
        {"name": "refine", "prompts": [{"pieces": [{"class": 1, "iou": [0.2, 0.9]}, {"class": 2, "iou": []}]}]},
        {"name": "transfer", "prompts": None, "supports_agree": {"1": 0.6, "2": None}},
        {"name": "transfer along another axis", "supports_agree": {"1": 0.8, "2": None}},
    ]
    record = {"members": members, "agreement": {"1": 0.8, "2": None}}
    empty = np.zeros((1, 2, 2))
    pseudo = PseudoLabel(label_zyx=empty, confidence_zyx=empty, prob_czyx=empty[None], record=record)
    found = member_features(pseudo, CLASSES)
    assert found[1] == {"members": 0.8, "supports": pytest.approx(0.7), "sam_iou": pytest.approx(0.7)}
    assert found[2] == {"members": None, "supports": None, "sam_iou": None}


def test_estimates_follow_the_dice_of_labelled_cases() -> None:
    rng = np.random.default_rng(0)
    calibration, new = _calibration(_pairs(8, rng)), _pairs(40, rng)
    assert calibration.calibrated
    found = [(calibration.estimate(p.features)[v].dice, p.dice[v]) for p in new for v in CLASSES]
    estimated, true = np.array(found, float).T
    assert np.corrcoef(estimated, true)[0, 1] > 0.85
    assert np.abs(estimated - true).mean() < 0.12


def test_no_feature_can_come_to_speak_against_what_it_stands_for() -> None:
    rng = np.random.default_rng(1)
    pairs = [
        Pair(case_id=str(i), features={1: _features(0.5, inside=0.95 - 0.09 * i)}, dice={1: 0.1 + 0.09 * i})
        for i in range(9)
    ]
    slopes = _calibration(pairs).slopes()
    assert slopes["inside"] == 0
    assert min(slopes.values()) >= 0
    rng.shuffle(pairs)  # type: ignore[arg-type]
    assert _calibration(pairs).slopes() == slopes


@pytest.mark.parametrize("cases", [0, 1])
def test_with_fewer_than_two_labelled_cases_estimates_say_that_they_are_not_calibrated(cases: int) -> None:
    calibration = _calibration(_pairs(cases, np.random.default_rng(2)))
    good = calibration.estimate({1: _features(0.9), 2: _features(0.3)})
    assert not calibration.calibrated
    assert not good[1].calibrated
    assert good[1].lower is None
    assert (good[1].dice or 0) > (good[2].dice or 0) + 0.2


def test_without_a_calibration_shape_counts_by_what_it_is_in_the_labelled_cases_own_labels() -> None:
    thick = {"smoothness": 0.95, "core": 0.7}
    thin = {"smoothness": 0.8, "core": 0.2}
    both = {1: _features(0.8, typical=thick, **thick), 2: _features(0.8, typical=thin, **thin)}
    found = _calibration([]).estimate(both)
    assert found[1].dice == pytest.approx(found[2].dice)
    frayed = _calibration([]).estimate({**both, 2: _features(0.8, typical=thin, smoothness=0.7, core=0.1)})
    assert (frayed[2].dice or 0) < (frayed[1].dice or 0) - 0.02
    # With labelled cases the class has a level of its own, learnt from them: what is typical changes nothing more.
    calibration = _calibration(_pairs(4, np.random.default_rng(2)))
    told, untold = ({2: _features(0.8, typical=typical, **thin)} for typical in (thin, {}))
    assert calibration.estimate(told) == calibration.estimate(untold)


def test_a_class_that_was_not_found_is_missed_where_all_labelled_cases_show_it_and_unknown_elsewhere() -> None:
    calibration = _calibration(_pairs(4, np.random.default_rng(3)))
    found = calibration.estimate({1: Features(voxels=0, shown_in=1.0), 2: Features(voxels=0, shown_in=0.75)})
    assert found[1].dice == 0.0
    assert found[2].dice is None


def test_what_went_wrong_with_one_class_lowers_the_others() -> None:
    calibration = _calibration(_pairs(6, np.random.default_rng(4)))
    beside_good = calibration.estimate({1: _features(0.7), 2: _features(0.9)})[1].dice
    beside_bad = calibration.estimate({1: _features(0.7), 2: _features(0.2)})[1].dice
    assert (beside_good or 0) > (beside_bad or 0)


def test_a_feature_that_some_rows_lack_does_not_stop_the_estimate() -> None:
    pairs = _pairs(5, np.random.default_rng(5))
    lacking = {v: dataclasses.replace(f, reverse={}, agreement={}) for v, f in pairs[0].features.items()}
    pairs[0] = dataclasses.replace(pairs[0], features=lacking)
    assert 0 < (_calibration(pairs).estimate(lacking)[1].dice or 0) < 1


def test_lower_bounds_hold_as_often_as_they_promise() -> None:
    rng, held, target = np.random.default_rng(6), [], 0.8
    for _ in range(40):
        calibration, new = _calibration(_pairs(9, rng), coverage=target), _pairs(5, rng)
        for pair in new:
            estimate = calibration.estimate(pair.features)[1]
            assert estimate.coverage == pytest.approx(target)
            assert (estimate.lower or 0) <= (estimate.dice or 0)
            held.append((estimate.lower or 0) <= (pair.dice[1] or 0))
    # 200 bounds: five standard errors below the promise would be 0.66.
    assert 0.72 < np.mean(held) < 0.95


def test_bounds_of_few_cases_promise_what_few_cases_allow() -> None:
    rng = np.random.default_rng(7)
    estimate = _calibration(_pairs(3, rng), coverage=0.9).estimate(_pairs(1, rng)[0].features)[1]
    assert estimate.coverage == pytest.approx(0.75)
    assert [bound_rank(n, 0.9) for n in (3, 9, 18, 19, 29)] == [1, 1, 1, 2, 3]


def test_bounds_say_what_is_proven_beside_what_is_typical() -> None:
    rng = np.random.default_rng(7)
    estimate = _calibration(_pairs(3, rng)).estimate(_pairs(1, rng)[0].features)[1]
    assert (estimate.coverage, estimate.proven) == (0.75, 0.5)
    assert [proven_coverage(held) for held in (0.9, 0.5, 0.3)] == [pytest.approx(0.8), 0.0, 0.0]


@pytest.mark.parametrize("patients", [1, 2, 3, 9, 10, 19, 29])
def test_with_a_case_a_patient_the_bound_is_the_candidate_of_its_rank(patients: int) -> None:
    candidates = np.random.default_rng(patients).permutation(patients).astype(float)
    rank = bound_rank(patients, 0.9)
    found = bound_among([(c, 1.0) for c in candidates], patients, 0.9)
    assert found == (rank - 1.0, pytest.approx(1.0 - rank / (patients + 1)))
    # Each case twice is no more knowledge.
    twice = [(c, 0.5) for c in candidates for _ in range(2)]
    assert bound_among(twice, patients, 0.9) == (found[0], pytest.approx(found[1]))


def _scans(patients: int, scans: int, rng: np.random.Generator) -> list[Pair]:
    """Cases whose Dice lies off their features by what their patient has, and by little of their own."""
    pairs = []
    for patient in range(patients):
        off = rng.normal(0.0, 1.0)
        for pair in _pairs(scans, rng, noise=0.1):
            dice = {v: float(expit(np.log(d / (1 - d)) + off)) for v, d in pair.dice.items() if d is not None}
            case_id = f"p{patient}_{pair.case_id}"
            pairs.append(dataclasses.replace(pair, case_id=case_id, patient=f"p{patient}", dice=dice))
    return pairs


def test_bounds_of_several_scans_a_patient_hold_for_new_patients_and_those_by_case_do_not() -> None:
    rng = np.random.default_rng(11)
    held: dict[str, list[bool]] = {"patient": [], "case": []}
    promised = {}
    for _ in range(70):
        pairs, new = _scans(2, 6, rng), _scans(1, 1, rng)[0]
        for name in held:
            known = pairs if name == "patient" else [dataclasses.replace(pair, patient=None) for pair in pairs]
            estimate = _calibration(known, coverage=0.9).estimate(new.features)[1]
            promised[name] = estimate.coverage
            held[name].append((estimate.lower or 0) <= (new.dice[1] or 0))
    assert promised == {"patient": 0.6667, "case": pytest.approx(1 - 1 / 13, abs=1e-4)}
    # 70 bounds: two standard errors are 0.1.
    assert np.mean(held["patient"]) >= 0.6667 - 0.1
    assert np.mean(held["case"]) < promised["case"] - 0.1  # type: ignore[operator]


def test_another_scan_of_a_patient_has_no_say_in_its_estimate() -> None:
    pairs = _scans(3, 2, np.random.default_rng(12))
    before = _calibration(pairs).leave_one_out()
    changed = [dataclasses.replace(pairs[0], dice={1: 0.01, 2: 0.01}), *pairs[1:]]
    after = _calibration(changed).leave_one_out()
    assert before[pairs[1].case_id] == after[pairs[1].case_id]
    assert before[pairs[2].case_id] != after[pairs[2].case_id]


def test_two_scans_of_one_patient_calibrate_nothing() -> None:
    pairs = _scans(1, 2, np.random.default_rng(13))
    calibration = _calibration(pairs)
    assert not calibration.calibrated
    assert calibration.estimate(pairs[0].features)[1].lower is None


def test_a_labelled_case_of_no_use_at_all_gives_a_bound_of_nothing() -> None:
    pairs = _pairs(4, np.random.default_rng(8))
    pairs[2] = dataclasses.replace(pairs[2], dice={1: 0.0, 2: pairs[2].dice[2]})
    found = _calibration(pairs).estimate(pairs[0].features)
    assert found[1].lower == 0.0
    assert (found[2].lower or 0) > 0.0


def test_a_labelled_case_is_estimated_without_itself() -> None:
    pairs = _pairs(5, np.random.default_rng(9))
    before = _calibration(pairs).leave_one_out()["case000"]
    changed = [dataclasses.replace(pairs[0], dice={1: 0.01, 2: 0.01}), *pairs[1:]]
    assert _calibration(changed).leave_one_out()["case000"] == before


def test_coverage_is_held_against_what_chance_allows() -> None:
    check = check_coverage([0.5] * 10, [0.6] * 7 + [0.4] * 3, calibration_patients=9, coverage=0.9)
    assert (check.held, check.count, check.rate, check.target) == (7, 10, 0.7, 0.9)
    assert check.kept
    assert not check_coverage([0.5] * 10, [0.4] * 9 + [0.6], calibration_patients=9, coverage=0.9).kept
    with pytest.raises(ValueError, match="at least one"):
        check_coverage([], [], calibration_patients=9, coverage=0.9)


def test_a_record_gives_back_what_went_into_it() -> None:
    rng = np.random.default_rng(10)
    pairs = _pairs(4, rng)
    records = [
        {
            "case": pair.case_id,
            "dice_with_human_label": {str(v): d for v, d in pair.dice.items()},
            "quality": quality_record(pair.features, None),
        }
        for pair in reversed(pairs)
    ]
    assert read_estimates(records[0]) == {}
    calibration = calibration_of(records, CLASSES)
    assert [pair.case_id for pair in calibration.pairs] == [pair.case_id for pair in pairs]
    new = _pairs(1, rng)[0].features
    record = {"quality": quality_record(new, calibration)}
    assert read_features(record) == new
    expected = _calibration(pairs).estimate(new)
    assert read_estimates(record) == {v: pytest.approx(expected[v].dice, abs=1e-6) for v in CLASSES}


@pytest.mark.parametrize("wrong", [{"references": 0}, {"slices": 0}, {"calibration_cases": -1}, {"coverage": 1.0}])
def test_options_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        QualityOptions(**wrong)
