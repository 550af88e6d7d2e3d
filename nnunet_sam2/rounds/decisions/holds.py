"""What people's word holds in a round: decisions about labels and human labels that came later, as of one moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunet_sam2.cohort.cohort import Addition, Case, Cohort, Role
from nnunet_sam2.rounds.decisions.record import CaseDecisions, standing
from nnunet_sam2.rounds.decisions.record import Line as DecisionLine


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


def holds_of(
    cohort: Cohort, lines: Sequence[DecisionLine], *, held_out_patients: frozenset[str]
) -> dict[str, CaseHold]:
    """Join decisions and human labels that came later, for the cases that a run labels.

    A human label is the last word on the classes that it answers for: decisions about them, made on machine labels,
    no longer count. Human labels of a patient who is validated on are not learnt from, and so not taken.
    """
    found = {}
    for case, human, _, decisions in said_of_cases(cohort, lines, held_out_patients=held_out_patients):
        hold = CaseHold(
            taken_out=decisions.taken_out,
            accepted=decisions.accepted,
            rejected=tuple(decisions.rejected),
            human=human,
        )
        if hold != CaseHold():
            found[case.case_id] = hold
    return found


def said_of_cases(
    cohort: Cohort, lines: Sequence[DecisionLine], *, held_out_patients: frozenset[str]
) -> Iterator[tuple[Case, Addition | None, frozenset[int], CaseDecisions]]:
    """Give each case that a run labels, its later human label, the classes drawn there, and the decisions on others."""
    decided = standing(lines)
    for case in cohort.cases:
        if case.as_planned.role is not Role.UNLABELLED:
            continue
        human = case.added if case.patient not in held_out_patients else None
        drawn = frozenset(human.classes or cohort.class_values) if human else frozenset()
        yield case, human, drawn, decided.get(case.case_id, CaseDecisions()).without(drawn)


def holds_to_json(holds: Holds) -> dict[str, Any]:
    """Return holds as a JSON value, the same for the same holds."""
    return {case_id: holds[case_id].to_json() for case_id in sorted(holds)}


def holds_from_json(value: Mapping[str, Any]) -> dict[str, CaseHold]:
    """Rebuild holds from `holds_to_json`."""
    return {case_id: CaseHold.from_json(hold) for case_id, hold in value.items()}
