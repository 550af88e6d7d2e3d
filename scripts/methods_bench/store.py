"""The results in one JSON file: what is there already, and what a cell's result depends on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_sam2.storage import read_json, write_json

VERSION = 1
"""Raised when the bench measures the same thing in another way: all cells are then measured anew."""


class Results:
    """Keep results in a file that is whole after every cell.

    ``cells`` maps SET/SUPPORTS/seed N to tasks ("CHECKPOINT: VARIANT", or a copy's name) to entries.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Any]:
        """Return all that is there."""
        found = read_json(self._path) if self._path.is_file() else {}
        return {"cells": found.get("cells", {}), "encoding": found.get("encoding", {})}

    def put(self, row: str, task: str, entry: Mapping[str, Any]) -> None:
        """Keep one cell, whoever else has written to the file meanwhile."""
        found = self.read()
        found["cells"].setdefault(row, {})[task] = dict(entry)
        found["cells"] = {key: dict(sorted(tasks.items())) for key, tasks in sorted(found["cells"].items())}
        write_json(self._path, found)

    def put_encoding(self, checkpoint: str, entry: Mapping[str, Any]) -> None:
        """Keep what a checkpoint takes to encode a slice."""
        found = self.read()
        found["encoding"] = dict(sorted({**found["encoding"], checkpoint: dict(entry)}.items()))
        write_json(self._path, found)


def is_done(entry: Mapping[str, Any] | None, identity: Mapping[str, Any], queries: int) -> bool:
    """Say whether a result stands: measured with the same inputs, on at least as many queries, or refused."""
    if entry is None or entry.get("identity") != dict(identity):
        return False
    return "refused" in entry or len(entry.get("cases", {})) >= queries
