"""People's word that no round has taken in yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.rounds.decisions.holds import holds_from_json, holds_of
from nnunet_sam2.rounds.decisions.record import decisions_path, read_decisions
from nnunet_sam2.rounds.ledger import REVIEWED


def waiting_cases(cohort: Cohort, run: Path, events: Sequence[Mapping[str, Any]], *, fold: str) -> list[str]:
    """Return the ids of the cases that people decided about or drew since the last round that asked them.

    ``events`` are those of the run's ledger. Before its first stage is done nothing waits: the first round asks.
    """
    planned = [e for e in events if e["event"] == "done" and e["stage"] == "setup/plan"]
    if not planned:
        return []
    folds = planned[-1]["info"]["folds"]
    validated = [] if fold == "all" else folds[int(fold)]["val"]
    held_out = frozenset(cohort.case(case_id).patient for case_id in validated)
    now = holds_of(cohort, read_decisions(decisions_path(run)), held_out_patients=held_out)
    reviewed = [e for e in events if e["event"] == REVIEWED]
    then = holds_from_json(reviewed[-1]["holds"]) if reviewed else {}
    return sorted(case_id for case_id in then.keys() | now.keys() if then.get(case_id) != now.get(case_id))
