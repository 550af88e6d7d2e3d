"""Which of people's words hold in which round: as the ledger has it, and what came since."""

from __future__ import annotations

from typing import Any

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.progress import say
from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.decisions.holds import CaseHold, Holds, holds_from_json, holds_of, holds_to_json
from nnunet_sam2.rounds.decisions.record import decisions_path, read_decisions
from nnunet_sam2.rounds.ledger import REVIEWED


class RoundReview:
    """Say what holds in each round of a run; a round whose labels are made keeps what they were made with.

    The ledger gets a ``review`` event before the first round in which something new holds, with all that holds from
    then on and with the decisions that were new. So a run that is repeated, after a kill or to continue, goes through
    the same rounds with the same labels.
    """

    def __init__(self, run: RunContext) -> None:
        self.run = run

    def of(self, number: int) -> Holds:
        """Return what holds in round ``number``, and enter it into the ledger where that is new."""
        known = self._recorded(number)
        if self._made(number) or self._later(number):
            return known
        now, lines = self._now()
        if now != known:
            entered = max((e.get("lines", 0) for e in self._events()), default=0)
            new = [
                {"time": x.time, "decision": x.decision.value, "case": x.case_id, "classes": list(x.classes)}
                for x in lines[entered:]
            ]
            say(f"round {number}: people's word on {len(now)} cases holds from here on")
            self.run.ledger.append(REVIEWED, round=number, holds=holds_to_json(now), decisions=new, lines=len(lines))
        return now

    def more_after(self, number: int) -> bool:
        """Say whether something holds after round ``number`` that did not hold in it: then another round follows."""
        return self._later(number) or self._now()[0] != self._recorded(number)

    def since(self, number: int) -> int:
        """Return the first round in which all holds that holds in round ``number``; 0 where nothing ever did."""
        return max((int(e["round"]) for e in self._events() if int(e["round"]) <= number), default=0)

    def _events(self) -> list[dict[str, Any]]:
        return [event for event in self.run.ledger.events if event["event"] == REVIEWED]

    def _recorded(self, number: int) -> dict[str, CaseHold]:
        found: dict[int, dict[str, Any]] = {int(e["round"]): e["holds"] for e in self._events()}
        before = [n for n in found if n <= number]
        return holds_from_json(found[max(before)]) if before else {}

    def _later(self, number: int) -> bool:
        return any(int(event["round"]) > number for event in self._events())

    def _made(self, number: int) -> bool:
        """Say whether the round has labels; before, one that a missing file has stopped may still be decided anew."""
        stage = f"r{number:02d}/fuse"
        return any(event["event"] == "done" and event["stage"] == stage for event in self.run.ledger.events)

    def _now(self) -> tuple[dict[str, CaseHold], list[Any]]:
        lines = read_decisions(decisions_path(self.run.folder))
        # Read anew: human labels may have come while the run went on.
        cohort = Cohort.load(self.run.cohort.root)
        held_out = {self.run.cohort.case(case_id).patient for case_id in self.run.validation_ids}
        return holds_of(cohort, lines, held_out_patients=frozenset(held_out)), lines
