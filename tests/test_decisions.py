"""People's decisions: kept line by line, folded into what stands, and applied to a round's label."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nnunet_sam2.cohort.cohort import ADDED_LABELS, Addition, Cohort, Role
from nnunet_sam2.errors import InputError
from nnunet_sam2.rounds.decisions.holds import CaseHold, holds_of
from nnunet_sam2.rounds.decisions.labels import (
    ALL_REJECTED,
    TAKEN_OUT,
    Decided,
    decide,
    freeze_classes,
    without_rejected,
)
from nnunet_sam2.rounds.decisions.record import (
    CaseDecisions,
    Decision,
    DecisionFile,
    accepted_path,
    decisions_path,
    read_decisions,
    standing,
)
from nnunet_sam2.storage import file_hash
from nnunet_sam2.volumes import write_label


def _decided(run: Path) -> dict[str, CaseDecisions]:
    return standing(read_decisions(decisions_path(run)))


def test_the_last_word_counts_and_undo_takes_it_back(tmp_path: Path) -> None:
    with DecisionFile(tmp_path) as file:
        file.append(Decision.ACCEPT, case_id="a", classes=(1, 2), label="one")
        file.append(Decision.REJECT, case_id="a", classes=(2,), label="two")
        file.append(Decision.TAKE_OUT, case_id="b")
        assert _decided(tmp_path) == {
            "a": CaseDecisions(accepted={1: "one"}, rejected={2: "two"}),
            "b": CaseDecisions(taken_out=True),
        }
        last = file.last_that_counts
        assert last is not None
        file.append(Decision.UNDO, undoes=last.number)
        assert set(_decided(tmp_path)) == {"a"}
        last = file.last_that_counts
        assert last is not None
        assert last.number == 2
        file.append(Decision.UNDO, undoes=last.number)
        assert _decided(tmp_path) == {"a": CaseDecisions(accepted={1: "one", 2: "one"})}
        file.append(Decision.CLEAR, case_id="a", classes=(1, 2))
        assert _decided(tmp_path) == {}


def test_to_accept_a_class_brings_a_case_back_that_was_taken_out(tmp_path: Path) -> None:
    with DecisionFile(tmp_path) as file:
        file.append(Decision.REJECT, case_id="a", classes=(2,), label="x")
        file.append(Decision.TAKE_OUT, case_id="a")
        assert _decided(tmp_path)["a"].taken_out
        file.append(Decision.ACCEPT, case_id="a", classes=(1,), label="x")
    assert _decided(tmp_path) == {"a": CaseDecisions(accepted={1: "x"}, rejected={2: "x"})}


def test_a_line_cut_short_is_no_decision_and_a_changed_one_is_refused_with_its_number(tmp_path: Path) -> None:
    with DecisionFile(tmp_path) as file:
        for name in "abc":
            file.append(Decision.TAKE_OUT, case_id=name)
    path = decisions_path(tmp_path)
    whole = path.read_bytes()
    for cut in (1, 2, 40, 150):
        path.write_bytes(whole[:-cut])
        assert set(_decided(tmp_path)) == {"a", "b"}
    with DecisionFile(tmp_path) as file:
        file.append(Decision.TAKE_OUT, case_id="d")
    assert set(_decided(tmp_path)) == {"a", "b", "d"}
    for spoilt in (
        whole.replace(b'"case": "b"', b'"case": "z"'),
        whole.split(b"\n", 1)[1],
        whole.replace(b"{", b"[", 1),
    ):
        path.write_bytes(spoilt)
        with pytest.raises(InputError, match=r"line [12], is not what was written"):
            read_decisions(path)


def test_one_process_at_a_time_decides_about_a_run(tmp_path: Path) -> None:
    with DecisionFile(tmp_path), pytest.raises(InputError, match="being reviewed by another process"):
        DecisionFile(tmp_path)
    DecisionFile(tmp_path).__exit__()


def _probabilities(label_zyx: np.ndarray, second: int, sure: float) -> np.ndarray:
    """Three channels: ``sure`` for the label, most of the rest for ``second``."""
    prob = np.full((3, *label_zyx.shape), 0.0, np.float32)
    for channel in range(3):
        prob[channel][label_zyx == channel] = sure
    prob[second] += 0.75 * (1 - sure)
    prob[(second + 1) % 3] += 0.25 * (1 - sure)
    return prob / prob.sum(axis=0)


def test_an_accepted_class_stays_where_it_was_seen_and_is_nowhere_else() -> None:
    label = np.array([[[1, 1, 0, 2, 2, 0]]], np.uint8)
    confidence = np.full(label.shape, 0.25, np.float32)
    seen = np.array([[[False, True, True, False, False, False]]])
    new, trusted = freeze_classes(label, confidence, _probabilities(label, 2, 0.6), (1, 2), {1: seen})
    np.testing.assert_array_equal(new, [[[2, 1, 1, 2, 2, 0]]])
    np.testing.assert_array_equal(trusted[0, 0, 1:3], 1)
    np.testing.assert_array_equal(trusted[0, 0, 3:], 0.25)
    # Voxel 0 lost its class to class 2, which has three quarters of what is left there.
    assert trusted[0, 0, 0] == pytest.approx(0.75, abs=0.01)
    np.testing.assert_array_equal(label, [[[1, 1, 0, 2, 2, 0]]])


def test_where_every_class_is_accepted_nothing_is_in_doubt() -> None:
    label = np.array([[[1, 1, 0, 2]]], np.uint8)
    masks = {1: label == 2, 2: np.zeros(label.shape, bool)}
    prob = _probabilities(label, 2, 0.9)
    new, trusted = freeze_classes(label, np.zeros(label.shape, np.float32), prob, (1, 2), masks)
    np.testing.assert_array_equal(new, [[[0, 0, 0, 1]]])
    np.testing.assert_array_equal(trusted, 1)


def test_a_rejected_class_teaches_nothing_where_it_is_or_may_be_but_what_was_accepted_stays() -> None:
    label = np.array([[[1, 0, 0, 2]]], np.uint8)
    prob = np.zeros((3, 1, 1, 4), np.float32)
    prob[1] = [[[0.9, 0.2, 0.05, 0.3]]]
    kept = label == 2
    trusted = without_rejected(label, np.ones(label.shape), prob, (1, 2), {1}, doubted=0.1, keep_zyx=kept)
    np.testing.assert_array_equal(trusted, [[[0, 0, 1, 1]]])


@pytest.fixture
def case_and_run(cohort: Cohort, tmp_path: Path) -> tuple[Cohort, Path, str]:
    """A cohort, a run with one accepted label file, and its hash."""
    case = cohort.unlabelled[0]
    label = np.zeros(case.geometry.shape_zyx, np.uint8)
    label[2:6, 5:15, 5:15] = 1
    label[2:6, 20:30, 20:30] = 2
    write_label(tmp_path / "seen.nii.gz", label, case.geometry)
    seen = file_hash(tmp_path / "seen.nii.gz")
    kept = accepted_path(tmp_path, case.case_id, seen, ".nii.gz")
    kept.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "seen.nii.gz", kept)
    return cohort, tmp_path, seen


def _decide(cohort: Cohort, run: Path, hold: CaseHold, **more: object) -> Decided:
    case = cohort.unlabelled[0]
    label = np.zeros(case.geometry.shape_zyx, np.uint8)
    label[2:6, 5:15, 5:18] = 1
    values: dict = {"left_out": "its estimated Dice is too low", "distrusted": (1, 2), **more}
    return decide(
        case,
        hold,
        run=run,
        cohort=cohort,
        label_zyx=label,
        confidence_zyx=np.zeros(label.shape, np.float32),
        prob_czyx=_probabilities(label, 0, 0.9),
        estimate={1: 0.1, 2: 0.2},
        **values,
    )


def test_what_was_accepted_is_learnt_although_its_estimate_is_low(case_and_run: tuple[Cohort, Path, str]) -> None:
    cohort, run, seen = case_and_run
    decided = _decide(cohort, run, CaseHold(accepted={1: seen}))
    assert decided.left_out is None
    assert decided.distrusted == (2,)
    assert (decided.label_zyx == 1).sum() == 4 * 10 * 10
    assert decided.confidence_zyx[decided.label_zyx == 1].min() == 1
    assert decided.estimate == {1: 0.1, 2: 0.2}


def test_rejected_and_taken_out_are_reasons_by_name(case_and_run: tuple[Cohort, Path, str]) -> None:
    cohort, run, seen = case_and_run
    assert _decide(cohort, run, CaseHold(rejected=(1, 2))).left_out == ALL_REJECTED
    assert _decide(cohort, run, CaseHold(taken_out=True, accepted={1: seen})).left_out == TAKEN_OUT
    one = _decide(cohort, run, CaseHold(rejected=(1,)), left_out=None, distrusted=())
    assert (one.left_out, one.distrusted) == (None, (1,))


def test_an_accepted_file_that_is_gone_or_changed_stops_the_round_by_name(
    case_and_run: tuple[Cohort, Path, str],
) -> None:
    cohort, run, seen = case_and_run
    path = accepted_path(run, cohort.unlabelled[0].case_id, seen, ".nii.gz")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match="accepted or drew, is missing or was changed"):
        _decide(cohort, run, CaseHold(accepted={1: seen}))


def test_what_a_person_marked_as_not_to_be_judged_is_not_learnt_as_the_classs_absence(
    case_and_run: tuple[Cohort, Path, str],
) -> None:
    cohort, run, _ = case_and_run
    cohort = replace(cohort, root=run, labels={**cohort.labels, "ignore": 3})
    case = cohort.unlabelled[0]
    mine = np.zeros(case.geometry.shape_zyx, np.uint8)
    mine[2:6, 5:15, 5:10], mine[2:6, 5:15, 10:15] = 1, 3
    write_label(run / "mine.nii.gz", mine, case.geometry)
    added = Addition(
        label="mine.nii.gz", sha256=file_hash(run / "mine.nii.gz"), time="2026-01-01", source="x.nii.gz", classes=(1,)
    )
    decided = _decide(cohort, run, CaseHold(human=added), left_out=None, distrusted=())
    np.testing.assert_array_equal(decided.label_zyx == 1, mine == 1)
    np.testing.assert_array_equal(decided.label_zyx == 3, mine == 3)


def test_a_human_label_outranks_decisions_and_is_not_taken_of_a_patient_who_is_validated_on(cohort: Cohort) -> None:
    first, second = cohort.unlabelled
    added = Addition(label=f"{ADDED_LABELS}/x.nii.gz", sha256="ab", time="2026-01-01", source="x.nii.gz", classes=(1,))
    cases = tuple(replace(c, added=added) if c.case_id == first.case_id else c for c in cohort.cases)
    partly = replace(cohort, cases=cases)
    lines = []
    for number, classes in enumerate(((1, 2), ()), start=1):
        from nnunet_sam2.rounds.decisions.record import Line

        decision = Decision.ACCEPT if classes else Decision.TAKE_OUT
        case_id = first.case_id if classes else second.case_id
        lines.append(Line(number=number, decision=decision, time=0, case_id=case_id, classes=classes, label="h"))
    holds = holds_of(partly, lines, held_out_patients=frozenset())
    assert holds == {
        first.case_id: CaseHold(accepted={2: "h"}, human=added),
        second.case_id: CaseHold(taken_out=True),
    }
    held_out = holds_of(partly, lines, held_out_patients=frozenset({first.patient}))
    assert held_out[first.case_id] == CaseHold(accepted={1: "h", 2: "h"})
    whole = replace(first, role=Role.LABELLED, label=added.label, added=replace(added, classes=None))
    assert whole.as_planned == replace(first, added=whole.added)
