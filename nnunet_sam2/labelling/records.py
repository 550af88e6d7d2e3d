"""Where the record of a label lies, and how to find one without knowing who wrote it."""

from __future__ import annotations

from pathlib import Path

MEMBERS = "members"
"""Folder of the records beside the labels."""

CALIBRATION = "calibration"
"""Folder in a folder of labels: labelled cases that were labelled to calibrate the others' estimated quality."""

ROUND_FILE = "round.json"
"""Record of the labels that a round of a run fused."""

_DEPTH = 5
"""Folders between a dataset's results and its deepest labels: run, round, sam2, unlabelled, and one to spare."""


def record_path(out: Path, case_id: str) -> Path:
    """Name the record of a case in a folder of labels."""
    return out / MEMBERS / f"{case_id}.json"


def find_records(folder: Path, case_id: str) -> list[Path]:
    """Find a case's records in a folder of labels, a run's folder or the folder of all runs, the oldest first."""
    found = [path for depth in range(_DEPTH) for path in folder.glob(f"{'*/' * depth}{MEMBERS}/*.json")]
    # Compared as text: a case id may hold what a pattern takes for a wildcard. Nobody asked for what calibrates.
    named = [
        path for path in found if path.name == f"{case_id}.json" and CALIBRATION not in path.relative_to(folder).parts
    ]
    return sorted(named, key=lambda path: (path.stat().st_mtime, path))


def find_rounds(folder: Path) -> list[Path]:
    """Find the records of fused labels (``round.json``) in a run's folder or the folder of all runs, by name."""
    return sorted(path for depth in range(_DEPTH) for path in folder.glob(f"{'*/' * depth}{ROUND_FILE}"))
