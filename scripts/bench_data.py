"""Cohorts for the benchmarks, cut from fully labelled folders by a seed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_sam2.cli.main import main as command
from nnunet_sam2.folders import VARIABLES, DatasetFolders, find_dataset

PROJECT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("NNUNET_SAM2_DATA", PROJECT.parent / "shared" / "data"))
WEIGHTS = Path(os.environ.get("NNUNET_SAM2_WEIGHTS", PROJECT.parent / "shared" / "weights"))
HIERA_TINY_IMAGE = WEIGHTS / "sam2_hiera_tiny_image.safetensors"


@dataclass(frozen=True, kw_only=True)
class BenchSet:
    """Say how a set is cut and trained."""

    name: str
    dataset_id: int
    configuration: str
    fold: str
    n_labelled: int
    n_unlabelled: int
    n_test: int
    labels: str
    iterations_per_epoch: int
    volumes: str = "*"
    """Which volumes are drawn from, as a pattern of file names: one of each patient."""


SETS = {
    s.name: s
    for s in (
        BenchSet(
            name="hippocampus",
            dataset_id=601,
            configuration="3d_fullres",
            fold="0",
            n_labelled=8,
            n_unlabelled=60,
            n_test=40,
            labels="anterior=1,posterior=2",
            iterations_per_epoch=60,
        ),
        BenchSet(
            name="chaos_t2_mr",
            dataset_id=611,
            configuration="2d",
            fold="all",
            n_labelled=3,
            n_unlabelled=5,
            n_test=4,
            labels="liver=1,right_kidney=2,left_kidney=3,spleen=4",
            iterations_per_epoch=40,
        ),
        BenchSet(
            name="acdc",
            dataset_id=621,
            configuration="2d",
            fold="0",
            n_labelled=4,
            n_unlabelled=24,
            n_test=12,
            labels="right_ventricle=1,myocardium=2,left_ventricle=3",
            iterations_per_epoch=40,
            volumes="*_frame01.*",
        ),
    )
}


def cut(bench: BenchSet, seed: int, folder: Path) -> tuple[Path, Path]:
    """Link a training and a test part of a set into ``folder`` and return both; the seed draws the cases."""
    source = DATA / bench.name
    if not source.is_dir():
        raise SystemExit(f"{source} is missing; set NNUNET_SAM2_DATA to the folder that holds {bench.name}")
    names = sorted(path.name for path in (source / "images").glob(bench.volumes))
    patients = sorted({re.split(r"_(?:ed|es|ED|ES|frame)", name.split(".")[0])[0] for name in names})
    if len(patients) != len(names):
        raise SystemExit(f"{bench.name}: {bench.volumes} matches several volumes of a patient; a cut draws one of each")
    if len(names) < bench.n_labelled + bench.n_unlabelled + bench.n_test:
        raise SystemExit(f"{bench.name}: {len(names)} volumes match {bench.volumes}, fewer than the cut asks for")
    order = np.random.default_rng(seed).permutation(len(names))
    n_train = bench.n_labelled + bench.n_unlabelled
    parts = {"train": order[:n_train], "test": order[n_train : n_train + bench.n_test]}
    for part, indices in parts.items():
        for kind in ("images", "labels"):
            target = folder / part / kind
            target.mkdir(parents=True, exist_ok=True)
            for name in (names[i] for i in indices):
                if not (target / name).exists():
                    (target / name).symlink_to(source / kind / name)
    return folder / "train", folder / "test"


def converted(bench: BenchSet, seed: int, work: Path, name: str) -> DatasetFolders:
    """Return the dataset of a cut in nnU-Net's folders under ``work``, which the environment then names; made once."""
    for root in VARIABLES:
        folder = work / root
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[root] = str(folder)
    dataset_id = bench.dataset_id + seed
    if not (work / "nnUNet_raw" / f"Dataset{dataset_id:03d}_{name}").is_dir():
        train, test = cut(bench, seed, work / "source" / name)
        status = command(
            [
                *("convert", str(train), "-d", str(dataset_id), "-n", name, "--layout", "folder", "--test", str(test)),
                *("--labelled", str(bench.n_labelled), "--seed", str(seed), "--channels", "MR"),
                *("--labels", bench.labels),
            ]
        )
        if status:
            raise SystemExit(status)
    return find_dataset(dataset_id)
