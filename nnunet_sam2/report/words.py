"""What people have said of each case by now: what they drew, what they decided, and what that leaves to look at."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.rounds.decisions.holds import said_of_cases
from nnunet_sam2.rounds.decisions.record import CaseDecisions, Line


class Said(str, Enum):
    """Name what people's word makes of a case."""

    DRAWN = "drawn by hand"
    ACCEPTED = "accepted"
    PARTLY = "accepted in part"
    REJECTED = "rejected"
    TAKEN_OUT = "taken out"


@dataclass(frozen=True, kw_only=True)
class CaseWord:
    """Hold what people said of one case, as of now; it may be more than what held in the newest labels."""

    drawn: frozenset[int] = frozenset()
    """The classes that a person drew: every one where the whole label is a person's."""
    whole: bool = False
    """Whether these are all the classes that there are."""
    decisions: CaseDecisions = field(default_factory=CaseDecisions)
    """What was decided about the others."""

    def again(self, value: int, label: str | None) -> bool:
        """Say whether a class was rejected, and its label has changed since to the one with the hash ``label``."""
        return self.decisions.rejected.get(value) not in (None, label)

    def settles(self, value: int, label: str | None) -> bool:
        """Say whether nothing is left to say of a class of the label with the hash ``label``."""
        decided = value in self.decisions.accepted or value in self.decisions.rejected
        return value in self.drawn or (decided and not self.again(value, label))

    def said(self, shown: Collection[int]) -> Said:
        """Name what it makes of a case whose label shows the classes ``shown``, or lacks them without a reason."""
        kept = self.drawn | self.decisions.accepted.keys()
        if self.decisions.taken_out:
            return Said.TAKEN_OUT
        if self.whole:
            return Said.DRAWN
        if kept:
            return Said.ACCEPTED if kept >= set(shown) else Said.PARTLY
        return Said.REJECTED


def words_of(cohort: Cohort, lines: Sequence[Line], *, held_out_patients: frozenset[str]) -> dict[str, CaseWord]:
    """Join decisions and human labels that came later, as `holds_of` does, for the cases that people spoke of."""
    every = frozenset(cohort.class_values)
    found = {}
    for case, _, drawn, decisions in said_of_cases(cohort, lines, held_out_patients=held_out_patients):
        if drawn or decisions:
            found[case.case_id] = CaseWord(drawn=drawn, whole=drawn == every, decisions=decisions)
    return found
