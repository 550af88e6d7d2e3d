"""The whole loop on a tiny cohort, by the command line, never killed and killed in every stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

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
LONGEST_S = 600.0


def _environment(root: Path) -> dict[str, str]:
    return {
        **os.environ,
        **{f"nnUNet_{name}": str(root / f"nnUNet_{name}") for name in ("raw", "preprocessed", "results")},
        "OMP_NUM_THREADS": "1",
        "nnUNet_def_n_proc": "1",
    }


def _command(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "nnunet_sam2.cli.main", *arguments]
    return subprocess.run(argv, env=_environment(root), capture_output=True, text=True, timeout=LONGEST_S)


def _copy_of(dataset: DatasetFolders, root: Path) -> Path:
    for name in ("raw", "preprocessed", "results"):
        (root / f"nnUNet_{name}").mkdir(parents=True)
    shutil.copytree(dataset.raw, root / "nnUNet_raw" / dataset.name)
    return root


def _label_hashes(root: Path) -> dict[str, str]:
    run = next((root / "nnUNet_results").glob("*/nnunet_sam2/3d_fullres_fold0"))
    found = [p for p in run.rglob("*.nii.gz") if TEMPORARY_MARK not in p.name]
    assert any("/r02/labels/" in str(p) for p in found)
    assert any("/confidence/" in str(p) for p in found)
    return {str(p.relative_to(run)): file_hash(p) for p in found}


@pytest.fixture(scope="module")
def finished(tiny_dataset: DatasetFolders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the root of a run that was never killed."""
    root = _copy_of(tiny_dataset, tmp_path_factory.mktemp("finished"))
    done = _command(root, *RUN)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return root


def test_the_loop_goes_from_images_to_rounds_and_a_named_reason_to_stop(finished: Path) -> None:
    state = json.loads(_command(finished, "status", "-d", "501", "--json").stdout)
    assert state["stop_reason"] == "round limit"
    assert [r["number"] for r in state["rounds"]] == [0, 1, 2]
    assert all(r["finished"] and 0 <= r["validation_dice"] <= 1 for r in state["rounds"])
    assert state["rounds"][1]["change_mean"] is None
    assert 0 < state["rounds"][2]["change_mean"] <= 1
    assert state["running_stage"] is None


def test_the_loop_leaves_a_report_of_itself_with_the_versions_that_made_it(finished: Path) -> None:
    run = next((finished / "nnUNet_results").glob("*/nnunet_sam2/3d_fullres_fold0"))
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "Not converged: stopped at the limit of 2 rounds" in text
    assert "Machine and versions of the run" in text
    assert text.count('<script type="text/plain" id="px') == 5
    assert [e["event"] for e in read_events(run / LEDGER_FILE)].count("machine") == 1


def test_the_human_labels_are_untouched_by_the_loop(finished: Path, tiny_dataset: DatasetFolders) -> None:
    before = {p.name: file_hash(p) for p in (tiny_dataset.raw / "labelsTr").iterdir()}
    after = {p.name: file_hash(p) for p in next((finished / "nnUNet_raw").glob("*/labelsTr")).iterdir()}
    assert before == after


def test_validation_and_plans_see_human_labels_alone(finished: Path, tiny_dataset: DatasetFolders) -> None:
    preprocessed = next((finished / "nnUNet_preprocessed").iterdir())
    labelled = {p.name.removesuffix(".nii.gz") for p in (tiny_dataset.raw / "labelsTr").iterdir()}
    for fold in json.loads((preprocessed / "splits_final.json").read_text()):
        assert set(fold["train"]) | set(fold["val"]) == labelled
    assert {p.name.removesuffix(".nii.gz") for p in (preprocessed / "gt_segmentations").iterdir()} == labelled
    fingerprint = json.loads((preprocessed / "dataset_fingerprint.json").read_text())
    assert len(fingerprint["spacings"]) == len(labelled)


def test_the_same_command_again_has_nothing_left_to_do(finished: Path) -> None:
    before = _label_hashes(finished)
    start = time.monotonic()
    again = _command(finished, *RUN)
    assert again.returncode == 0, again.stderr
    assert "[r01/train]" not in again.stdout
    assert time.monotonic() - start < 60
    assert _label_hashes(finished) == before


def test_a_changed_option_is_refused_and_the_difference_is_shown(finished: Path) -> None:
    refused = _command(finished, *RUN, "--seed", "99")
    assert refused.returncode == 2
    assert "seed: 12345 -> 99" in refused.stderr
    assert "--branch" in refused.stderr


def test_the_model_of_any_round_predicts_and_the_best_is_the_default(finished: Path, tmp_path: Path) -> None:
    images = next((finished / "nnUNet_raw").glob("*/imagesTs"))
    done = _command(finished, "predict", "-d", "501", "-i", str(images), "-o", str(tmp_path / "best"), "-device", "cpu")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "best").glob("*.nii.gz")} == {
        p.name for p in next((finished / "nnUNet_raw").glob("*/labelsTs")).iterdir()
    }
    refused = _command(finished, "predict", "-d", "501", "-i", str(images), "-o", str(tmp_path / "x"), "--round", "7")
    assert refused.returncode == 2
    assert "finished rounds: 0, 1, 2" in refused.stderr


def test_a_loop_killed_in_every_stage_ends_with_the_same_labels_byte_for_byte(
    finished: Path, tiny_dataset: DatasetFolders, tmp_path: Path
) -> None:
    ledger = next((finished / "nnUNet_results").glob("*/nnunet_sam2/3d_fullres_fold0")) / LEDGER_FILE
    events = [e for e in read_events(ledger) if e["event"] == "done"]
    assert len(events) >= 14
    root = _copy_of(tiny_dataset, tmp_path / "killed")
    killed = [event["stage"] for event in events if _kill_in(root, event["stage"], after_s=0.4 * event["seconds"])]
    assert len(killed) >= len(events) - 1, killed
    ended = _command(root, *RUN)
    assert ended.returncode == 0, ended.stderr[-4000:] + ended.stdout[-2000:]
    assert _label_hashes(root) == _label_hashes(finished)
    leftovers = list(root.rglob(f"*{TEMPORARY_MARK}*"))
    assert not leftovers


def _kill_in(root: Path, stage: str, *, after_s: float) -> bool:
    """Start the run and SIGKILL it ``after_s`` seconds into ``stage``; return whether it was still at work."""
    argv = [sys.executable, "-m", "nnunet_sam2.cli.main", *RUN]
    process = subprocess.Popen(argv, env=_environment(root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + LONGEST_S
        while time.monotonic() < deadline and process.poll() is None and not _was_started(root, stage, process.pid):
            time.sleep(0.05)
        time.sleep(min(after_s, 20.0))
        return process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _was_started(root: Path, stage: str, process: int) -> bool:
    events: Mapping[str, object]
    for path in (root / "nnUNet_results").glob(f"*/nnunet_sam2/3d_fullres_fold0/{LEDGER_FILE}"):
        for events in read_events(path):
            if events["event"] == "started" and events["stage"] == stage and events["process"] == process:
                return True
    return False
