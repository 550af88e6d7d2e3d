"""Cleaning takes what runs left, or whole runs, and never raw data or human labels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from nnunet_sam2.cli.main import main
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds.ledger import Ledger, StageResult
from nnunet_sam2.rounds.lock import only_run
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.storage import TEMPORARY_MARK, file_hash, read_json, write_json, write_text


@pytest.fixture
def two_runs(fresh_dataset: DatasetFolders) -> DatasetFolders:
    """Two finished runs' files as a run leaves them, with what a killed writer left in every folder."""
    plans = {"plans_name": "nnUNetPlans", "dataset_name": fresh_dataset.name, "configurations": {"3d_fullres": {}}}
    for branch in (None, "b"):
        options = RunOptions(branch=branch)
        ledger = Ledger(fresh_dataset.results / "nnunet_sam2" / options.run_name)
        ledger.append("run", options=options.to_json())
        name = options.round_configuration(1)
        ledger.run_stage("r01/data", {"configuration": name}, lambda: StageResult(info={"round": 1}), what="data")
        write_text(ledger.folder / "r01" / "labels" / "subject_003.nii.gz", "label")
        for folder in (f"nnUNetPlans_{name}", f"nnUNetPlans_{name}_conf"):
            write_text(fresh_dataset.preprocessed / folder / "subject_003.b2nd", "data")
        write_text(fresh_dataset.preprocessed / f"nnUNetPlans_{name}_round.json", "{}")
        write_text(
            fresh_dataset.results / f"nnUNetTrainerSAM2__nnUNetPlans__{name}" / "fold_0" / "checkpoint_final.pth", "w"
        )
        plans["configurations"][name] = {"inherits_from": "3d_fullres"}
    write_json(fresh_dataset.preprocessed / "nnUNetPlans.json", plans)
    write_text(fresh_dataset.results / "nnunet_sam2" / "embeddings" / "ab" / "abc.safetensors", "features")
    for folder in (fresh_dataset.preprocessed, ledger.folder, ledger.folder / "r01" / "labels"):
        (folder / f"{TEMPORARY_MARK}123_x.nii.gz").write_text("half")
    (fresh_dataset.preprocessed / f"{TEMPORARY_MARK}456_folder").mkdir()
    return fresh_dataset


def _files(*roots: Path) -> set[str]:
    return {str(p) for root in roots for p in root.rglob("*") if p.is_file() and p.suffix != ".lock"}


def _raw(folders: DatasetFolders) -> dict[str, str]:
    return {str(p): file_hash(p) for p in folders.raw.rglob("*") if p.is_file()}


def test_temporary_files_and_embeddings_go_and_everything_else_stays(
    two_runs: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    before, raw = _files(two_runs.preprocessed, two_runs.results), _raw(two_runs)
    assert main(["clean", "-d", "501", "--yes"]) == 0
    out = capsys.readouterr().out
    assert "removed temporary files: 4" in out
    assert "removed SAM 2's features" in out
    gone = before - _files(two_runs.preprocessed, two_runs.results)
    assert all(TEMPORARY_MARK in name or "embeddings" in name for name in gone)
    assert len(gone) == 4
    assert not list(two_runs.preprocessed.rglob(f"{TEMPORARY_MARK}*"))
    assert _raw(two_runs) == raw
    assert main(["clean", "-d", "501", "--yes"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_embeddings_may_be_kept(two_runs: DatasetFolders) -> None:
    assert main(["clean", "-d", "501", "--keep-embeddings"]) == 0
    assert (two_runs.results / "nnunet_sam2" / "embeddings" / "ab" / "abc.safetensors").is_file()


def test_a_run_is_deleted_with_its_data_and_models_and_the_other_one_stays(two_runs: DatasetFolders) -> None:
    raw = _raw(two_runs)
    other = {name for name in _files(two_runs.preprocessed, two_runs.results) if "_b" in name}
    assert main(["clean", "-d", "501", "--run", "3d_fullres_fold0", "--yes"]) == 0
    left = _files(two_runs.preprocessed, two_runs.results)
    assert not any("3d_fullres_r01" in name or "3d_fullres_fold0/" in name for name in left)
    assert {name for name in other if TEMPORARY_MARK not in name} <= left
    configurations = read_json(two_runs.preprocessed / "nnUNetPlans.json")["configurations"]
    assert list(configurations) == ["3d_fullres", "3d_fullres_b_r01"]
    assert _raw(two_runs) == raw


def test_all_runs_go_but_nothing_that_a_person_made(two_runs: DatasetFolders) -> None:
    raw = _raw(two_runs)
    assert main(["clean", "-d", "501", "--all", "--yes"]) == 0
    assert not list((two_runs.results / "nnunet_sam2").glob("*/ledger.jsonl"))
    assert _raw(two_runs) == raw


def test_a_run_is_not_deleted_without_consent_and_what_would_go_is_shown(
    two_runs: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _files(two_runs.preprocessed, two_runs.results)
    assert main(["clean", "-d", "501", "--run", "3d_fullres_fold0"]) == 2
    shown = capsys.readouterr()
    assert "would delete" in shown.out
    assert "--yes" in shown.err
    assert _files(two_runs.preprocessed, two_runs.results) == before


def test_features_that_cost_hours_are_not_deleted_without_consent(
    two_runs: DatasetFolders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _files(two_runs.preprocessed, two_runs.results)
    assert main(["clean", "-d", "501"]) == 2
    shown = capsys.readouterr()
    assert "embeddings" in shown.out
    assert "give --yes" in shown.err
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(["clean", "-d", "501"]) == 2
    assert _files(two_runs.preprocessed, two_runs.results) == before
    monkeypatch.setattr("builtins.input", lambda question: "yes")
    assert main(["clean", "-d", "501"]) == 0
    assert _files(two_runs.preprocessed, two_runs.results) < before


def test_a_run_that_is_not_there_is_refused_with_those_that_are(
    two_runs: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["clean", "-d", "501", "--run", "2d_fold0", "--yes"]) == 2
    assert "3d_fullres_fold0, 3d_fullres_fold0_b" in capsys.readouterr().err


def test_nothing_is_cleaned_under_a_run_that_is_at_work(
    two_runs: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _files(two_runs.preprocessed, two_runs.results)
    with only_run(two_runs.results / "nnunet_sam2" / "3d_fullres_fold0"):
        assert main(["clean", "-d", "501", "--yes"]) == 2
    assert "in use by process" in capsys.readouterr().err
    assert _files(two_runs.preprocessed, two_runs.results) == before
