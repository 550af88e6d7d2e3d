"""The results in one JSON file: what is there already, and what a cell's result depends on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from nnunet_sam2.storage import read_json, value_hash, write_text

VERSION = 1
"""Raised when the bench measures the same thing in another way: all cells are then measured anew."""


class Results:
    """Keep results in a file that is whole after every cell.

    ``cells`` maps SET/SUPPORTS/seed N to tasks ("CHECKPOINT: VARIANT", or a copy's name) to entries.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Two runs, a checkpoint each, may share the file; the lock lies where nobody keeps it.
        name = value_hash(str(path.resolve()))[:16]
        self._lock = FileLock(Path(tempfile.gettempdir()) / f"bench_methods_{name}.lock")

    def read(self) -> dict[str, Any]:
        """Return all that is there."""
        found = read_json(self._path) if self._path.is_file() else {}
        return {"cells": found.get("cells", {}), "encoding": found.get("encoding", {})}

    def put(self, row: str, task: str, entry: Mapping[str, Any]) -> None:
        """Keep one cell, whoever else has written to the file meanwhile."""
        with self._lock:
            found = self.read()
            found["cells"].setdefault(row, {})[task] = dict(entry)
            found["cells"] = {key: dict(sorted(tasks.items())) for key, tasks in sorted(found["cells"].items())}
            self._write(found)

    def put_encoding(self, checkpoint: str, entry: Mapping[str, Any]) -> None:
        """Keep what a checkpoint takes to encode a slice."""
        with self._lock:
            found = self.read()
            found["encoding"] = dict(sorted({**found["encoding"], checkpoint: dict(entry)}.items()))
            self._write(found)

    def _write(self, found: Mapping[str, Any]) -> None:
        """Write one line for each result: thousands of figures, and still a diff that says what was measured anew."""
        cells = {
            row: _lines({task: json.dumps(e) for task, e in tasks.items()}) for row, tasks in found["cells"].items()
        }
        encoding = {name: json.dumps(entry) for name, entry in found["encoding"].items()}
        write_text(self._path, _lines({"cells": _lines(cells), "encoding": _lines(encoding)}) + "\n")


def slim(found: Mapping[str, Any], *, organ_slices: bool) -> dict[str, Any]:
    """Leave out what no table reads: each case's costs but its seconds, and its figures over organ slices."""
    cases = {}
    for case_id, case in found["cases"].items():
        kept = {kind: value for kind, value in case.items() if kind not in ("cost", "organ_slices")}
        kept["wall"] = case["cost"]["wall"]
        if organ_slices:
            kept["organ_slices"] = case["organ_slices"]
        cases[case_id] = kept
    left_out = () if organ_slices else ("organ_slices", "organ_slices_classes")
    return {**{kind: value for kind, value in found.items() if kind not in left_out}, "cases": cases}


def is_done(entry: Mapping[str, Any] | None, identity: Mapping[str, Any], queries: int) -> bool:
    """Say whether a result stands: measured with the same inputs, on at least as many queries, or refused."""
    if entry is None or entry.get("identity") != dict(identity):
        return False
    return "refused" in entry or len(entry.get("cases", {})) >= queries


def _lines(items: Mapping[str, str]) -> str:
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in items.items()) + "\n}"
