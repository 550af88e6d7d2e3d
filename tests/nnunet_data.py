"""A tiny generated dataset, planned and preprocessed by real nnU-Net once a session, and variations made of it."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.storage import read_json, write_json
from nnunet_sam2.trainers.dataset import distrust_from_confidence, write_distrust
from nnunet_sam2.trainers.settings import SETTINGS_KEY, RoundSettings

LABELLED = ("subject_000", "subject_001", "subject_002")
PSEUDO = ("subject_003", "subject_004")


@dataclass(frozen=True, kw_only=True)
class NnunetRoots:
    """Name one set of nnU-Net's three folders and the dataset in them."""

    root: Path
    dataset: str

    @property
    def environment(self) -> dict[str, str]:
        """Return nnU-Net's variables for work on few cores."""
        return {
            **{f"nnUNet_{name}": str(self.root / name) for name in ("raw", "preprocessed", "results")},
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "nnUNet_compile": "f",
            "OMP_NUM_THREADS": "1",
        }

    @property
    def raw(self) -> Path:
        return self.root / "raw" / self.dataset

    @property
    def pseudo_labels(self) -> Path:
        return self.root / "pseudo_labels"

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed" / self.dataset

    @property
    def results(self) -> Path:
        return self.root / "results" / self.dataset

    @property
    def plans(self) -> dict[str, Any]:
        return read_json(self.preprocessed / "nnUNetPlans.json")

    def copy_to(self, root: Path) -> NnunetRoots:
        """Copy raw and preprocessed data, so that a test may write into them."""
        for name in ("raw", "preprocessed", "pseudo_labels"):
            shutil.copytree(self.root / name, root / name)
        return NnunetRoots(root=root, dataset=self.dataset)


def make_tiny_nnunet(root: Path, dataset: DatasetFolders, hidden_labels: Path) -> NnunetRoots:
    """Plan and preprocess the labelled cases of a converted dataset, in folders of its own, with a small network."""
    roots = NnunetRoots(root=root, dataset=dataset.name)
    shutil.copytree(dataset.raw, roots.raw)
    shutil.copytree(hidden_labels, roots.pseudo_labels)
    command = ["nnUNetv2_plan_and_preprocess", "-d", str(dataset.dataset_id), "-c", "2d", "3d_fullres"]
    run_tool([*command, "-npfp", "1", "-np", "1", "1"], {**roots.environment, "nnUNet_n_proc_DA": "1"})
    plans = roots.plans
    for configuration in ("2d", "3d_fullres"):
        network = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
        network["features_per_stage"] = [4 * 2 ** min(stage, 2) for stage in range(network["n_stages"])]
        plans["configurations"][configuration]["batch_size"] = 2
    write_json(roots.preprocessed / "nnUNetPlans.json", plans)
    return roots


def run_tool(command: Sequence[str], environment: dict[str, str], *, check: bool = True) -> subprocess.CompletedProcess:
    """Run a console script of this Python's environment."""
    script = Path(sys.executable).parent / command[0]
    done = subprocess.run(
        [str(script), *command[1:]], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def preprocess(
    roots: NnunetRoots, configuration: str, case: str, image: Path, label: Path, *, data_identifier: str
) -> None:
    """Preprocess one case with nnU-Net's own class, in this process."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(roots.plans)
    folder = roots.preprocessed / data_identifier
    folder.mkdir(parents=True, exist_ok=True)
    DefaultPreprocessor(verbose=False).run_case_save(
        str(folder / case),
        [str(image)],
        str(label),
        manager,
        manager.get_configuration(configuration),
        read_json(roots.preprocessed / "dataset.json"),
    )


def add_round(
    roots: NnunetRoots,
    *,
    base: str,
    name: str,
    settings: RoundSettings,
    confidence: float | np.ndarray | None = 0.5,
    sure: float | None = None,
) -> None:
    """Add a round's configuration: the labelled cases, those of ``settings.pseudo_cases``, and their distrust maps.

    ``sure`` is the probability of each label in probabilities that lie behind the distrust.
    """
    plans = roots.plans
    identifier = f"nnUNetPlans_{name}"
    shutil.copytree(
        roots.preprocessed / plans["configurations"][base]["data_identifier"], roots.preprocessed / identifier
    )
    for case in settings.pseudo_cases:
        image, label = roots.raw / "imagesUn" / f"{case}_0000.nii.gz", roots.pseudo_labels / f"{case}.nii.gz"
        preprocess(roots, base, case, image, label, data_identifier=identifier)
        if confidence is not None:
            shape = preprocessed_shape(roots.preprocessed / identifier, case)
            soft_czyx = None if sure is None else soft_labels(roots, identifier, case, sure)
            distrust = distrust_from_confidence(np.broadcast_to(np.asarray(confidence), shape))
            patch_size = plans["configurations"][base]["patch_size"]
            write_distrust(roots.preprocessed / f"{identifier}_conf", case, distrust, patch_size, soft_czyx=soft_czyx)
    add_configuration(
        roots, name, {"inherits_from": base, "data_identifier": identifier, SETTINGS_KEY: settings.to_json()}
    )


def add_configuration(roots: NnunetRoots, name: str, configuration: dict[str, Any]) -> None:
    """Put a configuration into the plans."""
    plans = roots.plans
    plans["configurations"][name] = configuration
    write_json(roots.preprocessed / "nnUNetPlans.json", plans)


def soft_labels(roots: NnunetRoots, identifier: str, case: str, sure: float) -> np.ndarray:
    """Return probabilities of the foreground channels: a preprocessed case's label has ``sure``, the others 0."""
    import blosc2

    labels = read_json(roots.preprocessed / "dataset.json")["labels"]
    seg_zyx = blosc2.open(str(roots.preprocessed / identifier / f"{case}_seg.b2nd"), mode="r")[:][0]
    foreground = [value for name, value in labels.items() if name not in ("background", "ignore")]
    return np.stack([np.isin(seg_zyx, value) * np.float32(sure) for value in foreground])


def preprocessed_shape(folder: Path, case: str) -> tuple[int, ...]:
    """Return the (z, y, x) shape of a preprocessed case."""
    import blosc2

    return tuple(blosc2.open(str(folder / f"{case}.b2nd"), mode="r").shape[1:])


def make_trainer(roots: NnunetRoots, configuration: str, fold: int | str = 0, *, trainer: Any = None) -> Any:
    """Build a trainer as nnU-Net's command does, on the CPU; the caller has set nnU-Net's variables."""
    import torch

    from nnunet_sam2.trainers.nnUNetTrainerSAM2 import nnUNetTrainerSAM2

    plans = copy.deepcopy(roots.plans)
    plans["continue_training"] = False
    dataset_json = read_json(roots.preprocessed / "dataset.json")
    return (trainer or nnUNetTrainerSAM2)(plans, configuration, fold, dataset_json, torch.device("cpu"))
