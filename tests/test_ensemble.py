"""Folds that were run one after the other are one model of nnU-Net's, judged on what each fold held out."""

from __future__ import annotations

import multiprocessing.pool
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anisotropic_data import Dataset
from test_cli_predict import record_run

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds.ensemble import Ensemble, find_ensemble, folds_asked, make_ensemble
from nnunet_sam2.rounds.nnunet import fold_folder, model_folder, read_plans, read_postprocessing
from nnunet_sam2.rounds.nnunet.base import write_plans
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.state import read_state
from nnunet_sam2.storage import read_json, write_json
from nnunet_sam2.trainers.checkpoints import read_checkpoint, write_checkpoint
from nnunet_sam2.trainers.discovery import EXTENSION_VARIABLE, search_path
from nnunet_sam2.volumes import read_label, write_label


def add_fold(dataset: Dataset, fold: int, *, island: bool) -> None:
    """Make a trained run of a fold out of that of fold 0: other weights, and labels of its own held-out cases."""
    options = RunOptions(fold=str(fold))
    folders, name = dataset.folders, options.round_configuration(1)
    if fold:
        plans = read_plans(folders)
        plans["configurations"][name] = plans["configurations"]["3d_fullres_r01"]
        write_plans(folders, plans)
        target = model_folder(folders, name)
        shutil.copytree(model_folder(folders, "3d_fullres_r01"), target)
        (target / "fold_0").rename(target / f"fold_{fold}")
        write_json(target / "plans.json", plans)
        checkpoint = read_checkpoint(target / f"fold_{fold}" / "checkpoint_final.pth")
        weights = {key: value + 0.01 * fold for key, value in checkpoint["network_weights"].items()}
        init = {**checkpoint["init_args"], "configuration": name, "fold": fold}
        changed = {**checkpoint, "network_weights": weights, "init_args": init}
        write_checkpoint(changed, target / f"fold_{fold}" / "checkpoint_final.pth")
    validation = fold_folder(folders, name, fold) / "validation"
    shutil.rmtree(validation)
    rows = []
    for case_id in read_json(folders.preprocessed / "splits_final.json")[fold]["val"]:
        label, geometry = read_label(dataset.cohort.label_path(dataset.cohort.case(case_id)))
        if island:
            label[0, :2, :2] = 1
        write_label(validation / f"{case_id}.nii.gz", label, geometry)
        metrics = {"1": {"Dice": 0.9 - 0.1 * fold}, "2": {"Dice": 1.0}}
        rows.append({"prediction_file": f"{validation}/{case_id}.nii.gz", "metrics": metrics})
    means = {value: {"Dice": float(np.mean([r["metrics"][value]["Dice"] for r in rows]))} for value in ("1", "2")}
    write_json(validation / "summary.json", {"metric_per_case": rows, "mean": means})
    record_run(folders, options, {1: 0.8})


@pytest.fixture
def two_folds(trained: Dataset) -> Dataset:
    add_fold(trained, 0, island=False)
    add_fold(trained, 1, island=True)
    return trained


def ensemble_of(dataset: Dataset, folders: DatasetFolders) -> Ensemble:
    states = [read_state(folders, f"3d_fullres_fold{fold}") for fold in (0, 1)]
    return make_ensemble(folders, dataset.cohort, states)


def test_every_labelled_case_is_judged_by_the_fold_that_held_it_out(two_folds: Dataset) -> None:
    found = ensemble_of(two_folds, two_folds.folders)
    assert found.configuration == "3d_fullres_cv"
    assert found.folds == ("0", "1")
    model = model_folder(two_folds.folders, "3d_fullres_cv")
    splits = read_json(two_folds.folders.preprocessed / "splits_final.json")[:2]
    counts = [len(fold["val"]) for fold in splits]
    assert found.dice["1"] == pytest.approx((0.9 * counts[0] + 0.8 * counts[1]) / sum(counts))
    for fold in (0, 1):
        there = {path.name.split(".")[0] for path in (model / f"fold_{fold}" / "validation").glob("*.nii.gz")}
        assert there == set(splits[fold]["val"])
        assert (model / f"fold_{fold}" / "checkpoint_final.pth").is_file()
    # One fold alone would have seen no island.
    decided = read_postprocessing(model)
    assert decided is not None
    assert decided.patients == sum(counts)
    assert decided.steps == ((1, 2),)
    assert find_ensemble(two_folds.folders, ["cv"]) == find_ensemble(two_folds.folders, ["1", "0"]) == found


def test_the_same_folds_again_change_nothing_and_a_better_round_does(two_folds: Dataset) -> None:
    found = ensemble_of(two_folds, two_folds.folders)
    model = model_folder(two_folds.folders, "3d_fullres_cv")
    before = {path: path.stat().st_mtime_ns for path in model.rglob("*")}
    assert ensemble_of(two_folds, two_folds.folders) == found
    assert {path: path.stat().st_mtime_ns for path in model.rglob("*")} == before
    changed = fold_folder(two_folds.folders, "3d_fullres_f1_r01", 1) / "checkpoint_final.pth"
    write_checkpoint(read_checkpoint(fold_folder(two_folds.folders, "3d_fullres_r01", 0) / changed.name), changed)
    again = ensemble_of(two_folds, two_folds.folders)
    assert again.members[1]["checkpoint"] == again.members[0]["checkpoint"] != found.members[1]["checkpoint"]


def test_nnunet_finds_the_best_configuration_and_loads_the_folds(
    two_folds: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.evaluation import evaluate_predictions, find_best_configuration
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.postprocessing import remove_connected_components

    ensemble_of(two_folds, two_folds.folders)
    # In threads: each of its pools would import torch anew.
    threads = SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=multiprocessing.pool.ThreadPool))
    for module in (evaluate_predictions, remove_connected_components):
        monkeypatch.setattr(module, "multiprocessing", threads)
    asked = "nnUNetv2_find_best_configuration 502 -c 3d_fullres_cv -tr nnUNetTrainerSAM2 -f 0 1 -np 1"
    monkeypatch.setattr("sys.argv", asked.split())
    find_best_configuration.find_best_configuration_entry_point()
    told = read_json(two_folds.folders.results / "inference_information.json")
    assert told["best_model_or_ensemble"]["selected_model_or_models"][0]["configuration"] == "3d_fullres_cv"
    found = remove_connected_components.load_pickle(told["best_model_or_ensemble"]["postprocessing_file"])[1]
    decided = read_postprocessing(model_folder(two_folds.folders, "3d_fullres_cv"))
    assert decided is not None
    assert [tuple(kwargs["labels_or_regions"]) for kwargs in found] == list(decided.steps)

    monkeypatch.setenv(EXTENSION_VARIABLE, search_path(None))
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(model_folder(two_folds.folders, "3d_fullres_cv")), None)
    assert len(predictor.list_of_parameters) == 2


def test_the_ensemble_predicts_and_is_exported_by_f_cv(
    two_folds: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["predict", "-d", "502", "-i", str(two_folds.folders.raw / "imagesTs"), "--device", "cpu"]
    assert main([*asked, "-o", str(tmp_path / "out"), "-f", "cv"]) == 2
    assert "has no ensemble of folds cv; there are: none" in capsys.readouterr().err
    ensemble_of(two_folds, two_folds.folders)
    assert main([*asked, "-o", str(tmp_path / "out"), "-f", "0", "1", "--threads", "1"]) == 0
    assert "3d_fullres_cv, the mean of folds 0, 1" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == len(two_folds.cohort.test)
    assert main([*asked, "-o", str(tmp_path / "out"), "-f", "cv", "--with-sam2"]) == 2
    assert "give one fold" in capsys.readouterr().err
    assert main(["export", "-d", "502", "-o", str(tmp_path / "model"), "-f", "cv"]) == 0
    assert "-f 0 1" in capsys.readouterr().out
    exported = read_json(tmp_path / "model" / "plans.json")
    assert list(exported["configurations"]) == ["3d_fullres"]
    for fold in (0, 1):
        checkpoint = read_checkpoint(tmp_path / "model" / f"fold_{fold}" / "checkpoint_final.pth")
        assert checkpoint["init_args"]["configuration"] == "3d_fullres"
        assert checkpoint["init_args"]["fold"] == fold


def test_folds_are_named_one_by_one_or_all_together(planned: Dataset) -> None:
    folders, cohort = planned.folders, planned.cohort
    count = len(read_json(folders.preprocessed / "splits_final.json"))
    assert folds_asked(folders, cohort, ["cv"]) == tuple(map(str, range(count)))
    assert folds_asked(folders, cohort, ["2", "0", "2"]) == ("2", "0")
    with pytest.raises(InputError, match="goes with no other fold"):
        folds_asked(folders, cohort, ["all", "0"])
    with pytest.raises(InputError, match="stands for every fold"):
        folds_asked(folders, cohort, ["cv", "0"])


def test_folds_are_run_in_turn_and_end_in_their_ensemble(
    two_folds: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run_loop(folders: DatasetFolders, options: RunOptions, **_: object) -> object:
        ran.append(options.fold)
        return read_state(folders, options.run_name)

    monkeypatch.setattr("nnunet_sam2.rounds.orchestrator.run_loop", run_loop)
    assert main(["run", "-d", "502", "-c", "3d_fullres", "-f", "0", "1", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert ran == ["0", "1"]
    assert "each by the network of the fold that held it out: 1: 0." in told
    assert "-o OUT -f 0 1" in told
    assert Cohort.load(two_folds.folders.raw) == two_folds.cohort
