"""A tiny raw dataset for tests: anisotropic noisy volumes with empty borders, two objects, an exact cohort."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from nnunet_sam2.cohort.cohort import Case, Cohort, Role
from nnunet_sam2.folders import VARIABLES, DatasetFolders
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.rounds.nnunet import (
    RoundConfiguration,
    light_configuration,
    make_round_configuration,
    plan_and_preprocess,
    predict_cases,
    preprocess_unlabelled,
    read_plans,
    train,
    write_splits,
)
from nnunet_sam2.storage import write_json
from nnunet_sam2.trainers.settings import RoundSettings
from nnunet_sam2.volumes import read_label, write_image, write_label, write_map
from nnunet_sam2.voxel_hashes import voxel_hash

DATASET = "Dataset502_Anisotropic"
LABELS: dict[str, int | list[int]] = {"background": 0, "large": 1, "small": 2}
FOLDERS = {Role.LABELLED: "imagesTr", Role.UNLABELLED: "imagesUn", Role.TEST: "imagesTs"}


def tiny_volume(rng: np.random.Generator, shape_zyx: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image (z, y, x), zero near its borders, and its label map."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape_zyx), indexing="ij")
    dz, dy, dx = rng.uniform(-0.15, 0.15, 3)
    large = ((z - dz) / 0.7) ** 2 + ((y - dy) / 0.6) ** 2 + ((x - dx) / 0.5) ** 2 < 1
    small = ((z - dz) / 0.4) ** 2 + ((y - dy - 0.2) / 0.25) ** 2 + ((x - dx) / 0.25) ** 2 < 1
    label = np.where(small, 2, np.where(large, 1, 0)).astype(np.uint8)
    image = 100 + 60 * label + rng.normal(0, 8, shape_zyx)
    inside = (np.abs(z) < 0.95) & (y**2 + x**2 < 0.9)
    return np.where(inside, image, 0).astype(np.float32), label


def write_tiny_dataset(
    folders: DatasetFolders, *, labelled: int = 4, unlabelled: int = 2, test: int = 1, seed: int = 0
) -> Cohort:
    """Write images, labels, ``dataset.json`` and ``cohort.json`` of a tiny 3D dataset."""
    rng = np.random.default_rng(seed)
    cases = []
    roles = [Role.LABELLED] * labelled + [Role.UNLABELLED] * unlabelled + [Role.TEST] * test
    for number, role in enumerate(roles):
        case_id = f"case_{number:02d}"
        shape = (8 + number % 3, 32 + number, 30)
        geometry = Geometry(shape_zyx=shape, spacing_xyz_mm=(1.0, 1.0 + 0.05 * (number % 3), 3.5 + 0.3 * (number % 2)))
        image, label = tiny_volume(rng, shape)
        image_file = f"{FOLDERS[role]}/{case_id}_0000.nii.gz"
        write_image(folders.raw / image_file, image[None], geometry)
        hidden = role is Role.UNLABELLED
        label_file = f"{'labelsHidden' if hidden else 'labelsTs' if role is Role.TEST else 'labelsTr'}/{case_id}.nii.gz"
        write_label(folders.raw / label_file, label, geometry)
        cases.append(
            Case(
                case_id=case_id,
                role=role,
                patient=case_id,
                images=(image_file,),
                label=None if hidden else label_file,
                hidden_label=label_file if hidden else None,
                geometry=geometry,
                voxel_hash=voxel_hash(image[None]),
            )
        )
    write_json(
        folders.raw / "dataset.json",
        {"channel_names": {"0": "MR"}, "labels": LABELS, "numTraining": labelled, "file_ending": ".nii.gz"},
    )
    cohort = Cohort(
        name=folders.name,
        root=folders.raw,
        channels=("MR",),
        labels=LABELS,
        file_ending=".nii.gz",
        cases=tuple(cases),
        provenance={"source": "tests"},
    )
    cohort.save()
    return cohort


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Hold a dataset's folders and cohort, with the root that nnU-Net's variables point into."""

    root: Path
    folders: DatasetFolders
    cohort: Cohort

    @property
    def unlabelled(self) -> list[str]:
        return [case.case_id for case in self.cohort.unlabelled]

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    def copy_to(self, root: Path) -> Dataset:
        """Copy everything, so that a test may write into it."""
        for name in VARIABLES:
            if (self.root / name).is_dir():
                shutil.copytree(self.root / name, root / name)
        return dataset_at(root)

    def hidden_labels(self, folder: Path, *, confidence: float = 0.75) -> Path:
        """Copy the hidden labels as if they were machine labels, with a confidence that varies along x."""
        for case in self.cohort.unlabelled:
            label, geometry = read_label(self.folders.raw / str(case.hidden_label))
            write_label(folder / f"{case.case_id}.nii.gz", label, geometry)
            ramp = np.linspace(0, confidence, label.shape[2], dtype=np.float32)
            write_map(
                folder / "confidence" / f"{case.case_id}.nii.gz", np.broadcast_to(ramp, label.shape).copy(), geometry
            )
        return folder

    def test_images(self) -> dict[str, tuple[Path, ...]]:
        return {case.case_id: self.cohort.image_paths(case) for case in self.cohort.test}


def dataset_at(root: Path) -> Dataset:
    """Find the dataset that `write_tiny_dataset` wrote under ``root``."""
    raw, preprocessed, results = (root / name / DATASET for name in VARIABLES)
    folders = DatasetFolders(name=DATASET, raw=raw, preprocessed=preprocessed, results=results)
    return Dataset(root=root, folders=folders, cohort=Cohort.load(raw))


def point_at(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Set nnU-Net's variables to ``root``."""
    for name in VARIABLES:
        patch.setenv(name, str(root / name))


def small_round(dataset: Dataset, name: str, **changes: object) -> RoundConfiguration:
    """Make a round with both unlabelled cases, a network of 8 features and two short epochs."""
    overrides = light_configuration(read_plans(dataset.folders), "3d_fullres")
    kwargs = overrides["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [8] * kwargs["n_stages"]
    settings = RoundSettings(
        num_epochs=2,
        num_iterations_per_epoch=3,
        num_val_iterations_per_epoch=1,
        save_every=1,
        optimizer="adamw",
        initial_lr=1e-2,
        mirroring=False,
        pseudo_per_batch=0.5,
        seed=1,
        threads=1,
        sequential_validation=True,
    )
    labels = dataset.root / "labels"
    if not labels.is_dir():
        dataset.hidden_labels(labels)
    arguments = {
        "base_configuration": "3d_fullres",
        "settings": settings,
        "pseudo_cases": dataset.unlabelled,
        "labels": labels,
        "confidence": labels / "confidence",
        "overrides": overrides,
        **changes,
    }
    return make_round_configuration(dataset.folders, dataset.cohort, name=name, **arguments)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def planned_once(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Plan and preprocess the tiny anisotropic dataset. Read only."""
    root = tmp_path_factory.mktemp("planned")
    raw, preprocessed, results = (root / name / DATASET for name in VARIABLES)
    write_tiny_dataset(DatasetFolders(name=DATASET, raw=raw, preprocessed=preprocessed, results=results))
    dataset = dataset_at(root)
    with pytest.MonkeyPatch.context() as patch:
        point_at(patch, root)
        plan_and_preprocess(dataset.folders, dataset.cohort, "3d_fullres", log=dataset.log)
    write_splits(dataset.folders, dataset.cohort)
    preprocess_unlabelled(dataset.folders, dataset.cohort, "3d_fullres", dataset.unlabelled)
    return dataset


@pytest.fixture(scope="session")
def trained_once(planned_once: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Train one small round on it and predict the test case. Read only."""
    dataset = planned_once.copy_to(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        point_at(patch, dataset.root)
        small_round(dataset, "3d_fullres_r01")
        train(dataset.folders, "3d_fullres_r01", 0, device="cpu", log=dataset.log, threads=1)
        predict_cases(
            dataset.folders,
            "3d_fullres_r01",
            [0],
            dataset.test_images(),
            dataset.root / "predicted",
            device="cpu",
            log=dataset.log,
            save_probabilities=True,
            threads=1,
        )
    return dataset


@pytest.fixture
def planned(planned_once: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Give one test a copy of the planned dataset, with nnU-Net's variables pointing at it."""
    point_at(monkeypatch, tmp_path)
    return planned_once.copy_to(tmp_path)


@pytest.fixture
def trained(trained_once: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Give one test a copy of the trained dataset, with nnU-Net's variables pointing at it."""
    point_at(monkeypatch, tmp_path)
    shutil.copytree(trained_once.root / "predicted", tmp_path / "predicted")
    shutil.copytree(trained_once.root / "labels", tmp_path / "labels")
    return trained_once.copy_to(tmp_path)
