"""What people's word holds in a round: decisions about labels and human labels that came later, as of one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.cohort.cohort import Addition, Case, Cohort, Role
from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.quality.trust import DOUBTED
from nnunet_sam2.rounds.decided_labels import freeze_classes, without_rejected
from nnunet_sam2.rounds.decisions import CaseDecisions, accepted_path, standing
from nnunet_sam2.rounds.decisions import Line as DecisionLine
from nnunet_sam2.storage import file_hash
from nnunet_sam2.volumes import read_label

TAKEN_OUT = "a person took it out"
ALL_REJECTED = "a person rejected every class of it"


@dataclass(frozen=True, kw_only=True)
class CaseHold:
    """Hold what people said of one case."""

    taken_out: bool = False
    accepted: Mapping[int, str] = field(default_factory=dict)
    """Class value to the hash of the label file that shows it."""
    rejected: tuple[int, ...] = ()
    human: Addition | None = None

    @property
    def whole_human(self) -> bool:
        """Return whether a person drew the whole label."""
        return self.human is not None and self.human.classes is None

    @property
    def settled(self) -> tuple[int, ...]:
        """Return the classes that a person drew or accepted."""
        drawn = self.human.classes or () if self.human else ()
        return tuple(sorted({*self.accepted, *drawn}))

    def settles(self, values: Sequence[int]) -> bool:
        """Say whether a person has settled every one of the classes ``values``."""
        return self.whole_human or set(self.settled) >= set(values)

    def to_json(self) -> dict[str, Any]:
        """Return the hold as a JSON value."""
        return {
            "taken_out": self.taken_out,
            "accepted": {str(value): label for value, label in self.accepted.items()},
            "rejected": list(self.rejected),
            "human": self.human and self.human.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CaseHold:
        """Rebuild a hold from `to_json`."""
        return cls(
            taken_out=value["taken_out"],
            accepted={int(k): label for k, label in value["accepted"].items()},
            rejected=tuple(value["rejected"]),
            human=Addition.from_json(value["human"]) if value["human"] else None,
        )


Holds = Mapping[str, CaseHold]
"""By case id; cases of which nobody said anything are absent."""


@dataclass(frozen=True, kw_only=True)
class Decided:
    """Hold a label after people's word, and what follows for the case."""

    label_zyx: np.ndarray
    confidence_zyx: np.ndarray
    estimate: dict[int, float | None]
    left_out: str | None
    distrusted: tuple[int, ...]


def holds_of(
    cohort: Cohort, lines: Sequence[DecisionLine], *, held_out_patients: frozenset[str]
) -> dict[str, CaseHold]:
    """Join decisions and human labels that came later, for the cases that a run labels.

    A human label is the last word on the classes that it answers for: decisions about them, made on machine labels,
    no longer count. Human labels of a patient who is validated on are not learnt from, and so not taken.
    """
    decided = standing(lines)
    found = {}
    for case in cohort.cases:
        if case.as_planned.role is not Role.UNLABELLED:
            continue
        human = case.added if case.patient not in held_out_patients else None
        decisions = decided.get(case.case_id, CaseDecisions())
        answered = set(cohort.class_values if human and human.classes is None else (human and human.classes) or ())
        hold = CaseHold(
            taken_out=decisions.taken_out,
            accepted={value: label for value, label in decisions.accepted.items() if value not in answered},
            rejected=tuple(value for value in decisions.rejected if value not in answered),
            human=human,
        )
        if hold != CaseHold():
            found[case.case_id] = hold
    return found


def holds_to_json(holds: Holds) -> dict[str, Any]:
    """Return holds as a JSON value, the same for the same holds."""
    return {case_id: holds[case_id].to_json() for case_id in sorted(holds)}


def holds_from_json(value: Mapping[str, Any]) -> dict[str, CaseHold]:
    """Rebuild holds from `holds_to_json`."""
    return {case_id: CaseHold.from_json(hold) for case_id, hold in value.items()}


def decide(
    case: Case,
    hold: CaseHold,
    *,
    run: Path,
    cohort: Cohort,
    label_zyx: np.ndarray,
    confidence_zyx: np.ndarray,
    prob_czyx: np.ndarray,
    estimate: Mapping[int, float | None],
    left_out: str | None,
    distrusted: Sequence[int],
) -> Decided:
    """Apply people's word to a case's fused label; raise `InputError` where a file that they saw is gone or changed."""
    values = cohort.class_values
    if hold.human is not None and hold.whole_human:
        human_zyx = _read(case, cohort.root / hold.human.label, hold.human.sha256)
        return Decided(
            label_zyx=human_zyx,
            confidence_zyx=np.ones(human_zyx.shape, np.float32),
            estimate=dict.fromkeys(values),
            left_out=TAKEN_OUT if hold.taken_out else None,
            distrusted=(),
        )
    masks = _masks(case, hold, run=run, cohort=cohort)
    settled_zyx = np.zeros(label_zyx.shape, bool)
    if masks:
        label_zyx, confidence_zyx = freeze_classes(label_zyx, confidence_zyx, prob_czyx, values, masks)
        drawn = np.sum(list(masks.values()), axis=0)
        # Labels of two rounds were accepted that contradict each other: neither is believed there.
        confidence_zyx[drawn > 1] = 0.0
        settled_zyx = drawn == 1
    if hold.rejected:
        confidence_zyx = without_rejected(
            label_zyx, confidence_zyx, prob_czyx, values, hold.rejected, doubted=DOUBTED, keep_zyx=settled_zyx
        )
    if masks:
        left_out = None
    if set(hold.rejected) >= set(values):
        left_out = ALL_REJECTED
    if hold.taken_out:
        left_out = TAKEN_OUT
    failed = {*distrusted, *hold.rejected} - set(masks)
    drawn_by_hand = set(hold.human.classes or ()) if hold.human else set()
    return Decided(
        label_zyx=label_zyx,
        confidence_zyx=confidence_zyx,
        estimate={value: None if value in drawn_by_hand else dice for value, dice in estimate.items()},
        left_out=left_out,
        distrusted=() if left_out else tuple(sorted(failed)),
    )


def _masks(case: Case, hold: CaseHold, *, run: Path, cohort: Cohort) -> dict[int, np.ndarray]:
    masks = {}
    files: dict[str, np.ndarray] = {}
    for value, label in hold.accepted.items():
        if label not in files:
            files[label] = _read(case, accepted_path(run, case.case_id, label, cohort.file_ending), label)
        masks[value] = files[label] == value
    if hold.human is not None and hold.human.classes:
        human_zyx = _read(case, cohort.root / hold.human.label, hold.human.sha256)
        masks |= {value: human_zyx == value for value in hold.human.classes}
    return dict(sorted(masks.items()))


def _read(case: Case, path: Path, expected: str) -> np.ndarray:
    if not path.is_file() or file_hash(path) != expected:
        raise InputError(
            f"{path}, a label of case {case.case_id} that a person accepted or drew, is missing or was changed; "
            "restore it, or decide about the case anew with nnunet_sam2 review"
        )
    label_zyx, geometry = read_label(path)
    if difference := case.geometry.mismatch(geometry):
        raise InputError(f"{path} and the image of case {case.case_id} differ in {difference}; restore the file")
    return label_zyx
