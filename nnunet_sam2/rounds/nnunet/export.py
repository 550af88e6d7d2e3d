"""A trained model as stock nnU-Net knows it: nothing in it needs this package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds.nnunet.base import PLANS, TRAINER, Fold, final_checkpoint, model_folder, resolved_configuration
from nnunet_sam2.rounds.nnunet.postprocessing import read_postprocessing, write_postprocessing
from nnunet_sam2.storage import atomic_folder, read_json, write_json, write_text
from nnunet_sam2.trainers.settings import SETTINGS_KEY

STOCK_TRAINER = "nnUNetTrainer"
MARKER = "nnunet_sam2_export.json"
"""Tells an exported folder, which may be replaced, from a folder of the user's, which may not."""


def export_model(
    folders: DatasetFolders,
    configuration: str,
    folds: Sequence[Fold],
    out: Path,
    *,
    plans: str = PLANS,
    trainer: str = TRAINER,
) -> Path:
    """Write a model folder for stock nnU-Net (``nnUNetv2_predict_from_modelfolder -m OUT``) and return it.

    The network is stock nnU-Net's, so the checkpoint's ``trainer_name`` becomes ``nnUNetTrainer`` and the plans keep
    one configuration, under the name of the one it came from (``3d_fullres`` for ``3d_fullres_r02``). The optimiser's
    state is left out. Where post-processing was decided, nnU-Net's ``postprocessing.pkl`` comes with it. Raises
    `InputError` where ``out`` is a folder that no export wrote.
    """
    from nnunet_sam2.trainers.checkpoints import read_checkpoint, write_checkpoint

    if not folds:
        raise InputError("export needs at least one fold")
    checkpoints = [final_checkpoint(folders, configuration, fold, plans=plans, trainer=trainer) for fold in folds]
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / MARKER).is_file())):
        raise InputError(f"{out} exists and is no exported model; give another folder with -o")
    model = model_folder(folders, configuration, plans=plans, trainer=trainer)
    stock_plans, name = stock_plans_of(read_json(model / "plans.json"), configuration)
    dataset = read_json(model / "dataset.json")
    with atomic_folder(out) as folder:
        for fold, path in zip(folds, checkpoints, strict=True):
            stock = stock_checkpoint(read_checkpoint(path), stock_plans, name, dataset)
            write_checkpoint(stock, folder / f"fold_{fold}" / "checkpoint_final.pth")
        write_text(folder / "plans.json", json.dumps(stock_plans, indent=4))
        write_text(folder / "dataset.json", json.dumps(dataset, indent=4))
        fingerprint = model / "dataset_fingerprint.json"
        if fingerprint.is_file():
            write_text(folder / "dataset_fingerprint.json", fingerprint.read_text(encoding="utf-8"))
        if (decided := read_postprocessing(model)) is not None:
            write_postprocessing(folder, decided)
        write_json(
            folder / MARKER,
            {"dataset": folders.name, "configuration": configuration, "folds": [str(f) for f in folds], "as": name},
        )
    return out


def stock_plans_of(plans: dict[str, Any], configuration: str) -> tuple[dict[str, Any], str]:
    """Return plans with one configuration, whole and without this package's settings, and that one's name."""
    name, configurations = configuration, plans["configurations"]
    while parent := configurations[name].get("inherits_from"):
        name = parent
    resolved = {k: v for k, v in resolved_configuration(plans, configuration).items() if k != SETTINGS_KEY}
    # Cascades are not exported, and names of data folders on this machine serve nobody.
    resolved["data_identifier"] = f"{plans['plans_name']}_{name}"
    for key in ("next_stage", "previous_stage"):
        resolved.pop(key, None)
    kept = {k: v for k, v in plans.items() if k not in ("configurations", "continue_training")}
    return {**kept, "configurations": {name: resolved}}, name


def stock_checkpoint(
    checkpoint: dict[str, Any], plans: dict[str, Any], configuration: str, dataset: dict[str, Any]
) -> dict[str, Any]:
    """Keep of a checkpoint what prediction and transfer need, as stock nnU-Net's trainer would have written it."""
    fold = checkpoint["init_args"]["fold"]
    return {
        "network_weights": checkpoint["network_weights"],
        "trainer_name": STOCK_TRAINER,
        "init_args": {"plans": plans, "configuration": configuration, "fold": fold, "dataset_json": dataset},
        "inference_allowed_mirroring_axes": checkpoint.get("inference_allowed_mirroring_axes"),
        "current_epoch": checkpoint["current_epoch"],
    }
