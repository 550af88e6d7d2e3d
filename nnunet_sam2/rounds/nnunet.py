"""nnU-Net as a loop uses it: plan, preprocess, make a round's configuration, train, validate, predict, export.

Every function may be called again with the same arguments: what is whole already is kept, what a killed process left
is made anew, and the same inputs give the same files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.trainers.settings import RoundSettings

PLANS = "nnUNetPlans"
TRAINER = "nnUNetTrainerSAM2"
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


def model_folder(
    folders: DatasetFolders, configuration: str, *, plans: str = PLANS, trainer: str = TRAINER
) -> Path:
    """Return ``RESULTS/DatasetXXX/TRAINER__PLANS__CONFIGURATION``."""
    return folders.results / f"{trainer}__{plans}__{configuration}"


def plan_and_preprocess(
    folders: DatasetFolders,
    cohort: Cohort,
    configuration: str,
    *,
    log: Path,
    plans: str = PLANS,
    planner: str | None = None,
    processes: int = 1,
) -> Path:
    """Fingerprint, plan and preprocess the labelled cases with nnU-Net's own command; return the plans file.

    Plans that a user made before are kept. Raises InputError where the plans lack ``configuration`` (2D data have only
    ``2d``) or the labelled cases changed after rounds were built on them; StageError where nnU-Net fails.
    """
    raise NotImplementedError


def write_splits(folders: DatasetFolders, cohort: Cohort) -> list[dict[str, list[str]]]:
    """Write ``splits_final.json`` (by patient, labelled cases only) and return the folds; a valid one is kept.

    Empty (and no file) where all labelled cases are one patient's: only fold ``all`` can then be trained.
    """
    raise NotImplementedError


def preprocess_unlabelled(
    folders: DatasetFolders,
    cohort: Cohort,
    configuration: str,
    case_ids: Sequence[str],
    *,
    plans: str = PLANS,
) -> Path:
    """Preprocess the images of unlabelled cases once, in this process, and return their folder."""
    raise NotImplementedError


def light_configuration(plans: Mapping[str, Any], base_configuration: str) -> dict[str, Any]:
    """Return overrides of ``base_configuration`` with which it trains on a CPU."""
    raise NotImplementedError


def light_settings(plans: Mapping[str, Any], base_configuration: str) -> RoundSettings:
    """Return the schedule that goes with `light_configuration`."""
    raise NotImplementedError


def make_round_configuration(
    folders: DatasetFolders,
    cohort: Cohort,
    *,
    base_configuration: str,
    name: str,
    settings: RoundSettings,
    pseudo_cases: Sequence[str] = (),
    labels: Path | None = None,
    confidence: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    plans: str = PLANS,
) -> RoundConfiguration:
    """Build the immutable configuration ``name`` (such as ``3d_fullres_r01``) and its data folder.

    ``labels`` holds ``CASE<file_ending>`` of every pseudo case, ``confidence`` (if given) ``CASE<file_ending>`` with
    values 0 to 1. Without pseudo cases this is a round on human labels alone. ``settings`` receives the pseudo cases
    and the confidence folder here. ``overrides`` are configuration keys such as `light_configuration` returns.
    Raises InputError where ``name`` exists with other content.
    """
    raise NotImplementedError


def train(
    folders: DatasetFolders,
    configuration: str,
    fold: Fold,
    *,
    device: str,
    log: Path,
    threads: int | None = None,
    plans: str = PLANS,
    trainer: str = TRAINER,
) -> Trained:
    """Run ``nnUNetv2_train`` to its end, continuing a killed training from its latest checkpoint.

    On the CPU, augmentation runs in the training process, so that a continued training gives the same weights.
    """
    raise NotImplementedError


def read_validation(
    folders: DatasetFolders, configuration: str, fold: Fold, *, plans: str = PLANS, trainer: str = TRAINER
) -> ValidationDice | None:
    """Read the validation Dice of a finished training; None where it had no validation cases."""
    raise NotImplementedError


def predict_cases(
    folders: DatasetFolders,
    configuration: str,
    folds: Sequence[Fold],
    cases: Mapping[str, Sequence[Path]],
    out: Path,
    *,
    device: str,
    log: Path,
    save_probabilities: bool = False,
    mirroring: bool = True,
    threads: int | None = None,
    plans: str = PLANS,
    trainer: str = TRAINER,
) -> list[Path]:
    """Segment ``cases`` (id -> image files) and return the label files ``OUT/CASE<file_ending>``.

    With ``save_probabilities``, ``OUT/probabilities/CASE.npz`` holds ``prob_czyx``: uint8, 0 to 255, the background as
    channel 0, then the cohort's class values in ascending order, on the raw image's grid. A case whose record
    ``OUT/records/CASE.json`` names the same inputs and whose files are whole is not computed again.
    """
    raise NotImplementedError


def export_model(
    folders: DatasetFolders,
    configuration: str,
    folds: Sequence[Fold],
    out: Path,
    *,
    plans: str = PLANS,
    trainer: str = TRAINER,
) -> Path:
    """Write a model folder for stock nnU-Net (``nnUNetv2_predict_from_modelfolder -m OUT``) and return it."""
    raise NotImplementedError
