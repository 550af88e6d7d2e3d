"""The whole loop on a tiny cohort, by the command line, never killed and killed in every stage."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from loop_command import (
    LONGEST_S,
    RUN,
    command,
    copy_of,
    human_hashes,
    label_hashes,
    run_folder,
    start,
    was_done,
    was_started,
)

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds import disk
from nnunet_sam2.rounds.ledger import LEDGER_FILE, read_events
from nnunet_sam2.rounds.nnunet import light_configuration
from nnunet_sam2.storage import TEMPORARY_MARK, file_hash, read_json

AGAIN = shlex.join(["nnunet_sam2", *RUN])
LONG_SHARE = 0.003
"""Stages that take a smaller part of a loop are killed at by tests/test_loop_long.py alone."""


@pytest.fixture(scope="module")
def finished(tiny_dataset: DatasetFolders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the root of a run that was never killed."""
    root = copy_of(tiny_dataset, tmp_path_factory.mktemp("finished"))
    done = command(root, *RUN)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return root


def test_the_loop_goes_from_images_to_rounds_and_a_named_reason_to_stop(finished: Path) -> None:
    state = json.loads(command(finished, "status", "-d", "501", "--json").stdout)
    assert state["stop_reason"] == "round limit"
    assert [r["number"] for r in state["rounds"]] == [0, 1, 2]
    assert all(r["finished"] and 0 <= r["validation_dice"] <= 1 for r in state["rounds"])
    assert state["rounds"][1]["change_mean"] is None
    assert 0 < state["rounds"][2]["change_mean"] <= 1
    assert state["running_stage"] is None


def test_the_loop_leaves_a_report_of_itself_with_the_versions_that_made_it(finished: Path) -> None:
    run = run_folder(finished)
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
    before = label_hashes(finished)
    start = time.monotonic()
    again = command(finished, *RUN)
    assert again.returncode == 0, again.stderr
    assert "[r01/train]" not in again.stdout
    assert time.monotonic() - start < 60
    assert label_hashes(finished) == before


def test_a_dry_run_counts_what_is_done_and_measures_by_the_plans_that_are_there(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NNUNET_SAM2_CACHE", str(tmp_path / "cache"))
    before = sorted(finished.rglob("*"))
    told = command(finished, *RUN, "--dry-run", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["sum"]["cpu_seconds"] == 0
    assert sorted(finished.rglob("*")) == before


def test_a_changed_option_is_refused_and_the_difference_is_shown(finished: Path) -> None:
    refused = command(finished, *RUN, "--seed", "99")
    assert refused.returncode == 2
    assert "seed: 12345 -> 99" in refused.stderr
    assert "--branch" in refused.stderr


def test_the_model_of_any_round_predicts_and_the_best_is_the_default(finished: Path, tmp_path: Path) -> None:
    images = next((finished / "nnUNet_raw").glob("*/imagesTs"))
    done = command(finished, "predict", "-d", "501", "-i", str(images), "-o", str(tmp_path / "best"), "-device", "cpu")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "best").glob("*.nii.gz")} == {
        p.name for p in next((finished / "nnUNet_raw").glob("*/labelsTs")).iterdir()
    }
    refused = command(finished, "predict", "-d", "501", "-i", str(images), "-o", str(tmp_path / "x"), "--round", "7")
    assert refused.returncode == 2
    assert "finished rounds: 0, 1, 2" in refused.stderr


def test_what_both_sources_say_of_new_images_is_what_the_loop_says_of_its_own(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(finished / f"nnUNet_{name}"))
    run, out = run_folder(finished), tmp_path / "out"
    ledger = file_hash(run / LEDGER_FILE)
    images = next((finished / "nnUNet_raw").glob("*/imagesUn"))
    asked = ["predict", "-d", "501", "-i", str(images), "-o", str(out), "--with-sam2", "--device", "cpu"]
    asked += ["--threads", "1"]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert all(f"estimated Dice, {what}:" in told for what in ("SAM 2", "student", "both, fused"))
    names = sorted(path.name for path in (run / "labels").glob("*.nii.gz"))
    assert names == sorted(path.name for path in out.glob("*.nii.gz"))
    own = read_json(run / "labels" / "round.json")["estimates"]
    quality = read_json(out / "quality.json")
    for name in names:
        for file in (name, f"confidence/{name}"):
            assert file_hash(out / file) == file_hash(run / "labels" / file), file
        assert file_hash(out / "sam2" / name) == file_hash(run / "sam2" / "unlabelled" / name)
        case = name.removesuffix(".nii.gz")
        assert {v: row["dice"] for v, row in quality["cases"][case].items()} == own[case]
        for row in quality["cases"][case].values():
            assert row["dice"] is None or row["lower"] is None or row["lower"] <= row["dice"]
    # What was killed goes on: a label that is lost is made again, what is there stays as it is.
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz") if path.name != names[0]}
    lost = file_hash(out / names[0])
    (out / names[0]).unlink()
    (out / "sam2" / names[0]).unlink()
    assert main(asked) == 0
    assert file_hash(out / names[0]) == lost
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert file_hash(run / LEDGER_FILE) == ledger
    other = "1" if quality["model"] == "3d_fullres_r00" else "0"
    assert main([*asked, "--round", other]) == 2


def test_no_stage_writes_more_than_was_asked_for_before_it(finished: Path) -> None:
    raw = next((finished / "nnUNet_raw").iterdir())
    preprocessed = finished / "nnUNet_preprocessed" / raw.name
    plans = read_json(preprocessed / "nnUNetPlans.json")
    validation = read_json(preprocessed / "splits_final.json")[0]["val"]
    size = disk.run_size(
        Cohort.load(raw),
        validation_ids=tuple(validation),
        plans=plans,
        configuration="3d_fullres",
        overrides=light_configuration(plans, "3d_fullres"),
        light=True,
    )
    run = run_folder(finished)
    for event in read_events(run / LEDGER_FILE):
        if event["event"] == "done":
            written = sum((run / name).stat().st_size for name in event["files"])
            assert written <= max(disk.stage_bytes(event["stage"], size), 4096), event["stage"]
    base = sum(disk.folder_bytes(preprocessed / f"nnUNetPlans_3d_fullres{end}") for end in ("", "_un"))
    assert base <= disk.stage_bytes("setup/plan", size)
    models = list((finished / "nnUNet_results" / raw.name).glob("nnUNetTrainerSAM2__*"))
    assert len(models) == 3
    for model in models:
        assert disk.folder_bytes(model) <= disk.stage_bytes("r00/train", size) < 3 * disk.folder_bytes(model)


def test_a_loop_killed_in_every_stage_ends_with_the_same_labels_byte_for_byte(
    finished: Path, tiny_dataset: DatasetFolders, tmp_path: Path
) -> None:
    events = [e for e in read_events(run_folder(finished) / LEDGER_FILE) if e["event"] == "done"]
    shortest = LONG_SHARE * sum(e["seconds"] for e in events)
    stages = [(e["stage"], e["seconds"]) for e in events if e["seconds"] > shortest]
    assert len(stages) >= 9
    root = copy_of(tiny_dataset, tmp_path / "killed")
    asked = {"r00/train": signal.SIGTERM, "r01/predict": signal.SIGINT} if sys.platform != "win32" else {}
    killed = [s for s, seconds in stages if _end_in(root, s, asked.get(s, signal.SIGKILL), after_s=0.4 * seconds)]
    assert len(killed) >= len(stages) - 1, killed
    ended = command(root, *RUN)
    assert ended.returncode == 0, ended.stderr[-4000:] + ended.stdout[-2000:]
    assert label_hashes(root) == label_hashes(finished)
    assert human_hashes(root) == human_hashes(finished)
    assert not list(root.rglob(f"*{TEMPORARY_MARK}*"))


def _end_in(root: Path, stage: str, number: signal.Signals, *, after_s: float) -> bool:
    """Start the run and send a signal ``after_s`` seconds into ``stage``; return whether it was still at work."""
    process = start(root, *RUN)
    try:
        deadline = time.monotonic() + LONGEST_S
        while time.monotonic() < deadline and process.poll() is None and not was_started(root, stage, process.pid):
            time.sleep(0.05)
        until = time.monotonic() + after_s
        while time.monotonic() < until and process.poll() is None and not was_done(root, stage, process.pid):
            time.sleep(0.05)
        if process.poll() is not None:
            return False
        if number != signal.SIGKILL:
            _ends_when_asked(process, number)
        return True
    finally:
        process.kill()
        process.communicate()


def _ends_when_asked(process: subprocess.Popen[str], number: signal.Signals) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert err.splitlines()[-1].endswith(f"stopped by {number.name}; what is finished is kept, go on with: " + AGAIN)
    _, alive = psutil.wait_procs(children, timeout=1)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
