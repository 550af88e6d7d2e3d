"""A round's labels: SAM 2 and student fused by their quality, held against the labels of the round before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import FusionOptions, fuse_sources
from nnunet_sam2.labelling.job import CONFIDENCE
from nnunet_sam2.labelling.leave_one_out import DiceTable
from nnunet_sam2.labelling.quality.calibration import Calibration
from nnunet_sam2.labelling.quality.features import CaseFeatures
from nnunet_sam2.labelling.quality.trust import fused_estimate, judge, spread_quality, trusted_confidence
from nnunet_sam2.progress import track
from nnunet_sam2.rounds.decisions.holds import CaseHold, Holds
from nnunet_sam2.rounds.decisions.labels import decide
from nnunet_sam2.rounds.ending.convergence import Change, class_change, summarise_change
from nnunet_sam2.storage import write_json
from nnunet_sam2.support.library import PROBABILITIES, read_probabilities
from nnunet_sam2.volumes import read_label, write_label, write_map

SAM2, STUDENT = "sam2", "student"

CONFIDENT = 0.5
"""Confidence from which on a voxel is called confident: it weighs at least half as much as one of a human label."""


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Hold a round's pseudo-labels and how they came about."""

    folder: Path
    """Holds ``CASE<ending>`` and ``confidence/CASE<ending>``."""
    used_cases: tuple[str, ...]
    """Cases that the round trains on."""
    left_out: dict[str, str]
    """Cases that it does not train on, with the reason."""
    change: Change | None
    quality: dict[str, dict[int, float]]
    """Estimated Dice a source and class over the cohort, which weighted the fusion of cases without their own."""
    voxels: dict[str, dict[int, int]]
    confidence: dict[str, float]
    """Mean confidence of a case over the voxels that are not certain background."""
    confident: dict[str, float] = field(default_factory=dict)
    """Share of these voxels with a confidence of `CONFIDENT` or more."""
    estimates: dict[str, DiceTable] = field(default_factory=dict)
    """Estimated Dice of every case and class of the fused labels; None where nothing is known."""
    distrusted: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Classes of used cases whose estimate is below the least: none of their voxels is learnt from."""
    human_cases: tuple[str, ...] = ()
    """Used cases whose whole label a person drew after the dataset was made; the trainer counts them as labelled."""
    drawn: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Classes that a person drew: every one where the whole label is a person's. The sources have no part in them."""
    accepted: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Classes that stay as a person accepted them; the sources have no part in them either."""
    digest: str = ""

    def files(self, file_ending: str) -> tuple[Path, ...]:
        """Return all label and confidence files."""
        names = [f"{case}{file_ending}" for case in sorted([*self.used_cases, *self.left_out])]
        return tuple(path for name in names for path in (self.folder / name, self.folder / CONFIDENCE / name))

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON value; JSON wants text as keys."""
        change = self.change
        return {
            "used_cases": list(self.used_cases),
            "left_out": self.left_out,
            "change": change
            and {"mean": change.mean, "worst_tenth": change.worst_tenth, "by_case": _text_keys(change.by_case)},
            "quality": _text_keys(self.quality),
            "voxels": _text_keys(self.voxels),
            "confidence": self.confidence,
            "confident": self.confident,
            "estimates": _text_keys(self.estimates),
            "distrusted": {name: list(values) for name, values in self.distrusted.items()},
            "human_cases": list(self.human_cases),
            "drawn": {name: list(values) for name, values in self.drawn.items()},
            "accepted": {name: list(values) for name, values in self.accepted.items()},
        }

    @classmethod
    def from_json(cls, folder: Path, value: Mapping[str, Any], *, digest: str) -> Fused:
        """Rebuild the record from `to_json`."""
        change = value["change"]
        return cls(
            folder=folder,
            used_cases=tuple(value["used_cases"]),
            left_out=dict(value["left_out"]),
            change=change
            and Change(by_case=_int_keys(change["by_case"]), mean=change["mean"], worst_tenth=change["worst_tenth"]),
            quality=_int_keys(value["quality"]),
            voxels=_int_keys(value["voxels"]),
            confidence=dict(value["confidence"]),
            confident=dict(value.get("confident", {})),
            estimates=_int_keys(value.get("estimates", {})),
            distrusted={name: tuple(values) for name, values in value.get("distrusted", {}).items()},
            human_cases=tuple(value.get("human_cases", ())),
            drawn={name: tuple(values) for name, values in value.get("drawn", {}).items()},
            accepted={name: tuple(values) for name, values in value.get("accepted", {}).items()},
            digest=digest,
        )


def estimate_student_quality(
    *,
    sam2_quality: Mapping[int, float],
    validation: Mapping[int, float],
    validation_cases: int,
    agreement: Mapping[int, float],
) -> dict[int, float]:
    """Estimate the student's Dice on unlabelled cases, a class.

    What is known without a held-out label: where it agrees with SAM 2 it is right at least as often as SAM 2 is. So its
    Dice with SAM 2's labels, times theirs with the truth, is a cautious guess, which counts as one validation case
    among those that there are. (Agreement by itself took the student for as good as its teacher; divided by SAM 2's
    quality, for better.)
    """
    quality = {}
    for value, agreed in agreement.items():
        guess = agreed * sam2_quality[value]
        known = validation.get(value)
        quality[value] = guess if known is None else (validation_cases * known + guess) / (validation_cases + 1)
    return quality


def fuse_cases(
    cohort: Cohort,
    *,
    sam2: Path,
    student: Path | None,
    student_probabilities: Path | None,
    sam2_quality: Mapping[int, float],
    validation: Mapping[int, float],
    validation_cases: int,
    out: Path,
    previous: Path | None,
    sam2_estimates: Mapping[str, DiceTable] | None = None,
    student_seen: Mapping[str, CaseFeatures] | None = None,
    calibration: Calibration | None = None,
    least_quality: float = 0.0,
    holds: Holds | None = None,
    run: Path | None = None,
) -> Fused:
    """Fuse the sources of every unlabelled case into ``out`` and compare with the labels in ``previous``.

    ``sam2`` and ``student`` hold label maps (and ``sam2/probabilities``); ``student_probabilities`` holds the
    student's probabilities, or what SAM 2 made of them when prompted with its predictions.

    ``sam2_estimates`` holds the estimated Dice of SAM 2's labels by case and class; ``student_seen`` what was seen of
    the student's, whose known level ``calibration`` then spreads over the cases. Where there is such an estimate, it
    stands in place of the cohort's in the weights, and the case's confidence is scaled by what comes out. A class whose
    fused estimate is below ``least_quality`` is not learnt from in that case, and a case all of whose classes are so is
    left out.

    ``holds`` is people's word, which outranks all of this: `rounds.decisions.labels.decide` applies it to the fused
    label. ``run`` is the folder with the labels that were accepted.
    """
    values = cohort.class_values
    human = [read_label(cohort.label_path(case))[0] for case in cohort.labelled]
    options = FusionOptions(single_component_classes=single_component_classes(human, values))
    ending = cohort.file_ending
    by_case = {SAM2: sam2_estimates} if sam2_estimates else {}
    quality: dict[str, dict[int, float]] = {SAM2: {v: sam2_quality.get(v, 0.5) for v in values}}
    if student is not None:
        agreement = mean_dice_by_class(cohort, cohort.unlabelled, student, reference=sam2)
        quality[STUDENT] = estimate_student_quality(
            sam2_quality=quality[SAM2],
            validation=validation,
            validation_cases=validation_cases,
            agreement={v: agreement.get(v, 0.0) for v in values},
        )
        if student_seen and calibration is not None:
            by_case[STUDENT] = spread_quality(quality[STUDENT], student_seen, calibration)

    changes: dict[str, dict[int, float]] = {}
    voxels: dict[str, dict[int, int]] = {}
    confidence: dict[str, float] = {}
    confident: dict[str, float] = {}
    left_out: dict[str, str] = {}
    estimates: dict[str, DiceTable] = {}
    distrusted: dict[str, tuple[int, ...]] = {}
    drawn: dict[str, tuple[int, ...]] = {}
    accepted: dict[str, tuple[int, ...]] = {}
    for case in track(cohort.unlabelled, what="fusing labels"):
        name = case.case_id
        sources = {SAM2: read_probabilities(sam2 / PROBABILITIES / f"{name}.npz")}
        if student_probabilities is not None:
            sources[STUDENT] = read_probabilities(student_probabilities / f"{name}.npz")
        own = {source: _of_case(quality[source], by_case.get(source, {}).get(name)) for source in sources}
        fused = fuse_sources(sources, values, quality=own, options=options)
        label_zyx, trusted_zyx = fused.label_zyx, fused.confidence_zyx
        voxels[name] = _count(label_zyx, values)
        in_doubt_zyx = fused.confidence_zyx < 0.99
        reason: str | None = None
        failed: tuple[int, ...] = ()
        if any(name in table for table in by_case.values()):
            weights = {source: _weights(fused.record["sources"][source]) for source in sources}
            verdict = judge(fused_estimate(own, weights, voxels[name]), least_quality)
            trusted_zyx = trusted_confidence(trusted_zyx, fused.label_zyx, fused.prob_czyx, values, verdict)
            estimates[name] = {v: None if d is None else round(d, 4) for v, d in verdict.estimate.items()}
            reason, failed = verdict.reason, verdict.failed
        hold = (holds or {}).get(name, CaseHold())
        if hold != CaseHold():
            decided = decide(
                case,
                hold,
                run=run or out,
                cohort=cohort,
                label_zyx=label_zyx,
                confidence_zyx=trusted_zyx,
                prob_czyx=fused.prob_czyx,
                estimate=estimates.get(name, {}),
                left_out=reason,
                distrusted=failed,
            )
            label_zyx, trusted_zyx = decided.label_zyx, decided.confidence_zyx
            voxels[name], estimates[name] = _count(label_zyx, values), decided.estimate
            reason, failed = decided.left_out, decided.distrusted
            if hold.human is not None:
                drawn[name] = tuple(sorted(hold.human.classes or values))
            if kept := set(hold.accepted) - set(drawn.get(name, ())):
                accepted[name] = tuple(sorted(kept))
        if reason:
            left_out[name] = reason
        elif failed:
            distrusted[name] = failed
        doubtful = (label_zyx > 0) | in_doubt_zyx
        write_label(out / f"{name}{ending}", label_zyx, case.geometry)
        write_map(out / CONFIDENCE / f"{name}{ending}", trusted_zyx, case.geometry)
        weights_of_doubtful = trusted_zyx[doubtful]
        confidence[name] = round(float(weights_of_doubtful.mean()), 4) if doubtful.any() else 1.0
        confident[name] = round(float((weights_of_doubtful >= CONFIDENT).mean()), 4) if doubtful.any() else 1.0
        # A person who has settled every class has seen that there is nothing.
        if not any(voxels[name].values()) and name not in left_out and not hold.settles(values):
            left_out[name] = "its label is empty: nnU-Net would learn it as background"
            distrusted.pop(name, None)
        if previous is not None:
            before, _ = read_label(previous / f"{name}{ending}")
            changes[name] = class_change(before, label_zyx, values)
    used = tuple(c.case_id for c in cohort.unlabelled if c.case_id not in left_out)
    result = Fused(
        folder=out,
        used_cases=used,
        human_cases=tuple(name for name in used if (holds or {}).get(name, CaseHold()).whole_human),
        left_out=left_out,
        change=summarise_change(changes) if previous is not None else None,
        quality=quality,
        voxels=voxels,
        confidence=confidence,
        confident=confident,
        estimates=estimates,
        distrusted=distrusted,
        drawn=drawn,
        accepted=accepted,
    )
    write_json(out / "round.json", result.to_json())
    return result


def mean_dice_by_class(
    cohort: Cohort, cases: Sequence[Case], folder: Path, *, reference: Path | None = None
) -> dict[int, float]:
    """Compute the mean Dice a class of the label maps in ``folder`` with ``reference``, or with the human labels.

    A class counts in a case where either side has it and the human label answers for it; voxels with the ignore label
    count nowhere.
    """
    dices: dict[int, list[float]] = {}
    for case in cases:
        name = f"{case.case_id}{cohort.file_ending}"
        mine, _ = read_label(folder / name)
        other, _ = read_label(reference / name if reference else cohort.label_path(case))
        if cohort.ignore_value is not None:
            judged = (other != cohort.ignore_value) & (mine != cohort.ignore_value)
            mine, other = mine * judged, other * judged
        known = [value for value in cohort.class_values if reference or case.answers_for(value)]
        for value, changed in class_change(other, mine, known).items():
            dices.setdefault(value, []).append(1.0 - changed)
    return {value: float(np.mean(found)) for value, found in sorted(dices.items())}


def _of_case(cohort: Mapping[int, float], case: DiceTable | None) -> DiceTable:
    """Return a case's own estimates; classes that they do not name have the cohort's."""
    return {value: dice if case is None or value not in case else case[value] for value, dice in cohort.items()}


def _count(label_zyx: np.ndarray, values: Sequence[int]) -> dict[int, int]:
    return {v: int((label_zyx == v).sum()) for v in values}


def _weights(record: Mapping[str, Any]) -> dict[int, float]:
    return {int(value): weight for value, weight in record["weights"].items()}


def _text_keys(table: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {str(key): item for key, item in row.items()} for name, row in table.items()}


def _int_keys(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[int, Any]]:
    return {name: {int(key): item for key, item in row.items()} for name, row in table.items()}
