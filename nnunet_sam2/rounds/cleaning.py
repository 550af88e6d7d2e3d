"""Removing what runs left: temporary files, embeddings, whole runs; raw data and human labels are never touched."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds.disk import folder_bytes
from nnunet_sam2.rounds.ledger import LEDGER_FILE, read_events
from nnunet_sam2.rounds.lock import LOCK_FILE, only_run
from nnunet_sam2.rounds.nnunet.base import (
    PLANS,
    RECORD_SUFFIX,
    model_folder,
    only_writer,
    plans_path,
    read_plans,
    write_plans,
)
from nnunet_sam2.rounds.state import EMBEDDINGS, RUNS_FOLDER, run_folder
from nnunet_sam2.storage import TEMPORARY_MARK, remove_temporary_files


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Name what is removed, or would be."""

    what: str
    paths: tuple[Path, ...]
    count: int
    """Bytes."""


def all_runs(folders: DatasetFolders) -> list[str]:
    """Name the runs of a dataset, those that never came to a first stage included."""
    found = (folders.results / RUNS_FOLDER).glob("*")
    return sorted(p.name for p in found if (p / LEDGER_FILE).is_file() or (p / LOCK_FILE).is_file())


def clean(folders: DatasetFolders, *, embeddings: bool = True, runs: Sequence[str] = ()) -> list[Removal]:
    """Remove temporary files, SAM 2's embeddings and the named runs; return what was removed.

    Raises `InputError`, before anything is removed, where a run of the dataset is at work.
    """
    with ExitStack() as held:
        for name in all_runs(folders):
            held.enter_context(only_run(run_folder(folders, name)))
        if folders.preprocessed.is_dir():
            held.enter_context(only_writer(folders))
        removed = [_temporary(folders)]
        if embeddings:
            removed.append(_remove("SAM 2's features", [folders.results / RUNS_FOLDER / EMBEDDINGS]))
        removed += [_remove_run(folders, name) for name in runs]
    for name in runs:  # the lock was still held above
        shutil.rmtree(run_folder(folders, name), ignore_errors=True)
    return [removal for removal in removed if removal.paths]


def parts_of_run(folders: DatasetFolders, name: str) -> list[Path]:
    """List the folders and files of a run: its own folder, its rounds' data, the models trained on them."""
    folder, named = run_folder(folders, name), _plans(run_folder(folders, name))
    if name not in all_runs(folders):
        known = ", ".join(all_runs(folders)) or "none"
        raise InputError(f"{folders.name} has no run {name}; there are: {known}")
    parts = [folder]
    for configuration in _configurations(folder):
        identifier = folders.preprocessed / f"{named}_{configuration}"
        parts += [identifier, Path(f"{identifier}_conf"), Path(f"{identifier}{RECORD_SUFFIX}")]
        parts.append(model_folder(folders, configuration, plans=named))
    return [path for path in parts if path.exists()]


def _plans(folder: Path) -> str:
    """Name the plans of a run."""
    options = [e["options"] for e in read_events(folder / LEDGER_FILE) if e["event"] == "run"]
    return str(options[-1].get("plans", PLANS)) if options else PLANS


def _configurations(folder: Path) -> list[str]:
    """Name the nnU-Net configurations that a run has made, or was about to make."""
    events = read_events(folder / LEDGER_FILE)
    return sorted(
        {e["inputs"]["configuration"] for e in events if e["event"] == "started" and e["stage"].endswith("/data")}
    )


def _temporary(folders: DatasetFolders) -> Removal:
    roots = [root for root in (folders.preprocessed, folders.results) if root.is_dir()]
    found = [path for root in roots for path in root.rglob(f"{TEMPORARY_MARK}*")]
    count = sum(map(folder_bytes, found))
    removed = [path for root in roots for path in remove_temporary_files(root)]
    return Removal(what="temporary files", paths=tuple(removed), count=count)


def _remove_run(folders: DatasetFolders, name: str) -> Removal:
    configurations, own = set(_configurations(run_folder(folders, name))), run_folder(folders, name)
    named = _plans(own)
    parts = parts_of_run(folders, name)
    count = folder_bytes(own)
    if plans_path(folders, named).is_file():
        plans = read_plans(folders, named)
        plans["configurations"] = {n: c for n, c in plans["configurations"].items() if n not in configurations}
        write_plans(folders, plans, named)
    rest = _remove("", [path for path in parts if path != own])
    return Removal(what=f"run {name}", paths=tuple(parts), count=count + rest.count)


def _remove(what: str, paths: Sequence[Path]) -> Removal:
    there = [path for path in paths if path.exists()]
    count = sum(map(folder_bytes, there))
    for path in there:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return Removal(what=what, paths=tuple(there), count=count)
