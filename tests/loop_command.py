"""The whole loop by the command line on a tiny cohort, to be run, killed and compared."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds.ledger import LEDGER_FILE, read_events
from nnunet_sam2.storage import TEMPORARY_MARK, file_hash

RUN = [
    "run", "-d", "501", "-c", "3d_fullres", "-f", "0", "--sam2", "untrained", "--image-size", "64", "--rounds", "2",
    "--device", "cpu", "--profile", "cpu", "--epochs", "2", "--iterations", "2", "--mean-change", "0",
    "--worst-tenth-change", "0", "--validation-drop", "1", "--threads", "1",
    # an untrained SAM 2 and four steps of training: labels do what they like
    "--volume-drift", "1e9", "--empty-rise", "1", "--oscillation", "0",
]  # fmt: skip
LONGEST_S = 1800.0
COMMAND = [sys.executable, "-m", "nnunet_sam2.cli.main"]


def environment(root: Path) -> dict[str, str]:
    """Return the variables with which nnU-Net keeps its folders under ``root`` and works on one core."""
    return {
        **os.environ,
        **{f"nnUNet_{name}": str(root / f"nnUNet_{name}") for name in ("raw", "preprocessed", "results")},
        "OMP_NUM_THREADS": "1",
        "nnUNet_def_n_proc": "1",
    }


def command(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``nnunet_sam2`` with these arguments to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], env=environment(root), capture_output=True, text=True, timeout=LONGEST_S
    )


def start(root: Path, *arguments: str, argv: list[str] | None = None) -> subprocess.Popen[str]:
    """Start ``nnunet_sam2`` with these arguments."""
    return subprocess.Popen(
        [*(argv or COMMAND), *arguments],
        env=environment(root),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c if os.name == "posix" else None,
    )


def heed_ctrl_c() -> None:
    """Undo what a shell and ``nohup`` do to what they start: there SIGINT and SIGHUP are ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def copy_of(dataset: DatasetFolders, root: Path) -> Path:
    """Make nnU-Net's folders under ``root``, with a copy of the raw dataset."""
    for name in ("raw", "preprocessed", "results"):
        (root / f"nnUNet_{name}").mkdir(parents=True)
    shutil.copytree(dataset.raw, root / "nnUNet_raw" / dataset.name)
    return root


def run_folder(root: Path) -> Path:
    """Return the folder of the run under ``root``."""
    return next((root / "nnUNet_results").glob("*/nnunet_sam2/3d_fullres_fold0"))


def label_hashes(root: Path) -> dict[str, str]:
    """Hash all label and confidence files of the run."""
    run = run_folder(root)
    found = [p for p in run.rglob("*.nii.gz") if TEMPORARY_MARK not in p.name]
    assert any("/r02/labels/" in str(p) for p in found)
    assert any("/confidence/" in str(p) for p in found)
    return {str(p.relative_to(run)): file_hash(p) for p in found}


def human_hashes(root: Path) -> dict[str, str]:
    """Hash everything under the raw dataset: images, human labels, the cohort's record."""
    raw = root / "nnUNet_raw"
    return {str(p.relative_to(raw)): file_hash(p) for p in raw.rglob("*") if p.is_file()}


def was_started(root: Path, stage: str, process: int) -> bool:
    """Say whether a process has begun a stage."""
    return any(e["event"] == "started" and e["stage"] == stage and e["process"] == process for e in _events(root))


def was_done(root: Path, stage: str, process: int) -> bool:
    """Say whether a process that has begun a stage is through with it."""
    begun = False
    for event in _events(root):
        begun = begun or (event["event"] == "started" and event["stage"] == stage and event["process"] == process)
        if begun and event["event"] == "done" and event["stage"] == stage:
            return True
    return False


def _events(root: Path) -> list[dict[str, Any]]:
    paths = (root / "nnUNet_results").glob(f"*/nnunet_sam2/3d_fullres_fold0/{LEDGER_FILE}")
    return [event for path in paths for event in read_events(path)]
