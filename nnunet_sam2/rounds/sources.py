"""What is known of a round's sources before they are fused: how good each is, and how sure it may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.labelling.fusion import as_probability, normalised
from nnunet_sam2.labelling.leave_one_out import DiceTable, dice_by_class, mean_dice
from nnunet_sam2.labelling.quality.features import CaseFeatures
from nnunet_sam2.labelling.quality.trust import spread_quality
from nnunet_sam2.labelling.temperature import at_temperature, fit_temperature, shrunk_temperature
from nnunet_sam2.rounds.support_labels import SupportLabels
from nnunet_sam2.support.library import PROBABILITIES, read_probabilities
from nnunet_sam2.volumes import read_label

SAM2, STUDENT = "sam2", "student"

_MOST_COMPARED = 16
"""Unlabelled cases by which a student is made as sure as SAM 2's labels allow."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Hold a round's sources, by name: `SAM2` and, where there is one, `STUDENT`."""

    probabilities: Mapping[str, Path]
    """Folders with ``CASE.npz`` for every unlabelled case."""
    quality: Mapping[str, dict[int, float]]
    """Estimated Dice of each class over the cohort."""
    by_case: Mapping[str, Mapping[str, DiceTable]] = field(default_factory=dict)
    """Estimated Dice of a case and class, where there is such an estimate."""
    temperatures: Mapping[str, float] = field(default_factory=dict)
    right: Mapping[int, float] = field(default_factory=dict)
    """Share of each class's disagreement between the sources in which SAM 2 is right."""
    held_out: int = 0
    """Patients with human labels that the student has not learnt from."""


@dataclass(frozen=True, kw_only=True)
class StudentLabels:
    """Hold a student's predictions."""

    folder: Path
    """Predictions of the unlabelled cases and of those held out, with their probabilities."""
    probabilities: Path
    """What stands for the student in the fusion: its own, or what SAM 2 made of them when prompted with them."""
    held_out: Sequence[str]
    """Labelled cases that it has not learnt from."""
    seen: Mapping[str, CaseFeatures]


def weigh_sources(cohort: Cohort, sam2: SupportLabels, student: StudentLabels | None) -> Sources:
    """Find out what the sources are worth on labels that neither has learnt from, and where there are none, without."""
    values = cohort.class_values
    quality = {SAM2: {v: sam2.quality.get(v, 0.5) for v in values}}
    by_case = {SAM2: sam2.estimates} if sam2.estimates else {}
    labelled = [cohort.case(case_id) for case_id in sam2.checked]
    fits = _by_patient((c, human_temperature(cohort, c, sam2.labelled)) for c in labelled)
    temperatures = {SAM2: shrunk_temperature([np.exp(np.mean(np.log(found))) for found in fits])}
    if student is None:
        return Sources(
            probabilities={SAM2: sam2.folder / PROBABILITIES},
            quality=quality,
            by_case=by_case,
            temperatures=temperatures,
        )
    expected = mean_dice([sam2.estimates[c.case_id] for c in cohort.unlabelled if c.case_id in sam2.estimates], values)
    level = {v: quality[SAM2][v] if (dice := expected[v]) is None else dice for v in values}
    agreement = mean_dice_by_class(cohort, cohort.unlabelled, student.folder, reference=sam2.folder)
    held_out = [cohort.case(case_id) for case_id in student.held_out]
    measured = shares_right(cohort, [c for c in held_out if c in labelled], sam2.labelled, student.folder)
    agreed = {v: agreement.get(v, 0.0) for v in values}
    right = {v: share_right(level[v], agreed[v], measured.get(v, ())) for v in values}
    quality[STUDENT] = {v: student_dice(level[v], agreed[v], right[v]) for v in values}
    if student.seen:
        by_case[STUDENT] = spread_quality(quality[STUDENT], student.seen, sam2.calibration)
    blamed = float(np.mean([share_right(level[v], agreed[v], ()) for v in values]))
    default = _agreed_temperature(cohort, sam2.folder, temperatures[SAM2], student.folder) ** blamed
    fits = _by_patient((c, human_temperature(cohort, c, student.folder)) for c in held_out)
    temperatures[STUDENT] = shrunk_temperature([np.exp(np.mean(np.log(found))) for found in fits], default)
    return Sources(
        probabilities={SAM2: sam2.folder / PROBABILITIES, STUDENT: student.probabilities},
        quality=quality,
        by_case=by_case,
        temperatures=temperatures,
        right=right,
        held_out=len(fits),
    )


def share_right(sam2_dice: float, agreement: float, measured: Sequence[float]) -> float:
    """Estimate in what share of its disagreement with the student about a class SAM 2 is right.

    ``measured`` are shares seen on held-out patients. What is known without any counts as one patient more: SAM 2 can
    be wrong in no more than all of its errors, so that its share lies between 1 - errors / disagreement and 1; the
    middle is taken, but never less than a half. (With errors = 1 - Dice and disagreement = 1 - agreement.)
    """
    errors, disagreement = 1.0 - sam2_dice, 1.0 - agreement
    unseen = 0.5 if disagreement <= errors else 1.0 - 0.5 * errors / disagreement
    return (sum(measured) + unseen) / (len(measured) + 1)


def student_dice(sam2_dice: float, agreement: float, sam2_right: float) -> float:
    """Estimate the student's Dice of a class from SAM 2's, their agreement, and who is right where they differ.

    Where they agree both are right or both are wrong. So the student's errors are SAM 2's, more by where SAM 2 is
    right and less by where it is wrong; a student that is right more often is better than its teacher.
    """
    return float(np.clip(sam2_dice - (2.0 * sam2_right - 1.0) * (1.0 - agreement), 0.0, 1.0))


def shares_right(cohort: Cohort, cases: Sequence[Case], sam2: Path, student: Path) -> dict[int, list[float]]:
    """Measure on human labels in what share of their disagreement SAM 2 is right, by class, a value a patient."""
    shares: dict[int, dict[str, list[float]]] = {}
    for case in cases:
        human_zyx, _ = read_label(cohort.label_path(case))
        judged_zyx = human_zyx != (-1 if cohort.ignore_value is None else cohort.ignore_value)
        mine, theirs = (read_label(folder / f"{case.case_id}{cohort.file_ending}")[0] for folder in (sam2, student))
        for value in filter(case.answers_for, cohort.class_values):
            differ_zyx = ((mine == value) != (theirs == value)) & judged_zyx
            if total := int(np.count_nonzero(differ_zyx)):
                right = int(np.count_nonzero(((mine == value) == (human_zyx == value)) & differ_zyx))
                shares.setdefault(value, {}).setdefault(case.patient, []).append(right / total)
    return {value: [float(np.mean(found)) for found in rows.values()] for value, rows in shares.items()}


def human_temperature(cohort: Cohort, case: Case, labels: Path) -> float:
    """Fit the temperature of the probabilities beside ``labels`` on a case's human label."""
    prob_czyx = normalised(as_probability(read_probabilities(labels / PROBABILITIES / f"{case.case_id}.npz")))
    return fit_temperature(prob_czyx, human_channels(cohort, case))


def human_channels(cohort: Cohort, case: Case) -> np.ndarray:
    """Return a case's human label as channels, int32: 0 background, then the classes; -1 where nothing was judged.

    Where the label does not answer for some class, its background may be that class.
    """
    label_zyx, _ = read_label(cohort.label_path(case))
    answers = all(map(case.answers_for, cohort.class_values))
    channels_zyx = np.full(label_zyx.shape, 0 if answers else -1, np.int32)
    for k, value in enumerate(cohort.class_values, start=1):
        channels_zyx[label_zyx == value] = k
    if cohort.ignore_value is not None:
        channels_zyx[label_zyx == cohort.ignore_value] = -1
    return channels_zyx


def mean_dice_by_class(
    cohort: Cohort, cases: Sequence[Case], folder: Path, *, reference: Path | None = None
) -> dict[int, float]:
    """Compute the mean Dice a class of the label maps in ``folder`` with ``reference``, or with the human labels.

    A class counts in a case where either side has it and the human label answers for it; voxels with the ignore label
    count nowhere.
    """
    tables = []
    for case in cases:
        name = f"{case.case_id}{cohort.file_ending}"
        mine, _ = read_label(folder / name)
        other, _ = read_label(reference / name if reference else cohort.label_path(case))
        if cohort.ignore_value is not None:
            other = np.where(mine == cohort.ignore_value, cohort.ignore_value, other)
        known = [value for value in cohort.class_values if reference or case.answers_for(value)]
        tables.append(dice_by_class(mine, other, known, ignore_value=cohort.ignore_value))
    means = mean_dice(tables, cohort.class_values)
    return {value: dice for value, dice in means.items() if dice is not None}


def _agreed_temperature(cohort: Cohort, sam2: Path, sam2_temperature: float, student: Path) -> float:
    """Fit the student's temperature on SAM 2's labels of unlabelled cases, as sure as those are."""
    cases = cohort.unlabelled[:: -(-len(cohort.unlabelled) // _MOST_COMPARED)]
    found = []
    for case in cases:
        maps = [
            normalised(as_probability(read_probabilities(folder / PROBABILITIES / f"{case.case_id}.npz")))
            for folder in (sam2, student)
        ]
        sure_czyx = at_temperature(maps[0], sam2_temperature)
        found.append(fit_temperature(maps[1], maps[0].argmax(axis=0), sure_czyx=sure_czyx))
    return float(np.exp(np.mean(np.log(found))))


def _by_patient(found: Iterable[tuple[Case, Any]]) -> list[list[Any]]:
    rows: dict[str, list[Any]] = {}
    for case, value in found:
        rows.setdefault(case.patient, []).append(value)
    return list(rows.values())
