"""Training through ``nnUNetv2_train`` in a process of its own, and what its validation says."""

from __future__ import annotations

import math
import re
import shutil
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.progress import track
from nnunet_sam2.rounds.nnunet.base import (
    PLANS,
    TRAINER,
    Fold,
    Trained,
    ValidationDice,
    fold_folder,
    read_plans,
    resolved_configuration,
)
from nnunet_sam2.rounds.nnunet.failures import Cause
from nnunet_sam2.rounds.nnunet.plan import SPLITS_FILE
from nnunet_sam2.rounds.nnunet.process import HANG_MINUTES, child_environment, console_script, stream_logged
from nnunet_sam2.rounds.nnunet.retry import Note, Remedy, no_note, once_more, training_remedy
from nnunet_sam2.storage import read_json, remove_temporary_files
from nnunet_sam2.trainers.discovery import require_nnunet
from nnunet_sam2.trainers.settings import ENVIRONMENT_PREFIX, RoundSettings

FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
_EPOCH = re.compile(r"Epoch (\d+)\s*$")


def train(
    folders: DatasetFolders,
    configuration: str,
    fold: Fold,
    *,
    device: str,
    log: Path,
    threads: int | None = None,
    pretrained: Path | None = None,
    plans: str = PLANS,
    trainer: str = TRAINER,
    hang_minutes: float = HANG_MINUTES,
    note: Note = no_note,
) -> Trained:
    """Run ``nnUNetv2_train`` to its end, continuing a killed training from its latest whole checkpoint.

    On the CPU, augmentation runs in the training process, so that a continued training gives the same weights.
    ``device`` is nnU-Net's: cpu, cuda or mps. ``pretrained`` is a checkpoint that a new training starts from, as by
    nnU-Net's ``-pretrained_weights``: heads left out. What ends for a cause that has a remedy (`training_remedy`) goes
    on once more, which ``note`` is told. Raises `InputError` where the splits have no such fold, `StageError` with the
    end of the log where nnU-Net fails.
    """
    require_nnunet()
    settings = RoundSettings.from_configuration(resolved_configuration(read_plans(folders, plans), configuration))
    _require_fold(folders, fold)
    folder = fold_folder(folders, configuration, fold, plans=plans, trainer=trainer)
    if _is_finished(folder):
        return Trained(checkpoint=folder / FINAL, summary=_summary(folder), seconds=0.0)
    on_cpu = device == "cpu"
    environment = child_environment(threads=threads, augmentation_workers=0 if on_cpu else None, gpu=not on_cpu)
    if threads is not None:
        # nnUNetv2_train takes every core on the CPU and ignores OMP_NUM_THREADS; the trainer reads this one.
        environment[f"{ENVIRONMENT_PREFIX}threads"] = str(threads)
    what = f"training {configuration} fold {fold}"
    if pretrained is not None:
        require_pretrained(pretrained)

    def attempt(remedy: Remedy | None) -> None:
        how = _how_to_continue(folder, note)
        if pretrained is not None and not how:
            how = ["-pretrained_weights", str(pretrained)]
        argv = [console_script("nnUNetv2_train"), str(folders.dataset_id), configuration, str(fold)]
        argv += ["-tr", trainer, "-p", plans, "-device", device, *how]
        changed = {**environment, **(remedy.environment if remedy else {})}
        lines = stream_logged(argv, log=log, environment=changed, what=what, hang_minutes=hang_minutes)
        for _ in track(_epochs(lines), what=f"training {configuration}", total=settings.num_epochs):
            pass

    started = time.monotonic()
    once_more(attempt, lambda cause: training_remedy(cause, on_gpu=not on_cpu), note=note)
    if not _is_whole_checkpoint(folder / FINAL):
        raise StageError(f"{folder / FINAL} is missing or broken after training; is checkpointing disabled? Log: {log}")
    (folder / LATEST).unlink(missing_ok=True)
    return Trained(checkpoint=folder / FINAL, summary=_summary(folder), seconds=time.monotonic() - started)


def require_pretrained(path: Path) -> None:
    """Raise `InputError` where a file is no checkpoint of nnU-Net, or holds what nnU-Net would execute."""
    from nnunet_sam2.trainers.checkpoints import read_checkpoint

    read_checkpoint(path)


def read_validation(
    folders: DatasetFolders, configuration: str, fold: Fold, *, plans: str = PLANS, trainer: str = TRAINER
) -> ValidationDice | None:
    """Read the validation Dice of a finished training; None where it had no validation cases.

    The mean is over classes of the mean over cases, as nnU-Net's ``foreground_mean``.
    """
    path = _summary(fold_folder(folders, configuration, fold, plans=plans, trainer=trainer))
    if path is None:
        return None
    summary = read_json(path)
    if not summary["metric_per_case"]:
        return None
    ending = read_json(folders.preprocessed / "dataset.json")["file_ending"]
    cases = {
        Path(case["prediction_file"]).name.removesuffix(ending): {
            name: _number(metrics["Dice"]) for name, metrics in case["metrics"].items()
        }
        for case in summary["metric_per_case"]
    }
    classes = {name: _number(metrics["Dice"]) for name, metrics in summary["mean"].items()}
    known = [dice for dice in classes.values() if dice is not None]
    return ValidationDice(mean=sum(known) / len(known) if known else None, classes=classes, cases=cases)


def _require_fold(folders: DatasetFolders, fold: Fold) -> None:
    if str(fold) == "all":
        return
    path = folders.preprocessed / SPLITS_FILE
    count = len(read_json(path)) if path.is_file() else 0
    if not int(fold) < count:
        there = f"folds 0 to {count - 1}" if count else "no folds: too few patients are labelled"
        raise InputError(f"there is no fold {fold}: {folders.name} has {there}; use one of them, or: -f all")


def _is_finished(folder: Path) -> bool:
    return _summary(folder) is not None and _is_whole_checkpoint(folder / FINAL)


def _how_to_continue(folder: Path, note: Note = no_note) -> list[str]:
    """Choose nnU-Net's option by what a killed process left, and clear away what it could not read.

    Every checkpoint holds the state of the random numbers, so that a training gives the same weights from either.
    """
    if folder.is_dir():
        remove_temporary_files(folder)
    if _is_whole_checkpoint(folder / FINAL):
        return ["--val"]
    (folder / FINAL).unlink(missing_ok=True)
    if _is_whole_checkpoint(folder / LATEST):
        return ["--c"]
    damaged = (folder / LATEST).is_file()
    (folder / LATEST).unlink(missing_ok=True)
    best = _is_whole_checkpoint(folder / BEST)
    if damaged:
        note(Cause.CHECKPOINT.value, f"from {BEST}" if best else "from the beginning")
    if best:
        return ["--c"]
    shutil.rmtree(folder, ignore_errors=True)
    return []


def _is_whole_checkpoint(path: Path) -> bool:
    """Say whether a checkpoint's zip archive is complete and its checksums hold, without loading torch."""
    if not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def _epochs(lines: Iterable[str]) -> Iterator[int]:
    """Yield once for every epoch that has begun; a continued training yields at once for those done before."""
    begun = 0
    for line in lines:
        if match := _EPOCH.search(line):
            while begun < int(match.group(1)):
                begun += 1
                yield begun
    yield begun + 1


def _summary(folder: Path) -> Path | None:
    """Return the validation's summary, or None where it is missing or a killed process left half of it."""
    path = folder / "validation" / "summary.json"
    try:
        read_json(path)
    except InputError:
        return None
    return path


def _number(value: Any) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return float(value)
