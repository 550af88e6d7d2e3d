"""Who is labelled, who is not, who is tested: the split that papers publish on, and draws of other sets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_data import DATA
from bench_sets import SETS, file_of, patient_of

from nnunet_sam2.cli.main import main as command
from nnunet_sam2.folders import VARIABLES, DatasetFolders, find_dataset


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Say how a set is split and trained."""

    name: str
    dataset_id: int
    configuration: str
    labels: str
    channel: str
    labelled: tuple[int, ...]
    """Numbers of labelled patients that the bench asks for."""
    test_patients: int | None = None
    """Patients drawn for the test by the seed; None: the set's own lists decide, and the seed only trains."""


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol(
            name="acdc_ssl4mis",
            dataset_id=700,
            configuration="2d",
            labels="right_ventricle=1,myocardium=2,left_ventricle=3",
            channel="MR",
            labelled=(1, 3, 7),
        ),
        Protocol(
            name="chaos_t2_mr",
            dataset_id=740,
            configuration="2d",
            labels="liver=1,right_kidney=2,left_kidney=3,spleen=4",
            channel="MR",
            labelled=(3,),
            test_patients=4,
        ),
        Protocol(
            name="hippocampus",
            dataset_id=760,
            configuration="3d_fullres",
            labels="anterior=1,posterior=2",
            channel="MR",
            labelled=(8,),
            test_patients=40,
        ),
        Protocol(
            name="btcv_ct",
            dataset_id=780,
            configuration="2d",
            labels="spleen=1,right_kidney=2,left_kidney=3,gallbladder=4,oesophagus=5,liver=6,stomach=7,aorta=8,"
            "vena_cava=9,portal_and_splenic_vein=10,pancreas=11,right_adrenal=12,left_adrenal=13",
            channel="CT8bit",
            labelled=(3,),
            test_patients=2,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Cohorts:
    """Hold a converted split and the truth of the cases whose labels it keeps back."""

    folders: DatasetFolders
    truth: Path
    """Labels of the unlabelled cases; nothing learns from them but the bound."""


def converted(protocol: Protocol, labelled: int, seed: int, work: Path) -> Cohorts:
    """Return the dataset of one split in nnU-Net's folders under ``work``; the environment then names these."""
    for root in VARIABLES:
        folder = work / root
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[root] = str(folder)
    number = protocol.dataset_id + 4 * protocol.labelled.index(labelled) + (seed if protocol.test_patients else 0)
    name = f"{protocol.name}-{labelled}" + (f"-seed{seed}" if protocol.test_patients else "")
    source = work / "source" / name
    if not (work / "nnUNet_raw" / f"Dataset{number:03d}_{name}").is_dir():
        _link(protocol, _split(protocol, labelled, seed), source)
        status = command(
            [
                *("convert", str(source / "train"), "-d", str(number), "-n", name, "--layout", "folder"),
                *("--test", str(source / "test"), "--channels", protocol.channel, "--labels", protocol.labels),
            ]
        )
        if status:
            raise SystemExit(status)
    return Cohorts(folders=find_dataset(number), truth=source / "truth")


def _split(protocol: Protocol, labelled: int, seed: int) -> dict[str, list[str]]:
    """Return the files of the labelled, unlabelled and test patients."""
    files = _files(protocol.name)
    if protocol.test_patients is None:
        order, test = (_listed(protocol.name, f"{part}.txt") for part in ("train_order", "test"))
    else:
        drawn = [str(p) for p in np.random.default_rng(seed).permutation(sorted(files))]
        test, order = drawn[: protocol.test_patients], drawn[protocol.test_patients :][:70]
    parts = {"labelled": order[:labelled], "unlabelled": order[labelled:], "test": test}
    return {part: [name for patient in patients for name in files[patient]] for part, patients in parts.items()}


def _files(name: str) -> Mapping[str, Sequence[str]]:
    bench, files = SETS[name], {}
    for folder in (bench.name, *([bench.beside] if bench.beside else [])):
        source = DATA / folder / "images"
        if not source.is_dir():
            raise SystemExit(f"{source} is missing; set NNUNET_SAM2_DATA to the folder that holds {folder}")
        for path in sorted(source.iterdir()):
            files.setdefault(patient_of(path.name), []).append(path.name)
    return files


def _listed(name: str, file: str) -> list[str]:
    return (DATA / name / file).read_text(encoding="utf-8").split()


def _link(protocol: Protocol, split: Mapping[str, Sequence[str]], source: Path) -> None:
    bench = SETS[protocol.name]
    for part, names in split.items():
        for name in names:
            images = source / ("test" if part == "test" else "train") / "images"
            labels = source / "truth" if part == "unlabelled" else images.parent / "labels"
            for kind, folder in (("images", images), ("labels", labels)):
                folder.mkdir(parents=True, exist_ok=True)
                if not (folder / name).exists():
                    (folder / name).symlink_to(file_of(bench, kind, name))
