"""Training, prediction and export: through nnU-Net itself, whole or done again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from anisotropic_data import DATASET, Dataset

from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.rounds.nnunet import (
    export_model,
    final_checkpoint,
    fold_folder,
    predict_cases,
    read_plans,
    read_validation,
    train,
)
from nnunet_sam2.rounds.nnunet import predict as nnunet_predict
from nnunet_sam2.rounds.nnunet import training as nnunet_train
from nnunet_sam2.rounds.nnunet.export import stock_plans_of
from nnunet_sam2.rounds.nnunet.predict_worker import class_probabilities, require_whole
from nnunet_sam2.storage import file_hash, read_json, write_json
from nnunet_sam2.volumes import read_label, write_label

ROUND = "3d_fullres_r01"

STOCK_PREDICT = """
import importlib, sys
sys.modules["nnunet_sam2"] = None
try:
    importlib.import_module("nnunet_sam2")
except ImportError:
    pass
else:
    sys.exit("the package can be imported, so this shows nothing")
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
predict_entry_point()
"""


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a process was started")


def predict_again(dataset: Dataset, **changes: object) -> list[Path]:
    arguments = {"device": "cpu", "log": dataset.log, "save_probabilities": True, "threads": 1, **changes}
    return predict_cases(
        dataset.folders,
        ROUND,
        [0],
        dataset.test_images(),
        dataset.root / "predicted",
        **arguments,  # type: ignore[arg-type]
    )


def archive(path: Path, *, whole: bool) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data", bytes(10_000))
    if not whole:
        path.write_bytes(path.read_bytes()[:5_000])


def test_a_finished_training_is_not_run_again(trained: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnunet_train, "stream_logged", refuse)
    result = train(trained.folders, ROUND, 0, device="cpu", log=trained.log)
    assert result.checkpoint == final_checkpoint(trained.folders, ROUND, 0)
    assert result.seconds == 0


def test_training_runs_nnunets_own_command_with_our_trainer(trained_once: Dataset) -> None:
    log = trained_once.log.read_text()
    assert f"nnUNetv2_train 502 {ROUND} 0 -tr nnUNetTrainerSAM2 -p nnUNetPlans -device cpu" in log
    assert "Epoch 1" in log
    assert "Epoch 2" not in log


def test_validation_dice_is_nnunets_and_of_human_labels_alone(trained: Dataset) -> None:
    dice = read_validation(trained.folders, ROUND, 0)
    assert dice is not None
    validated = read_json(trained.folders.preprocessed / "splits_final.json")[0]["val"]
    assert sorted(dice.cases) == sorted(validated)
    assert set(dice.classes) == {"1", "2"}
    summary = read_json(fold_folder(trained.folders, ROUND, 0) / "validation" / "summary.json")
    assert dice.mean == pytest.approx(summary["foreground_mean"]["Dice"])
    # against the definition
    case_id = validated[0]
    predicted, _ = read_label(fold_folder(trained.folders, ROUND, 0) / "validation" / f"{case_id}.nii.gz")
    label, _ = read_label(trained.cohort.label_path(trained.cohort.case(case_id)))
    both = ((predicted == 1) & (label == 1)).sum()
    assert dice.cases[case_id]["1"] == pytest.approx(2 * both / ((predicted == 1).sum() + (label == 1).sum()))


def test_classes_that_neither_side_has_are_left_out_of_the_mean(trained: Dataset) -> None:
    path = fold_folder(trained.folders, ROUND, 0) / "validation" / "summary.json"
    summary = read_json(path)
    summary["mean"] = {"1": {"Dice": 0.5}, "2": {"Dice": float("nan")}}
    path.write_text(json.dumps(summary))
    dice = read_validation(trained.folders, ROUND, 0)
    assert dice is not None
    assert dice.classes == {"1": 0.5, "2": None}
    assert dice.mean == 0.5


def test_a_fold_that_the_splits_lack_is_refused(trained: Dataset) -> None:
    with pytest.raises(InputError, match=r"no fold 4: .* has folds 0 to 3"):
        train(trained.folders, ROUND, 4, device="cpu", log=trained.log)


@pytest.mark.parametrize(
    ("left", "option"),
    [
        ({}, []),
        ({"checkpoint_latest.pth": True}, ["--c"]),
        ({"checkpoint_latest.pth": False, "checkpoint_best.pth": True}, ["--c"]),
        ({"checkpoint_latest.pth": False, "checkpoint_best.pth": False}, []),
        ({"checkpoint_best.pth": True}, ["--c"]),
        ({"checkpoint_final.pth": False, "checkpoint_latest.pth": True}, ["--c"]),
        ({"checkpoint_final.pth": True, "checkpoint_latest.pth": True}, ["--val"]),
    ],
)
def test_a_killed_training_goes_on_from_what_is_whole(tmp_path: Path, left: dict[str, bool], option: list[str]) -> None:
    folder = tmp_path / "fold_0"
    folder.mkdir()
    for name, whole in left.items():
        archive(folder / name, whole=whole)
    noted = []
    assert nnunet_train._how_to_continue(folder, lambda cause, remedy: noted.append(remedy)) == option
    damaged = left.get("checkpoint_latest.pth") is False
    assert noted == (["from checkpoint_best.pth" if option else "from the beginning"] if damaged else [])
    if not option:
        assert not folder.exists()
    broken = [name for name, whole in left.items() if not whole]
    assert not any((folder / name).exists() for name in broken)


def test_a_half_written_summary_does_not_count_as_validated(trained: Dataset) -> None:
    folder = fold_folder(trained.folders, ROUND, 0)
    summary = folder / "validation" / "summary.json"
    summary.write_text(summary.read_text()[:40])
    assert not nnunet_train._is_finished(folder)
    assert nnunet_train._how_to_continue(folder) == ["--val"]


def test_probabilities_lie_on_the_raw_grid_and_agree_with_the_label(trained: Dataset) -> None:
    for case in trained.cohort.test:
        label_zyx, geometry = read_label(trained.root / "predicted" / f"{case.case_id}.nii.gz")
        assert geometry.mismatch(case.geometry) is None
        with np.load(trained.root / "predicted" / "probabilities" / f"{case.case_id}.npz") as file:
            prob_czyx = file["prob_czyx"]
        assert prob_czyx.dtype == np.uint8
        assert prob_czyx.shape == (3, *case.geometry.shape_zyx)
        assert np.abs(prob_czyx.sum(0, dtype=int) - 255).max() <= 1
        best = prob_czyx.max(0)
        assert (np.take_along_axis(prob_czyx, label_zyx[None].astype(int), 0)[0] == best).all()


def test_cases_that_are_predicted_already_start_no_process(trained: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnunet_predict, "stream_logged", refuse)
    assert predict_again(trained) == [trained.root / "predicted" / f"{c.case_id}.nii.gz" for c in trained.cohort.test]
    assert predict_again(trained, save_probabilities=False)


@pytest.mark.parametrize("what", ["label", "probabilities", "image", "checkpoint", "mirroring"])
def test_a_prediction_of_other_inputs_or_a_damaged_one_is_made_again(
    trained: Dataset, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    case = trained.cohort.test[0]
    path = {
        "label": trained.root / "predicted" / f"{case.case_id}.nii.gz",
        "probabilities": trained.root / "predicted" / "probabilities" / f"{case.case_id}.npz",
        "image": trained.cohort.image_paths(case)[0],
        "checkpoint": final_checkpoint(trained.folders, ROUND, 0),
    }.get(what)
    if path is not None:
        path.write_bytes(path.read_bytes() + b"x")
    monkeypatch.setattr(nnunet_predict, "stream_logged", refuse)
    with pytest.raises(AssertionError, match="a process was started"):
        predict_again(trained, mirroring=what != "mirroring")


def test_prediction_with_a_model_that_is_not_trained_is_refused(planned: Dataset) -> None:
    with pytest.raises(InputError, match="fold 0 of 3d_fullres_r01 is not trained yet"):
        predict_again(planned)


def test_stock_nnunet_without_this_package_predicts_the_same_bytes(trained: Dataset, tmp_path: Path) -> None:
    model = export_model(
        trained.folders, ROUND, [0], tmp_path / "stock" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    )
    out = tmp_path / "by_stock"
    arguments = ["-d", DATASET, "-i", str(trained.folders.raw / "imagesTs"), "-o", str(out)]
    arguments += ["-c", "3d_fullres", "-f", "0", "-device", "cpu", "-npp", "0", "-nps", "0"]
    environment = {k: v for k, v in os.environ.items() if k not in ("nnUNet_extTrainer", "PYTHONPATH")}
    environment |= {"nnUNet_results": str(tmp_path / "stock"), "OMP_NUM_THREADS": "1", "nnUNet_def_n_proc": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK_PREDICT, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for case in trained.cohort.test:
        name = f"{case.case_id}.nii.gz"
        assert file_hash(out / name) == file_hash(trained.root / "predicted" / name)
    assert read_label(out / name)[0].any()
    text = json.dumps(read_json(model / "plans.json"))
    assert "nnunet_sam2" not in text
    assert ROUND not in text


def test_an_export_is_the_same_bytes_every_time_and_replaces_only_an_export(trained: Dataset, tmp_path: Path) -> None:
    first = export_model(trained.folders, ROUND, [0], tmp_path / "a")
    second = export_model(trained.folders, ROUND, [0], tmp_path / "b")
    names = sorted(str(p.relative_to(first)) for p in first.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(second)) for p in second.rglob("*") if p.is_file())
    assert all(file_hash(first / name) == file_hash(second / name) for name in names)
    export_model(trained.folders, ROUND, [0], first)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is no exported model"):
        export_model(trained.folders, ROUND, [0], mine)
    assert (mine / "thesis.txt").is_file()


def test_exported_plans_hold_one_whole_configuration_under_its_stock_name(trained: Dataset) -> None:
    plans, name = stock_plans_of(read_plans(trained.folders), ROUND)
    assert name == "3d_fullres"
    assert list(plans["configurations"]) == ["3d_fullres"]
    exported = plans["configurations"]["3d_fullres"]
    assert "inherits_from" not in exported
    assert set(exported["architecture"]["arch_kwargs"]["features_per_stage"]) == {8}
    assert exported["spacing"] == read_plans(trained.folders)["configurations"]["3d_fullres"]["spacing"]


@pytest.mark.parametrize("regions", [[(1, 2, 3), (1, 3), 3], [2, 1, 3], [(1, 2), (2, 3), 3]])
def test_certain_regions_become_the_label_that_nnunet_paints(regions: list[int | tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    hard = rng.integers(0, 2, (3, 4, 5, 6)).astype(np.float32)
    order = [2, 1, 3]  # values painted for regions 0, 1, 2
    painted = np.zeros(hard.shape[1:], int)
    for region, value in zip(hard, order, strict=True):
        painted[region > 0.5] = value
    assert (class_probabilities(hard, regions, order).argmax(0) == painted).all()
    soft = class_probabilities(rng.random((3, 4, 5, 6)).astype(np.float32), regions, order)
    np.testing.assert_allclose(soft.sum(0), 1, atol=1e-6)
    assert soft.min() >= 0


def test_nested_regions_share_and_disjoint_ones_do_not() -> None:
    prob = np.array([0.9, 0.3], np.float32).reshape(2, 1, 1, 1)
    nested = class_probabilities(prob, [(1, 2), 2], [1, 2]).ravel()
    np.testing.assert_allclose(nested, [0.1, 0.6, 0.3], atol=1e-6)
    disjoint = class_probabilities(np.array([0.5, 0.4], np.float32).reshape(2, 1, 1, 1), [1, 2], [1, 2]).ravel()
    np.testing.assert_allclose(disjoint, [0.1, 0.5, 0.4], atol=1e-6)


def test_without_regions_probabilities_are_nnunets_own() -> None:
    prob = np.random.default_rng(0).random((3, 2, 2, 2)).astype(np.float32)
    assert class_probabilities(prob, None, None) is prob


@pytest.mark.parametrize("kept", [1.0, 0.95, 0.4])
def test_a_prediction_that_the_disk_did_not_take_whole_is_refused(tmp_path: Path, kept: float) -> None:
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    label_zyx = np.zeros((4, 30, 30), np.uint8)
    label_zyx[:2] = np.random.default_rng(0).integers(0, 3, (2, 30, 30))  # what is lost of it reads as background
    path = tmp_path / "case.nii.gz"
    write_label(path, label_zyx, Geometry(shape_zyx=label_zyx.shape))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    if kept == 1.0:
        require_whole(path, label_zyx, SimpleITKIO(), path=path)
        return
    with pytest.raises(StageError, match="could not be written whole"):
        require_whole(path, label_zyx, SimpleITKIO(), path=path)


def test_a_second_prediction_is_the_same_bytes(trained: Dataset) -> None:
    before = {p.name: file_hash(p) for p in (trained.root / "predicted").rglob("*") if p.is_file()}
    shutil.rmtree(trained.root / "predicted")
    write_json(trained.root / "predicted" / "records" / "case_99.json", {"key": "of another", "hashes": {}})
    predict_again(trained)
    after = {p.name: file_hash(p) for p in (trained.root / "predicted").rglob("*") if p.is_file()}
    after.pop("case_99.json")
    assert after == before
