"""Names, folders and plans that all parts of the nnU-Net adapter share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.progress import say
from nnunet_sam2.rounds.lock import acquired
from nnunet_sam2.rounds.options import DEFAULT_PLANS
from nnunet_sam2.storage import TEMPORARY_MARK, read_json, write_text
from nnunet_sam2.trainers.discovery import TRAINER_NAME

PLANS = DEFAULT_PLANS
PLANNERS = {f"nnUNetResEncUNet{size}Plans": f"nnUNetPlannerResEnc{size}" for size in ("M", "L", "XL")}
"""nnU-Net's presets and the planners that make them; other plans are the user's and lie there already."""
RECORD_SUFFIX = "_round.json"
LOCK_FILE = ".nnunet_sam2.lock"
TRAINER = TRAINER_NAME
Fold = int | str
"""A fold's number, or ``"all"``."""


@dataclass(frozen=True, kw_only=True)
class RoundConfiguration:
    """Say where a round's training data lie and what they were made of."""

    name: str
    data_folder: Path
    confidence_folder: Path
    key: str
    """Hash of everything that went in: base data, labels, confidences, settings, overrides."""
    pseudo_cases: tuple[str, ...] = ()

    @property
    def record(self) -> Path:
        """Return the file beside the data that says what they were made of."""
        return Path(f"{self.data_folder}{RECORD_SUFFIX}")

    @property
    def hashed_files(self) -> tuple[Path, ...]:
        """Return the files that a round's data are known by: all but the pseudo cases' images.

        These are links, most of the data's size, and were held against their hash when they were linked.
        """
        images = {f"{case}.b2nd" for case in self.pseudo_cases}
        data = (path for path in self.data_folder.glob("*") if path.name not in images)
        return (*sorted(data), *sorted(self.confidence_folder.glob("*")))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Say what a finished training left."""

    checkpoint: Path
    summary: Path | None
    """nnU-Net's ``validation/summary.json``, or None where there was nothing to validate on."""
    seconds: float
    """Seconds of this call; 0.0 where the training had been finished before."""


@dataclass(frozen=True, kw_only=True)
class ValidationDice:
    """Hold the Dice of a training's own validation, on human labels; None where neither side has the class."""

    mean: float | None
    classes: dict[str, float | None]
    """Keyed by label value, or by nnU-Net's name of a region such as ``"(1, 2)"``."""
    cases: dict[str, dict[str, float | None]]
    """Case id -> the same keys."""


def model_folder(folders: DatasetFolders, configuration: str, *, plans: str = PLANS, trainer: str = TRAINER) -> Path:
    """Return ``RESULTS/DatasetXXX/TRAINER__PLANS__CONFIGURATION``."""
    return folders.results / f"{trainer}__{plans}__{configuration}"


def fold_folder(
    folders: DatasetFolders, configuration: str, fold: Fold, *, plans: str = PLANS, trainer: str = TRAINER
) -> Path:
    """Return the folder of one fold's training."""
    return model_folder(folders, configuration, plans=plans, trainer=trainer) / f"fold_{fold}"


def final_checkpoint(
    folders: DatasetFolders, configuration: str, fold: Fold, *, plans: str = PLANS, trainer: str = TRAINER
) -> Path:
    """Return the checkpoint of a finished training; raise `InputError` where there is none."""
    path = fold_folder(folders, configuration, fold, plans=plans, trainer=trainer) / "checkpoint_final.pth"
    if not path.is_file():
        raise InputError(f"{path} does not exist: fold {fold} of {configuration} is not trained yet")
    return path


def plans_path(folders: DatasetFolders, plans: str = PLANS) -> Path:
    """Return the plans file of a dataset."""
    return folders.preprocessed / f"{plans}.json"


def read_plans(folders: DatasetFolders, plans: str = PLANS) -> dict[str, Any]:
    """Read a dataset's plans as nnU-Net wrote them."""
    value: dict[str, Any] = read_json(plans_path(folders, plans))
    return value


def write_plans(folders: DatasetFolders, value: dict[str, Any], plans: str = PLANS) -> None:
    """Write a dataset's plans in nnU-Net's own layout, atomically."""
    write_text(plans_path(folders, plans), json.dumps(value, indent=4))


def resolved_configuration(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """Return a plans configuration with everything that it inherits; raise `InputError` naming those there are."""
    configurations = plans["configurations"]
    if configuration not in configurations:
        known = ", ".join(configurations)
        name = plans["dataset_name"]
        raise InputError(f"nnU-Net's plans for {name} have no {configuration}, only: {known}; choose one with -c")
    own = dict(configurations[configuration])
    parent = own.pop("inherits_from", None)
    return {**resolved_configuration(plans, parent), **own} if parent else own


def require_trainable(plans: dict[str, Any], configuration: str) -> None:
    """Refuse configurations that a loop cannot train: the second stage of nnU-Net's cascade."""
    if resolved_configuration(plans, configuration).get("previous_stage"):
        raise InputError(f"{configuration} needs another configuration's predictions; use 2d, 3d_fullres or 3d_lowres")


@contextmanager
def only_writer(folders: DatasetFolders) -> Iterator[None]:
    """Hold the dataset's preprocessed folder during the block; wait where another run (of another fold) writes to it.

    Plans are read, changed and written back: two runs at once would lose one another's configurations.
    """
    from filelock import FileLock, Timeout

    folders.preprocessed.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folders.preprocessed / LOCK_FILE)
    try:
        locked = acquired(lock, timeout=0)
    except Timeout:
        say(f"another run prepares {folders.name}; waiting for it")
        locked = acquired(lock)
    if not locked:
        say(f"{folders.preprocessed} cannot be locked: let no other run of {folders.name} begin before this one ends")
    try:
        yield
    finally:
        lock.release()


def remove_remains(target: Path) -> None:
    """Remove what killed writers of ``target``, a file or folder, left beside it; its writer's lock must be held."""
    for path in target.parent.glob(f"{TEMPORARY_MARK}*_{target.name}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
