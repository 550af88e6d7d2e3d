"""Fingerprint, plans, preprocessing and splits: from the labelled cases alone, once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds.nnunet.base import (
    PLANS,
    RECORD_SUFFIX,
    only_writer,
    plans_path,
    read_plans,
    require_trainable,
    resolved_configuration,
)
from nnunet_sam2.rounds.nnunet.process import HANG_MINUTES, child_environment, console_script, run_logged
from nnunet_sam2.storage import atomic_path, file_hash, read_json, value_hash, write_json
from nnunet_sam2.trainers.discovery import require_nnunet

MARKER_FILE = "nnunet_sam2_preprocessed.json"
"""Says what the preprocessed data were made of; written before a step as unfinished, after it as done."""

SPLITS_FILE = "splits_final.json"


def labelled_key(cohort: Cohort) -> str:
    """Hash what fingerprint, plans and preprocessing depend on: labelled images, their labels, the label table."""
    return value_hash(
        {
            "dataset": file_hash(cohort.root / "dataset.json"),
            "nnunetv2": require_nnunet(),
            "cases": {
                case.case_id: [file_hash(path) for path in (*cohort.image_paths(case), cohort.label_path(case))]
                for case in cohort.labelled
            },
        }
    )


def plan_and_preprocess(
    folders: DatasetFolders,
    cohort: Cohort,
    configuration: str,
    *,
    log: Path,
    plans: str = PLANS,
    planner: str | None = None,
    hang_minutes: float = HANG_MINUTES,
) -> Path:
    """Fingerprint, plan and preprocess the labelled cases with nnU-Net's own command; return the plans file.

    Plans that a user made before are kept. Raises `InputError` where the plans lack ``configuration`` (2D data have
    only ``2d``) or the labelled cases changed after rounds were built on them; `StageError` where nnU-Net fails.
    """
    if not cohort.labelled:
        raise InputError(f"{cohort.name} has no labelled case; nnU-Net needs at least one to plan from")
    with only_writer(folders):
        _plan_and_preprocess(folders, cohort, configuration, log, plans, planner, hang_minutes)
    return plans_path(folders, plans)


def preprocessed_labelled(folders: DatasetFolders, configuration: str, *, plans: str = PLANS) -> tuple[Path, ...]:
    """Return nnU-Net's own files of the preprocessed labelled cases."""
    return tuple(sorted(_labelled_folder(folders, configuration, plans).iterdir()))


def require_unchanged(folders: DatasetFolders, configuration: str, *, plans: str = PLANS) -> None:
    """Refuse preprocessed labelled cases that are not as nnU-Net wrote them, before a round learns from them.

    Among them are the pickles that nnU-Net loads. Raises `InputError`. Nothing is known of what an earlier version of
    this package had preprocessed.
    """
    folder = _labelled_folder(folders, configuration, plans)
    known = _read_marker(folders).get(plans, {}).get("files", {}).get(configuration, {})
    for name, sha256 in known.items():
        if not (folder / name).is_file() or file_hash(folder / name) != sha256:
            raise InputError(f"{folder / name} was changed after preprocessing; remove {folder} and run again")


def write_splits(folders: DatasetFolders, cohort: Cohort) -> list[dict[str, list[str]]]:
    """Write ``splits_final.json`` (by patient, labelled cases only) and return the folds; a valid one is kept.

    Empty, and no file, where all labelled cases are one patient's: only fold ``all`` can then be trained.
    """
    path = folders.preprocessed / SPLITS_FILE
    if path.is_file():
        splits: list[dict[str, list[str]]] = read_json(path)
        _check_splits(splits, cohort, path)
        return splits
    from nnunet_sam2.cohort.splits import make_splits

    splits = make_splits(cohort)
    if splits:
        write_json(path, splits)
    return splits


def require_splits(folders: DatasetFolders, folds: list[dict[str, list[str]]]) -> None:
    """Raise `InputError` where ``splits_final.json`` holds other folds than a run began with; write lost ones anew."""
    path = folders.preprocessed / SPLITS_FILE
    if folds and not path.is_file():
        write_json(path, folds)
    elif folds and read_json(path) != folds:
        raise InputError(
            f"{path} holds other folds than this run began with, so that its validation would see cases that it was "
            "trained on; put the old file back (or remove it: it is written anew), or give --branch NAME for a new run"
        )


def _plan_and_preprocess(
    folders: DatasetFolders,
    cohort: Cohort,
    configuration: str,
    log: Path,
    plans: str,
    planner: str | None,
    hang_minutes: float,
) -> None:
    key = labelled_key(cohort)
    marker = _read_marker(folders)
    state = marker.get(plans, {})
    if state.get("key") not in (None, key):
        _refuse_if_rounds_exist(folders, state.get("nnunetv2"))
        state = {"planned": state.get("by") == "user", "by": state.get("by")}
    if not state:
        by = "user" if plans_path(folders, plans).is_file() else "nnunet_sam2"
        state = {"planned": by == "user", "by": by}
    state["key"] = key
    state["nnunetv2"] = require_nnunet()
    state.setdefault("done", [])
    known = state.setdefault("files", {}).get(configuration, {})
    if configuration in state["done"] and _is_whole(folders, cohort, configuration, plans, known):
        _refresh_references(folders, cohort)
        return
    # Before anything changes: what is on disk may be half a step from here on.
    state["done"] = [name for name in state["done"] if name != configuration]
    _write_marker(folders, {**marker, plans: state})
    environment = child_environment(threads=1, augmentation_workers=1)
    if not state["planned"]:
        argv = [console_script("nnUNetv2_plan_and_preprocess"), "-d", str(folders.dataset_id), "-c", configuration]
        argv += ["-npfp", "1", "-np", "1", "--clean", "--no_pbar"]
        if planner is not None:
            argv += ["-pl", planner]
        if plans != PLANS and planner is None:
            argv += ["-overwrite_plans_name", plans]
    else:
        require_trainable(read_plans(folders, plans), configuration)
        _copy(cohort.root / "dataset.json", folders.preprocessed / "dataset.json")
        argv = [console_script("nnUNetv2_preprocess"), "-d", str(folders.dataset_id), "-plans_name", plans]
        argv += ["-c", configuration, "-np", "1", "--no_pbar"]
    what = f"planning and preprocessing {folders.name}"
    run_logged(argv, log=log, environment=environment, what=what, hang_minutes=hang_minutes)
    if not plans_path(folders, plans).is_file():
        raise StageError(f"nnU-Net wrote no {plans_path(folders, plans)}; does the planner fit -p {plans}? Log: {log}")
    require_trainable(read_plans(folders, plans), configuration)
    if not _is_whole(folders, cohort, configuration, plans, {}):
        raise StageError(f"nnU-Net did not preprocess every labelled case of {folders.name}; log: {log}")
    _refresh_references(folders, cohort)
    state["planned"] = True
    state["done"] = sorted({*state["done"], configuration})
    made = preprocessed_labelled(folders, configuration, plans=plans)
    state["files"][configuration] = {path.name: file_hash(path) for path in made}
    _write_marker(folders, {**marker, plans: state})


def _check_splits(splits: list[dict[str, list[str]]], cohort: Cohort, path: Path) -> None:
    patients = {case.case_id: case.patient for case in cohort.labelled}
    for number, fold in enumerate(splits):
        strangers = sorted({*fold["train"], *fold["val"]} - set(patients))
        if strangers:
            raise InputError(f"{path}: fold {number} names {strangers[0]}, no labelled case; remove the file")
        shared = sorted({patients[c] for c in fold["train"]} & {patients[c] for c in fold["val"]})
        if shared:
            raise InputError(f"{path}: fold {number} trains and validates on patient {shared[0]}; remove the file")


def _read_marker(folders: DatasetFolders) -> dict[str, Any]:
    path = folders.preprocessed / MARKER_FILE
    return dict(read_json(path)) if path.is_file() else {}


def _write_marker(folders: DatasetFolders, marker: dict[str, Any]) -> None:
    write_json(folders.preprocessed / MARKER_FILE, marker)


def _refuse_if_rounds_exist(folders: DatasetFolders, planned_with: str | None) -> None:
    if not any(folders.preprocessed.glob(f"*{RECORD_SUFFIX}")):
        return
    version = require_nnunet()
    if planned_with not in (None, version):
        raise InputError(
            f"{folders.name} was planned with nnunetv2 {planned_with}, this is {version}; rounds are built on those "
            f"plans: pip install nnunetv2=={planned_with}, or convert to a new dataset id"
        )
    raise InputError(
        f"the labelled cases of {folders.name} changed after rounds were built on them; convert them to a new "
        f"dataset id, or remove {folders.preprocessed} and {folders.results} to start anew"
    )


def _labelled_folder(folders: DatasetFolders, configuration: str, plans: str) -> Path:
    return folders.preprocessed / resolved_configuration(read_plans(folders, plans), configuration)["data_identifier"]


def _is_whole(
    folders: DatasetFolders, cohort: Cohort, configuration: str, plans: str, hashes: Mapping[str, str]
) -> bool:
    folder = _labelled_folder(folders, configuration, plans)
    wanted = {case.case_id + end for case in cohort.labelled for end in (".b2nd", "_seg.b2nd", ".pkl")}
    return (
        folder.is_dir()
        and wanted == set(os.listdir(folder))
        and all(file_hash(folder / name) == sha256 for name, sha256 in hashes.items())
    )


def _refresh_references(folders: DatasetFolders, cohort: Cohort) -> None:
    """Bring ``gt_segmentations`` up to date by content: nnU-Net copies by file date and keeps old labels."""
    folder = folders.preprocessed / "gt_segmentations"
    names = set()
    for case in cohort.labelled:
        path = folder / f"{case.case_id}{cohort.file_ending}"
        names.add(path.name)
        _copy(cohort.label_path(case), path)
    for path in folder.iterdir():
        if path.name.endswith(cohort.file_ending) and path.name not in names:
            path.unlink()


def _copy(source: Path, target: Path) -> None:
    if not target.is_file() or file_hash(source) != file_hash(target):
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
