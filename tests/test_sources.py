"""What the sources of a round are worth, and how sure they may be: with held-out labels and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from known_sources import VALUES, make_source, true_label

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.labelling.fusion import as_probability, normalised
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.quality.calibration import Calibration
from nnunet_sam2.labelling.temperature import LEAST, MOST, at_temperature, fit_temperature, shrunk_temperature
from nnunet_sam2.rounds.sources import (
    SAM2,
    STUDENT,
    StudentLabels,
    human_channels,
    share_right,
    shares_right,
    student_dice,
    weigh_sources,
)
from nnunet_sam2.rounds.support_labels import SupportLabels
from nnunet_sam2.support.library import PROBABILITIES, write_probabilities
from nnunet_sam2.volumes import read_label, write_label


def test_a_temperature_undoes_what_made_a_source_too_bold_or_too_timid() -> None:
    # Right as often as it says: the truth is drawn from the probabilities.
    rng = np.random.default_rng(0)
    organ_zyx = np.broadcast_to(np.linspace(0.02, 0.98, 24), (8, 24, 24))
    truth_zyx = (rng.random(organ_zyx.shape) < organ_zyx).astype(np.int32)
    calibrated_czyx = np.stack([1 - organ_zyx, organ_zyx])
    for factor in (0.5, 1.0, 2.0):
        said_czyx = at_temperature(calibrated_czyx, factor)
        assert fit_temperature(said_czyx, truth_zyx) == pytest.approx(1 / factor, rel=0.15)
    sure_czyx = fit_temperature(at_temperature(calibrated_czyx, 0.5), truth_zyx, sure_czyx=calibrated_czyx)
    assert sure_czyx == pytest.approx(2.0, rel=0.15)


def test_a_temperature_is_bounded_and_nothing_to_fit_on_leaves_a_source_as_it_is() -> None:
    truth_zyx = np.zeros((4, 8, 8), np.int32)
    truth_zyx[1:3, 2:5, 2:5] = 1
    right = np.stack([truth_zyx == 0, truth_zyx == 1]).astype(np.float32)
    assert fit_temperature(right, truth_zyx) == pytest.approx(LEAST)
    assert fit_temperature(right[::-1], truth_zyx) == pytest.approx(MOST)
    assert fit_temperature(np.stack([np.ones((2, 3, 3)), np.zeros((2, 3, 3))]), np.zeros((2, 3, 3), np.int32)) == 1.0
    assert fit_temperature(right, np.full_like(truth_zyx, -1)) == 1.0


def test_few_patients_move_a_temperature_little() -> None:
    assert shrunk_temperature([]) == 1.0
    assert shrunk_temperature([4.0]) == pytest.approx(2.0)
    assert shrunk_temperature([4.0] * 9) == pytest.approx(4**0.9)
    assert shrunk_temperature([], default=1.5) == pytest.approx(1.5)


def test_a_student_that_is_right_where_it_differs_is_better_than_its_teacher_and_one_that_is_wrong_is_worse() -> None:
    assert student_dice(0.8, 0.85, 0.2) == pytest.approx(0.89)
    assert student_dice(0.8, 0.85, 0.5) == pytest.approx(0.8)
    assert student_dice(0.8, 0.85, 1.0) == pytest.approx(0.65)


def test_without_held_out_labels_a_student_is_as_good_as_its_teacher_or_as_its_agreement_with_it() -> None:
    assert student_dice(0.8, 0.9, share_right(0.8, 0.9, ())) == pytest.approx(0.8)
    assert student_dice(0.8, 0.5, share_right(0.8, 0.5, ())) == pytest.approx(0.5)
    # Each patient counts as much as what is known without any.
    assert share_right(0.8, 0.9, [0.0]) == pytest.approx(0.25)
    assert share_right(0.8, 0.9, [0.0, 0.2, 0.1]) == pytest.approx(0.2)


@pytest.mark.parametrize("student_is", ["slight wobble", "wobble", "shift", "dilation", "islands"])
def test_the_students_estimate_is_true_on_sources_of_known_quality_above_its_teachers_and_below(
    student_is: str,
) -> None:
    """SAM 2's Dice, their agreement, and who is right in some of the patients give the student's Dice."""
    rng = np.random.default_rng(2)
    rows = []
    for _ in range(10):
        truth = true_label(rng)
        mine, theirs = (make_source(truth, c, "well calibrated", rng).argmax(axis=0) for c in ("wobble", student_is))
        differ = ((mine == 1) != (theirs == 1)).nonzero()
        right = float(((mine == 1) == (truth == 1))[differ].mean())
        dices = [dice_by_class(a, b, (1,))[1] or 0.0 for a, b in ((mine, truth), (theirs, truth), (mine, theirs))]
        rows.append((*dices, right))
    teacher, student, agreement, _ = np.mean(rows, axis=0)
    shown = [right for *_, right in rows[:7]]
    estimated = student_dice(teacher, agreement, share_right(teacher, agreement, shown))
    assert estimated == pytest.approx(student, abs=0.1)
    if abs(student - teacher) > 0.1:
        assert (estimated > teacher) == (student > teacher)


def _labels(cohort: Cohort, folder: Path, corruption: str, boldness: str, seed: int) -> Path:
    """Write labels and probabilities for all cases, corrupted from what stands for their truth."""
    rng = np.random.default_rng(seed)
    for case in (*cohort.labelled, *cohort.unlabelled):
        truth = _truth(cohort, case.case_id)
        prob_czyx = make_source(truth, corruption, boldness, rng)
        label = prob_czyx.argmax(axis=0).astype(np.uint8)
        write_label(folder / f"{case.case_id}{cohort.file_ending}", label, case.geometry)
        write_probabilities(folder / PROBABILITIES / f"{case.case_id}.npz", normalised(as_probability(prob_czyx)))
    return folder


def _truth(cohort: Cohort, case_id: str) -> np.ndarray:
    case = cohort.case(case_id)
    if case in cohort.labelled:
        return read_label(cohort.label_path(case))[0]
    return read_label(cohort.label_path(cohort.labelled[0]))[0]


@pytest.mark.parametrize("held_out", [True, False])
def test_a_better_and_bolder_student_is_found_to_be_both_where_a_label_is_held_out_and_guarded_where_none_is(
    cohort: Cohort, tmp_path: Path, held_out: bool
) -> None:
    assert cohort.class_values == VALUES
    sam2 = _labels(cohort, tmp_path / "sam2", "dilation", "under-confident", 0)
    student = _labels(cohort, tmp_path / "student", "slight wobble", "over-confident", 1)
    labelled = tuple(case.case_id for case in cohort.labelled)
    supports = SupportLabels(
        folder=sam2,
        labelled=sam2,
        checked=labelled,
        quality={1: 0.7, 2: 0.5},
        estimates={},
        calibration=Calibration(class_values=VALUES),
        digest="",
    )
    alone = weigh_sources(cohort, supports, None)
    assert set(alone.probabilities) == {SAM2}
    assert alone.temperatures[SAM2] != 1.0
    predicted = StudentLabels(
        folder=student, probabilities=student / PROBABILITIES, held_out=labelled if held_out else (), seen={}
    )
    both = weigh_sources(cohort, supports, predicted)
    assert both.temperatures[SAM2] == alone.temperatures[SAM2]
    assert both.temperatures[STUDENT] > 1.0
    for value in VALUES:
        if held_out:
            assert both.right[value] < 0.4
            assert both.quality[STUDENT][value] > both.quality[SAM2][value] + 0.05
        else:
            assert both.right[value] >= 0.5
            assert both.quality[STUDENT][value] <= both.quality[SAM2][value]
    assert both.held_out == (len({case.patient for case in cohort.labelled}) if held_out else 0)


def test_who_is_right_is_measured_by_patient_and_where_somebody_judged(cohort: Cohort, tmp_path: Path) -> None:
    case = cohort.labelled[0]
    truth, _ = read_label(cohort.label_path(case))
    wrong = truth.copy()
    wrong[truth == 1] = 0
    for name, label in (("right", truth), ("wrong", wrong)):
        write_label(tmp_path / name / f"{case.case_id}{cohort.file_ending}", label, case.geometry)
    assert shares_right(cohort, [case], tmp_path / "right", tmp_path / "wrong") == {1: [1.0]}
    assert shares_right(cohort, [case], tmp_path / "wrong", tmp_path / "right") == {1: [0.0]}
    assert shares_right(cohort, [case, case], tmp_path / "wrong", tmp_path / "right") == {1: [0.0]}
    # A label that does not answer for the class says nothing of it, nor of what its background is.
    other = replace(case, annotated=(2,))
    assert shares_right(cohort, [other], tmp_path / "right", tmp_path / "wrong") == {}
    assert set(np.unique(human_channels(cohort, other))) == {-1, 1, 2}
