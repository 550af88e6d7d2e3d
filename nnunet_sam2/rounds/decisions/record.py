"""What people decided about a run's labels: an append-only file beside the ledger, and what follows from it.

The ledger belongs to the process that runs the loop. Decisions may come at any time, so they have a file of their own,
``review/decisions.jsonl``, that the loop reads before a round. One JSON object a line; each carries its own hash and
that of the line before it. A line that a kill cut short is no decision.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.rounds.lock import acquired
from nnunet_sam2.storage import value_hash, write_text

REVIEW_FOLDER = "review"
DECISIONS_FILE = "decisions.jsonl"
ACCEPTED_FOLDER = "accepted"
"""Folder of the label files that were accepted, as they were when they were."""

LOCK_FILE = "review.lock"
DECISIONS_VERSION = 1
_NOTHING_BEFORE = "0" * 64


class Decision(str, Enum):
    """Name what a person may say of a label."""

    ACCEPT = "accept"
    """The class is right as it was shown: from now on it stays so, with full confidence."""
    REJECT = "reject"
    """The class is wrong: none of its voxels is learnt from until the decision is lifted."""
    TAKE_OUT = "take out"
    """The case is not used at all."""
    CLEAR = "clear"
    """Nothing is decided any more."""
    UNDO = "undo"
    """An earlier line does not count."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Hold one line of the file."""

    number: int
    decision: Decision
    time: float
    case_id: str = ""
    classes: tuple[int, ...] = ()
    """The classes that it is about; none for a whole case (take out, and clear after it)."""
    label: str = ""
    """Hash of the label file that was shown."""
    undoes: int | None = None
    previous: str = _NOTHING_BEFORE

    def to_json(self) -> dict[str, Any]:
        """Return the line as a JSON value, with its hash."""
        value: dict[str, Any] = {
            "version": DECISIONS_VERSION,
            "number": self.number,
            "time": self.time,
            "decision": self.decision.value,
            "case": self.case_id,
            "classes": list(self.classes),
            "label": self.label,
            "undoes": self.undoes,
            "previous": self.previous,
        }
        return {**value, "hash": value_hash(value)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Line:
        """Rebuild a line from `to_json`; raise `ValueError` where it is not what was written."""
        line = cls(
            number=value["number"],
            decision=Decision(value["decision"]),
            time=value["time"],
            case_id=value["case"],
            classes=tuple(value["classes"]),
            label=value["label"],
            undoes=value["undoes"],
            previous=value["previous"],
        )
        if line.to_json() != dict(value):
            raise ValueError("the line does not have its hash")
        return line


@dataclass(frozen=True, kw_only=True)
class CaseDecisions:
    """Hold what stands for one case: of each class the hash of the label that the decision was about."""

    taken_out: bool = False
    accepted: Mapping[int, str] = field(default_factory=dict)
    rejected: Mapping[int, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.taken_out or bool(self.accepted) or bool(self.rejected)

    def without(self, classes: Collection[int]) -> CaseDecisions:
        """Return the decisions but those about ``classes``."""
        return CaseDecisions(
            taken_out=self.taken_out,
            accepted={value: label for value, label in self.accepted.items() if value not in classes},
            rejected={value: label for value, label in self.rejected.items() if value not in classes},
        )


def decisions_path(run: Path) -> Path:
    """Return the file of a run's decisions."""
    return run / REVIEW_FOLDER / DECISIONS_FILE


def accepted_path(run: Path, case_id: str, label: str, file_ending: str) -> Path:
    """Return where the label file with the hash ``label`` was kept when it was accepted."""
    return run / REVIEW_FOLDER / ACCEPTED_FOLDER / f"{case_id}-{label[:16]}{file_ending}"


def read_decisions(path: Path) -> list[Line]:
    """Read the lines of a decisions file; pass over a last one cut short.

    Raises `InputError` for a line that was changed, or that does not follow on the one before it.
    """
    if not path.is_file():
        return []
    text = path.read_bytes().decode("utf-8", errors="replace")
    lines: list[Line] = []
    # What follows the last line end was cut short.
    for number, written in enumerate(text.split("\n")[:-1], start=1):
        try:
            line = Line.from_json(json.loads(written))
        except (ValueError, KeyError, TypeError):
            line = None
        expected = value_hash_of(lines[-1]) if lines else _NOTHING_BEFORE
        if line is None or line.previous != expected or line.number != number:
            raise InputError(
                f"{path}, line {number}, is not what was written there; restore the file, or remove it from that line "
                "on to decide anew"
            )
        lines.append(line)
    return lines


def value_hash_of(line: Line) -> str:
    """Return the hash that a line carries."""
    return str(line.to_json()["hash"])


def counting(lines: Sequence[Line]) -> list[Line]:
    """Return the lines that count: what was undone does not, nor what undid it."""
    undone = {line.undoes for line in lines}
    return [line for line in lines if line.decision is not Decision.UNDO and line.number not in undone]


def standing(lines: Sequence[Line]) -> dict[str, CaseDecisions]:
    """Fold lines into what stands for each case: the last word counts, without what was undone.

    To accept or reject a class of a case that was taken out brings the case back.
    """
    cases: dict[str, tuple[bool, dict[int, str], dict[int, str]]] = {}
    for line in counting(lines):
        taken_out, accepted, rejected = cases.get(line.case_id, (False, {}, {}))
        if line.decision is Decision.TAKE_OUT:
            taken_out = True
        elif not line.classes:
            taken_out = False
        else:
            accepted = {value: label for value, label in accepted.items() if value not in line.classes}
            rejected = {value: label for value, label in rejected.items() if value not in line.classes}
            if line.decision is Decision.ACCEPT:
                accepted |= dict.fromkeys(line.classes, line.label)
            elif line.decision is Decision.REJECT:
                rejected |= dict.fromkeys(line.classes, line.label)
            if line.decision is not Decision.CLEAR:
                taken_out = False
        cases[line.case_id] = (taken_out, accepted, rejected)
    found = {
        case_id: CaseDecisions(
            taken_out=taken_out, accepted=dict(sorted(accepted.items())), rejected=dict(sorted(rejected.items()))
        )
        for case_id, (taken_out, accepted, rejected) in sorted(cases.items())
    }
    return {case_id: decisions for case_id, decisions in found.items() if decisions}


class DecisionFile(AbstractContextManager["DecisionFile"]):
    """Append to a run's decisions: one process at a time, each line on the disk before it counts."""

    def __init__(self, run: Path) -> None:
        from filelock import FileLock, Timeout

        self.path = decisions_path(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path.parent / LOCK_FILE)
        try:
            acquired(self._lock, timeout=0)
        except Timeout:
            raise InputError(f"{run} is being reviewed by another process; use its page, or end it first") from None
        try:
            self.lines = read_decisions(self.path)
            self._write_anew_if_cut_short()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *details: object) -> None:
        self._lock.release()

    def append(
        self,
        decision: Decision,
        *,
        case_id: str = "",
        classes: Sequence[int] = (),
        label: str = "",
        undoes: int | None = None,
    ) -> Line:
        """Append one decision and return it when it is on the disk; raise `StageError` where it cannot be written."""
        line = Line(
            number=len(self.lines) + 1,
            decision=decision,
            time=round(time.time(), 3),
            case_id=case_id,
            classes=tuple(classes),
            label=label,
            undoes=undoes,
            previous=value_hash_of(self.lines[-1]) if self.lines else _NOTHING_BEFORE,
        )
        whole = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("ab") as handle:
                handle.write(_written(line))
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, whole)
            raise StageError(f"{self.path} could not be written ({error}); nothing was decided") from None
        self.lines.append(line)
        return line

    @property
    def last_that_counts(self) -> Line | None:
        """Return the last line that was not undone, which undo takes back."""
        return next(reversed(counting(self.lines)), None)

    def _write_anew_if_cut_short(self) -> None:
        if not self.path.is_file():
            return
        whole = b"".join(_written(line) for line in self.lines)
        if self.path.read_bytes() != whole:
            write_text(self.path, whole.decode("utf-8"))


def _written(line: Line) -> bytes:
    return (json.dumps(line.to_json(), ensure_ascii=False) + "\n").encode("utf-8")
