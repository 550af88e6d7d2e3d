"""Where a run's files lie: its ledger, the newest labels, and the label files of each case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Case, Cohort, Role
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.explain.cases import class_names
from nnunet_sam2.labelling.records import record_path
from nnunet_sam2.report.words import CaseWord, words_of
from nnunet_sam2.rounds.decisions.holds import CaseHold, holds_from_json
from nnunet_sam2.rounds.decisions.record import Line, decisions_path, read_decisions
from nnunet_sam2.rounds.decisions.waiting import waiting_cases
from nnunet_sam2.rounds.ledger import LEDGER_FILE, REVIEWED, read_events
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.state import RunState, state_of_events
from nnunet_sam2.storage import read_json

Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Hold a run's ledger and know where its newest files lie."""

    cohort: Cohort
    folders: DatasetFolders
    folder: Path
    events: Sequence[dict[str, Any]] = field(repr=False)

    @classmethod
    def open(cls, folders: DatasetFolders, folder: Path) -> RunFiles:
        """Read the ledger and the cohort of a run; raise `InputError` where the run has not begun."""
        events = read_events(folder / LEDGER_FILE)
        if not events:
            raise InputError(
                f"{folder} holds no run; start one with: nnunet_sam2 run -d {folders.dataset_id} -c CONFIGURATION"
            )
        return cls(cohort=Cohort.load(folders.raw).as_planned(), folders=folders, folder=folder, events=events)

    @cached_property
    def state(self) -> RunState:
        """Return the run's state."""
        return state_of_events(self.folder, self.events)

    @cached_property
    def options(self) -> RunOptions:
        """Return the run's options; those that an older version did not know have their defaults."""
        return RunOptions.from_json(self.state.options, where=self.folder / LEDGER_FILE)

    @cached_property
    def done(self) -> dict[str, Json]:
        """Return the last ``done`` event of each stage, in the order in which they happened."""
        found: dict[str, Json] = {}
        for event in self.events:
            if event["event"] == "done":
                found.pop(event["stage"], None)
                found[event["stage"]] = event
        return found

    @cached_property
    def newest(self) -> tuple[Path, Json] | None:
        """Return folder and record of the newest fused labels; None before the first."""
        for stage, event in reversed(self.done.items()):
            if stage == "finish/labels":
                return self.folder / "labels", event["info"]
            if stage.endswith("/fuse"):
                return self.folder / stage.split("/")[0] / "labels", event["info"]
        return None

    @cached_property
    def validation_ids(self) -> tuple[str, ...]:
        """Return the fold's held-out labelled cases."""
        if self.options.fold == "all" or "setup/plan" not in self.done:
            return ()
        folds = self.done["setup/plan"]["info"]["folds"]
        return tuple(folds[int(self.options.fold)]["val"]) if int(self.options.fold) < len(folds) else ()

    @cached_property
    def _newest_sam2(self) -> Path:
        """Return where the SAM 2 labels lie that the newest fused ones were made of: a round's, where people drew."""
        fused = [e for e in self.events if e["event"] == "started" and e["stage"].endswith(("/fuse", "finish/labels"))]
        digest = fused[-1]["inputs"].get("supports") if fused else None
        again = (stage for stage, event in self.done.items() if stage.endswith("/sam2") and event["digest"] == digest)
        stage = next(again, "setup/sam2")
        return self.folder / ("sam2" if stage == "setup/sam2" else stage)

    def record_file(self, case: Case) -> Path | None:
        """Return the file with the record of SAM 2's newest own label of a case, None where there is none."""
        path = record_path(self._newest_sam2 / _kind(case), case.case_id)
        return path if path.is_file() else None

    def record(self, case: Case) -> Json | None:
        """Return the record of SAM 2's newest own label of a case, None where there is none."""
        path = self.record_file(case)
        return None if path is None else read_json(path)

    def label_files(self, case: Case) -> dict[str, Path]:
        """Return the label files of a case that are there: ``first``, ``last``, ``human`` and ``confidence``.

        A human label that came after the dataset was made is a ``human`` one as well.

        Test labels and hidden ones of a benchmark are not among them: nothing but evaluation reads these.
        """
        name = f"{case.case_id}{self.cohort.file_ending}"
        # Of a labelled case the newest, to which its measured Dice belongs.
        first = (self._newest_sam2 if case.role is Role.LABELLED else self.folder / "sam2") / _kind(case)
        files = {"first": first / name}
        if case.role is Role.LABELLED:
            files["human"] = self.cohort.label_path(case)
            files["confidence"] = first / "confidence" / name
            if case.case_id in self.validation_ids and self.state.best_round is not None:
                files["last"] = self.folder / f"r{self.state.best_round:02d}" / "student" / name
        elif self.newest is not None:
            files["last"] = self.newest[0] / name
            files["confidence"] = self.newest[0] / "confidence" / name
        else:
            files["confidence"] = first / "confidence" / name
        if case.added is not None and case.role is not Role.LABELLED:
            files["human"] = self.cohort.root / case.added.label
        return {kind: path for kind, path in files.items() if path.is_file()}

    @cached_property
    def hashes(self) -> dict[Path, str]:
        """Return the hash that the ledger has of each file that a stage wrote last."""
        return {self.folder / name: sha256 for event in self.done.values() for name, sha256 in event["files"].items()}

    def newest_label(self, case: Case) -> tuple[Path, str] | None:
        """Return the newest label file of a case and its hash; None where the ledger has none of it."""
        shown = self.label_files(case)
        path = shown.get("last", shown.get("first"))
        return None if path is None or path not in self.hashes else (path, self.hashes[path])

    @cached_property
    def class_names(self) -> dict[int, str]:
        """Return the names of the classes, by value."""
        return {int(value): name for value, name in class_names(self.cohort).items()}

    @cached_property
    def holds(self) -> dict[str, CaseHold]:
        """Return what people's word held in the newest labels."""
        events = [event for event in self.events if event["event"] == REVIEWED]
        return holds_from_json(events[-1]["holds"]) if events else {}

    @cached_property
    def words(self) -> dict[str, CaseWord]:
        """Return what people have said by now of each case that the run labels; the newest labels may not know it."""
        return words_of(self.cohort, self._decisions, held_out_patients=self.held_out_patients)

    @property
    def waiting(self) -> int:
        """Return on how many cases people's word waits for the next round."""
        return len(waiting_cases(self.cohort, self.folder, self.events, fold=self.options.fold))

    @cached_property
    def held_out_patients(self) -> frozenset[str]:
        """Return the patients who are validated on: human labels of theirs that came later are not taken."""
        return frozenset(self.cohort.case(name).patient for name in self.validation_ids)

    @cached_property
    def _decisions(self) -> list[Line]:
        return read_decisions(decisions_path(self.folder))


def _kind(case: Case) -> str:
    return "labelled" if case.role is Role.LABELLED else "unlabelled"
