"""The ledger: an append-only record of what a run did, from what, and with which result.

One JSON object a line. A stage is done when a ``done`` line says so, when its inputs hash to the same key as now, and
when every file it wrote still has the hash that the line names; else it runs again. A line that a kill cut short is
dropped at the next start; a line that lacks what it must hold is refused by line and field. Each line holds its own
hash and that of the line before, so that a changed, lost or moved line is seen; lines of an earlier version, which have
none, are read as they are and are held by the first line that was written after them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_sam2.errors import InputError, StageError, describe_os_error
from nnunet_sam2.progress import say
from nnunet_sam2.storage import file_hash, value_hash, write_text

LEDGER_FILE = "ledger.jsonl"
BACKUP_FILE = "ledger.backup.jsonl"
"""The ledger as it was, whole and readable, when the run was last started."""

LEDGER_VERSION = 1

RETRIED, REVIEWED = "retried", "review"
"""Events: a stage is tried once more; people's word is taken into a round."""

HASH, PREVIOUS = "hash", "previous"
"""Fields of a line: the hash of what else it holds, and that of the line before."""

FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "run": {"options": dict},
    "started": {"stage": str, "key": str, "inputs": dict},
    "done": {"stage": str, "key": str, "digest": str, "files": dict, "info": dict, "seconds": (int, float)},
    "stopped": {"reason": str, "best_round": int},
    "machine": {"machine": dict},
    REVIEWED: {"round": int, "holds": dict, "decisions": list},
    RETRIED: {"stage": str, "cause": str, "remedy": str},
}
"""What an event of each kind must hold; other kinds are notes and may hold anything."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """Hold what a stage leaves behind: files (hashed into the ledger) and a JSON value for reports."""

    files: tuple[Path, ...] = ()
    info: Mapping[str, Any] | None = None


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read a ledger's events; an incomplete last line, left by a kill, is not an event.

    Raises `InputError` naming line and field where the file was damaged, edited or written by another version.
    """
    if not path.is_file():
        return []
    events: list[dict[str, Any]] = []
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            # A kill leaves the beginning of a line; a whole one with more behind it was not left by a kill.
            if number == len(lines) and not error.msg.startswith("Extra data"):
                break
            raise _damaged(path, number, "is not valid JSON") from None
        if not isinstance(event, dict):
            raise _damaged(path, number, "is no event")
        version = event.get("version", LEDGER_VERSION)
        if version != LEDGER_VERSION:
            raise InputError(
                f"{path}, line {number}: version {version!r} is not this program's ({LEDGER_VERSION}); "
                "continue with the version that wrote it, or start anew with --branch NAME"
            )
        _check_fields(path, number, event)
        _check_chain(path, number, event, events)
        events.append(event)
    return events


def _check_chain(path: Path, number: int, event: dict[str, Any], before: list[dict[str, Any]]) -> None:
    if HASH not in event and PREVIOUS not in event and not (before and HASH in before[-1]):
        return  # of an earlier version
    if event.get(HASH) != _own_hash(event):
        raise _damaged(path, number, f"({event['event']}) was changed since it was written")
    if event.get(PREVIOUS) != _hash_before(before):
        raise _damaged(path, number, f"({event['event']}) does not follow on what stands before it")


def _own_hash(event: Mapping[str, Any]) -> str:
    return value_hash({name: value for name, value in event.items() if name != HASH})


def _hash_before(events: list[dict[str, Any]]) -> str:
    """Return what the next line names as before it: the last line's hash, or that of all lines where they have none."""
    return str(events[-1][HASH]) if events and HASH in events[-1] else value_hash(events)


def _check_fields(path: Path, number: int, event: dict[str, Any]) -> None:
    fields = {"event": str, "time": (int, float), **FIELDS.get(str(event.get("event")), {})}
    for name, kind in fields.items():
        if name not in event:
            raise _damaged(path, number, f"({event.get('event', 'no event')}) lacks the field {name!r}")
        if not isinstance(event[name], kind) or isinstance(event[name], bool):
            wanted = kind.__name__ if isinstance(kind, type) else "number"
            raise _damaged(path, number, f"({event['event']}): {name!r} must be a {wanted}, not {event[name]!r:.60}")


def _damaged(path: Path, number: int, what: str) -> InputError:
    backup = path.with_name(BACKUP_FILE)
    known = f"put {backup.name} in its place (as it was when the run was last started)" if backup.is_file() else ""
    way_out = f"{known}, or start anew with --branch NAME" if known else "restore the file, or start anew with --branch"
    return InputError(f"{path}, line {number}, {what}; {way_out}")


def _refuse_lost_lines(folder: Path, events: list[dict[str, Any]]) -> None:
    """Refuse to begin a run anew where it has lost its ledger, or to go on with one that ends before its backup."""
    path, backup = folder / LEDGER_FILE, folder / BACKUP_FILE
    try:
        kept = read_events(backup)
    except InputError:
        kept = []
    if kept and events[: len(kept)] != kept:
        found = f"has {len(events)} entries" if events else "is empty" if path.is_file() else "is missing"
        raise InputError(
            f"{path} {found}, and {backup.name} has {len(kept)} that it does not begin with: the ledger was lost or "
            f"exchanged, the run does not begin anew over what is finished; go on from the last start with: "
            f"{shlex.join(['cp', str(backup), str(path)])}, or start anew beside it with --branch NAME"
        )
    rounds = [] if events else sorted(entry.name for entry in folder.glob("r[0-9][0-9]*") if entry.is_dir())
    if rounds:
        found = "is empty" if path.is_file() else "is missing"
        raise InputError(
            f"{path} {found}, but {', '.join(rounds)} of this run lie beside it, and there is no {backup.name}; "
            "restore the ledger, or start anew beside it with --branch NAME"
        )


def artefact(folder: Path, name: str) -> Path:
    """Return the file that a ledger in ``folder`` names; by the names, as a link's target has other folders above."""
    return Path(os.path.normpath(folder / name))


class Ledger:
    """Append events to a run's ledger and skip the stages that it shows as done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LEDGER_FILE
        self.events = read_events(self.path)
        self.before_stage: Callable[[str], None] = lambda stage: None
        """Called with a stage's name before it starts; what it raises keeps the stage from starting."""
        whole = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in self.events)
        _refuse_lost_lines(folder, self.events)
        if self.path.is_file():
            written = self.path.read_bytes()
            if written.startswith(whole.encode()):
                os.truncate(self.path, len(whole.encode()))  # takes no room, where the disk is full
            else:
                write_text(self.path, whole)
            with contextlib.suppress(OSError, StageError):  # a full disk must not keep the run from being looked at
                write_text(folder / BACKUP_FILE, whole)

    def append(self, event: str, **values: Any) -> dict[str, Any]:
        """Append one event and flush it to disk before returning it; raise `StageError` where that is not possible."""
        entry = {"version": LEDGER_VERSION, "event": event, "time": round(time.time(), 3), **values}
        entry[PREVIOUS] = _hash_before(self.events)
        entry[HASH] = _own_hash(json.loads(json.dumps(entry)))  # as it will be read
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(entry, ensure_ascii=False) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise StageError(f"the ledger cannot be written: {describe_os_error(error)}") from error
        self.events.append(entry)
        return entry

    def note_retry(self, cause: str, remedy: str) -> None:
        """Note that the stage at work is tried once more, why, and what is done otherwise."""
        at_work = [event["stage"] for event in self.events if event["event"] == "started"]
        self.append(RETRIED, stage=at_work[-1] if at_work else "", cause=cause, remedy=remedy)

    def done(self, stage: str, key: str) -> dict[str, Any] | None:
        """Return the stage's ``done`` event if its key matches and its files are unchanged, else None."""
        for event in reversed(self.events):
            if event["event"] == "done" and event["stage"] == stage:
                if event["key"] == key and not list(self._changed_files(event)):
                    return event
                return None
        return None

    def run_stage(
        self, stage: str, inputs: Mapping[str, Any], work: Callable[[], StageResult], *, what: str
    ) -> dict[str, Any]:
        """Run ``work`` unless the ledger shows it done from the same ``inputs``; return the stage's ``done`` event.

        ``inputs`` is a JSON value that determines the result; put the ``digest`` of earlier stages in it.
        """
        key = value_hash({"stage": stage, "inputs": inputs})
        finished = self.done(stage, key)
        if finished is not None:
            return finished
        self.before_stage(stage)
        say(f"[{stage}] {what}")
        self.append("started", stage=stage, key=key, inputs=dict(inputs), process=os.getpid())
        start = time.monotonic()
        try:
            result = work()
            hashes = {self._name(path): file_hash(path) for path in sorted(result.files)}
        except OSError as error:
            raise StageError(f"stage {stage} failed: {describe_os_error(error)}") from error
        return self.append(
            "done",
            stage=stage,
            key=key,
            digest=value_hash({"key": key, "files": hashes}),
            files=hashes,
            info=dict(result.info or {}),
            seconds=round(time.monotonic() - start, 3),
        )

    def _name(self, path: Path) -> str:
        # relative where possible, so that a results folder may be moved as a whole
        return os.path.relpath(path, self.folder)

    def _changed_files(self, event: dict[str, Any]) -> Iterator[Path]:
        for name, expected in event["files"].items():
            path = artefact(self.folder, name)
            if not path.is_file() or file_hash(path) != expected:
                say(f"[{event['stage']}] {path} is missing or has changed since it was written: the stage runs again")
                yield path
                return


class ReadLedger(Ledger):
    """Read a run's ledger without writing a line: the run may be at work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LEDGER_FILE
        self.events = read_events(self.path)
        self.before_stage = lambda stage: None

    def append(self, event: str, **values: Any) -> dict[str, Any]:
        """Refuse: nothing that reads a run changes it."""
        raise RuntimeError(f"{self.path} is only read here; {event} is not written")

    def note_retry(self, cause: str, remedy: str) -> None:
        """Note nothing: what was tried once more is no stage of the run."""
