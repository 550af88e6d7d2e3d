"""The wheel: what a machine without a network gets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from nnunet_sam2.cohort.cohort import HIDDEN_LABELS
from nnunet_sam2.folders import VARIABLES, DatasetFolders
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.storage import read_json
from nnunet_sam2.volumes import read_label

PROJECT = Path(__file__).resolve().parent.parent
LIMIT_BYTES = 12_000_000
NO_NETWORK = """
import socket

def _refuse(*args, **kwargs):
    raise RuntimeError("the network was asked for")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = _refuse
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source") / "project"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(PROJECT / name, source)
    shutil.copytree(PROJECT / "nnunet_sam2", source / "nnunet_sam2", ignore=shutil.ignore_patterns("__pycache__"))
    out = source.parent / "wheel"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "-w", str(out), str(source)], check=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_weights_configurations_and_the_trainers_shim(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    weights = [name for name in sizes if name.endswith(".safetensors")]
    assert len(weights) == 1
    assert sizes[weights[0]] <= LIMIT_BYTES
    page = ("page.html.j2", "page.css", "main.js", "three.min.js", "three.LICENSE")
    others = ("sam2/configs/embedded.yaml", "trainers/ext/nnunet_sam2_trainer_shim.py", "py.typed")
    for name in (*others, *(f"report/assets/{asset}" for asset in page)):
        assert f"nnunet_sam2/{name}" in sizes


def test_the_installed_wheel_labels_a_cohort_without_a_network(
    wheel: Path, generated_folder: Path, fresh_dataset: DatasetFolders, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, timeout=300)
    (site / "sitecustomize.py").write_text(NO_NETWORK)
    environment = os.environ | {"PYTHONPATH": str(site), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment |= {name: str(tmp_path / name) for name in VARIABLES}
    script = "import sys, nnunet_sam2, nnunet_sam2.cli.main as cli; print(nnunet_sam2.__file__); sys.exit(cli.main())"
    command = [sys.executable, "-c", script, "label", "-d", str(fresh_dataset.dataset_id), "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(str(site))
    out = fresh_dataset.results / "nnunet_sam2" / "labels_auto"
    labels = sorted(out.glob("*.nii.gz"))
    assert len(labels) == 2
    dice = []
    for path in labels:
        label_zyx, _ = read_label(path)
        assert set(np.unique(label_zyx)) == {0, 1, 2}
        truth_zyx, _ = read_label(generated_folder / HIDDEN_LABELS / path.name)
        dice += dice_by_class(label_zyx, truth_zyx, (1, 2)).values()
        record = read_json(out / "members" / f"{path.name.removesuffix('.nii.gz')}.json")
        assert record["sam2"]["name"] == "embedded"
    assert np.mean(dice) > 0.6
