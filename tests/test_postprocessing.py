"""Post-processing is decided as nnU-Net decides it, lies there in its form, and is done wherever a student speaks."""

from __future__ import annotations

import multiprocessing.pool
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from anisotropic_data import Dataset
from nnunetv2.postprocessing import remove_connected_components as stock

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Case, Cohort, Role
from nnunet_sam2.errors import StageError
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.ledger import Ledger, StageResult
from nnunet_sam2.rounds.nnunet import (
    Postprocessing,
    decide_postprocessing,
    fold_folder,
    model_folder,
    read_plans,
    read_postprocessing,
    write_postprocessing,
)
from nnunet_sam2.rounds.nnunet.base import write_plans
from nnunet_sam2.rounds.nnunet.postprocessing import keep_largest_pieces, without_removed
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.training_stages import TrainingStages
from nnunet_sam2.storage import read_json
from nnunet_sam2.support.library import read_probabilities
from nnunet_sam2.volumes import read_label, write_label

GRID = Geometry(shape_zyx=(6, 24, 24), spacing_xyz_mm=(1.0, 1.0, 3.0))


def anatomy(shift: int, *, pair: bool = True) -> np.ndarray:
    """Draw a body (1) that holds a core (2), and beside them a class of two pieces (3)."""
    label = np.zeros(GRID.shape_zyx, np.uint8)
    label[1:5, 4 + shift : 14 + shift, 4:14] = 1
    label[2:4, 7 + shift : 11 + shift, 7:11] = 2
    if pair:
        label[1:5, 18:22, 2:6] = label[1:5, 18:22, 12:17] = 3
    return label


def predicted_with(label: np.ndarray, *islands: int) -> np.ndarray:
    """Add a small island of each of the named classes, and lose a little of the body."""
    found = label.copy()
    found[1, 4:8, 4:6] = 0
    for value in islands:
        found[4:6, 2 + 5 * value : 4 + 5 * value, 21:23] = value
    return found


def small_cohort(
    root: Path, islands: list[tuple[int, ...]], labels: dict[str, int | list[int]], patients: str | None = None
) -> tuple[Cohort, Path]:
    """Write human labels and predictions, a case for each entry of ``islands``; return the cohort and the folder."""
    cases = []
    for number, values in enumerate(islands):
        name = f"case_{number}"
        human = anatomy(number % 3, pair="pair" in labels)
        write_label(root / "labelsTr" / f"{name}.nii.gz", human, GRID)
        write_label(root / "predicted" / f"{name}.nii.gz", predicted_with(human, *values), GRID)
        cases.append(
            Case(
                case_id=name,
                role=Role.LABELLED,
                patient=patients[number] if patients else name,
                images=(f"imagesTr/{name}_0000.nii.gz",),
                label=f"labelsTr/{name}.nii.gz",
                geometry=GRID,
                voxel_hash=name,
            )
        )
    order = tuple(range(1, len(labels))) if any(isinstance(v, list) for v in labels.values()) else None
    cohort = Cohort(
        name="Dataset510_Islands",
        root=root,
        channels=("MR",),
        labels=labels,
        regions_class_order=order,
        file_ending=".nii.gz",
        cases=tuple(cases),
        provenance={},
    )
    return cohort, root / "predicted"


CLASSES: dict[str, int | list[int]] = {"background": 0, "body": 1, "core": 2, "pair": 3}
ONE_PIECE: dict[str, int | list[int]] = {"background": 0, "body": 1, "core": 2}
REGIONS: dict[str, int | list[int]] = {"background": 0, "whole": [1, 2], "core": 2, "pair": 3}


def files_of(cohort: Cohort, predictions: Path) -> dict[str, Path]:
    return {case.case_id: predictions / f"{case.case_id}.nii.gz" for case in cohort.labelled}


def decided_by_stock(cohort: Cohort, predictions: Path, patch: pytest.MonkeyPatch) -> list[list[int]]:
    """Let nnU-Net decide, in threads: each of its pools would import torch anew."""
    import nnunetv2.evaluation.evaluate_predictions as evaluation

    threads = SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=multiprocessing.pool.ThreadPool))
    patch.setattr(stock, "multiprocessing", threads)
    patch.setattr(evaluation, "multiprocessing", threads)
    dataset: dict[str, Any] = {"labels": cohort.labels, "file_ending": ".nii.gz", "channel_names": {"0": "MR"}}
    if cohort.regions_class_order:
        dataset["regions_class_order"] = list(cohort.regions_class_order)
    plans = {"image_reader_writer": "SimpleITKIO", "plans_name": "nnUNetPlans", "configurations": {}}
    _, found = stock.determine_postprocessing(
        str(predictions), str(cohort.root / "labelsTr"), plans, dataset, 1, keep_postprocessed_files=False
    )
    return [np.atleast_1d(kwargs["labels_or_regions"]).tolist() for kwargs in found]


@pytest.mark.parametrize(
    ("islands", "labels", "steps"),
    [
        ([(1,), (1, 2), ()], CLASSES, [[1], [2]]),
        ([(1,), (1, 2), ()], ONE_PIECE, [[1, 2]]),
        ([(3,), (3,)], CLASSES, []),
        ([(), ()], CLASSES, []),
        ([(1,), (2,)], REGIONS, [[1, 2]]),
    ],
)
def test_the_decision_is_nnunets_own(
    islands: list[tuple[int, ...]],
    labels: dict[str, int | list[int]],
    steps: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cohort, predictions = small_cohort(tmp_path, islands, labels)
    decided = decide_postprocessing(cohort, files_of(cohort, predictions))
    assert [list(step) for step in decided.steps] == decided_by_stock(cohort, predictions, monkeypatch) == steps


def test_a_patient_with_many_scans_does_not_decide_alone(tmp_path: Path) -> None:
    # A piece more is right in the one scan of the second patient, and wrong in the first one's three.
    cohort, predictions = small_cohort(tmp_path, [(1,), (1,), (1,), ()], ONE_PIECE, patients="aaab")
    human, geometry = read_label(predictions / "case_3.nii.gz")
    human[4:6, 18:20, 18:22] = 1
    for folder in ("labelsTr", "predicted"):
        write_label(tmp_path / folder / "case_3.nii.gz", human, geometry)
    each = replace(cohort, cases=tuple(replace(case, patient=case.case_id) for case in cohort.cases))
    by_case = decide_postprocessing(each, files_of(each, predictions))
    by_patient = decide_postprocessing(cohort, files_of(cohort, predictions))
    assert by_case.patients == 4
    assert by_patient.patients == 2
    assert by_patient.steps == ()
    assert by_case.steps != ()


def test_what_no_human_label_answers_for_decides_nothing(tmp_path: Path) -> None:
    cohort, predictions = small_cohort(tmp_path, [(1, 2), (1, 2)], CLASSES)
    partly = replace(cohort, cases=tuple(replace(case, annotated=(2,)) for case in cohort.cases))
    decided = decide_postprocessing(partly, files_of(partly, predictions))
    assert decided.steps == ((2,),)
    assert decided.before["1"] is None


def test_what_is_taken_away_is_certain_background() -> None:
    label = predicted_with(anatomy(0), 1)
    kept = keep_largest_pieces(label, [(1,)])
    prob = np.full((4, *label.shape), 0.25, np.float32)
    changed = without_removed(prob, label, kept)
    removed = label != kept
    assert removed.any()
    assert (label[removed] == 1).all()
    np.testing.assert_array_equal(changed[:, removed].T, np.tile([1, 0, 0, 0], (removed.sum(), 1)))
    np.testing.assert_array_equal(changed[:, ~removed], prob[:, ~removed])
    np.testing.assert_array_equal(without_removed(prob, label, label), prob)


def test_nnunet_applies_what_was_written(tmp_path: Path) -> None:
    cohort, predictions = small_cohort(tmp_path, [(1,), (1, 2)], CLASSES)
    decided = decide_postprocessing(cohort, files_of(cohort, predictions))
    assert read_postprocessing(tmp_path) is None
    write_postprocessing(tmp_path, decided)
    assert read_postprocessing(tmp_path) == decided
    functions, kwargs = stock.load_pickle(str(tmp_path / "postprocessing.pkl"))
    for case in cohort.labelled:
        label, _ = read_label(predictions / f"{case.case_id}.nii.gz")
        theirs = stock.apply_postprocessing(label, functions, kwargs)
        np.testing.assert_array_equal(keep_largest_pieces(label, decided.steps), theirs)
        assert (theirs != label).any()


def stages_of(dataset: Dataset, fold: str = "0") -> TrainingStages:
    """Return the stages of a run whose first round is the dataset's trained one, up to its data."""
    options = RunOptions(fold=fold, profile="cpu")
    folder = dataset.root / "run"
    ledger = Ledger(folder)
    splits = read_json(dataset.folders.preprocessed / "splits_final.json")
    info = {"round": 1, "configuration": "3d_fullres_r01", "final": False}
    ledger.run_stage("setup/plan", {}, lambda: StageResult(info={"folds": splits}), what="plan")
    ledger.run_stage("r01/data", {}, lambda: StageResult(info=info), what="data")
    return TrainingStages(
        RunContext(folders=dataset.folders, cohort=dataset.cohort, options=options, ledger=ledger, folder=folder)
    )


def test_a_training_leaves_the_decision_beside_its_model_and_the_student_is_predicted_with_it(
    trained: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = stages_of(trained)
    held_out = stages.run.validation_ids
    validation = fold_folder(trained.folders, "3d_fullres_r01", 0) / "validation"
    for case_id in held_out:
        human, geometry = read_label(trained.cohort.label_path(trained.cohort.case(case_id)))
        human[0, :2, :2] = 1
        write_label(validation / f"{case_id}.nii.gz", human, geometry)
    student = stages.train(1, warm_start=None)
    assert student.postprocessing is not None
    assert student.postprocessing.steps == ((1, 2),)
    assert "the largest piece alone of the whole foreground" in capsys.readouterr().out
    assert read_postprocessing(model_folder(trained.folders, "3d_fullres_r01")) == student.postprocessing
    asked: dict[str, Any] = {}
    monkeypatch.setattr("nnunet_sam2.rounds.nnunet.predict_cases", lambda *_, **options: asked.update(options) or [])
    with pytest.raises(StageError, match="No such file"):
        stages.predict(student)
    assert asked["postprocessing"] == ((1, 2),)
    assert stages.run.ledger.events[-1]["inputs"]["postprocessing"] == [[1, 2]]


def test_a_round_that_was_trained_before_keeps_its_labels_as_they_are(trained: Dataset) -> None:
    stages = stages_of(trained)
    checkpoint = fold_folder(trained.folders, "3d_fullres_r01", 0) / "checkpoint_final.pth"
    info = {"validation_dice": 0.5, "checkpoint": str(checkpoint.relative_to(trained.folders.results))}
    inputs = {"data": stages.run.digest("r01/data"), "warm_start": None}
    stages.run.ledger.run_stage(
        "r01/train", inputs, lambda: StageResult(files=(checkpoint,), info=info), what="as an earlier version did"
    )
    assert stages.train(1, warm_start=None).postprocessing is None


def test_without_held_out_cases_nothing_is_decided(trained: Dataset) -> None:
    stages = stages_of(trained, fold="all")
    plans = read_plans(trained.folders)
    plans["configurations"]["3d_fullres_fall_r01"] = plans["configurations"]["3d_fullres_r01"]
    write_plans(trained.folders, plans)
    of_all = fold_folder(trained.folders, "3d_fullres_fall_r01", "all")
    shutil.copytree(fold_folder(trained.folders, "3d_fullres_r01", 0), of_all)
    assert stages.train(1, warm_start=None).postprocessing is None
    assert read_postprocessing(of_all.parent) is None


def test_predict_does_it_by_default_and_export_hands_it_on(
    trained: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_cli_predict import record_run

    record_run(trained.folders, RunOptions(), {1: 0.5})
    decided = Postprocessing(steps=((1,), (2,)), before={"1": 0.5, "2": 0.5}, after={"1": 0.6, "2": 0.6}, patients=1)
    write_postprocessing(model_folder(trained.folders, "3d_fullres_r01"), decided)
    asked = ["predict", "-d", "502", "-i", str(trained.folders.raw / "imagesTs"), "--device", "cpu", "--threads", "1"]
    assert main([*asked, "-o", str(tmp_path / "done"), "--save_probabilities"]) == 0
    assert "decided on held-out patients: the largest piece alone of large, small" in capsys.readouterr().out
    for case in trained.cohort.test:
        given, _ = read_label(trained.root / "predicted" / f"{case.case_id}.nii.gz")
        kept, _ = read_label(tmp_path / "done" / f"{case.case_id}.nii.gz")
        np.testing.assert_array_equal(kept, keep_largest_pieces(given, decided.steps))
        prob = read_probabilities(tmp_path / "done" / "probabilities" / f"{case.case_id}.npz")
        assert (prob[0][given != kept] == 255).all()
    # Without it the labels are those that lie there already, so no network is asked.
    assert main([*asked, "-o", str(trained.root / "predicted"), "--no-postprocessing"]) == 0
    assert "post-processing" not in capsys.readouterr().out
    assert main(["export", "-d", "502", "-o", str(tmp_path / "model")]) == 0
    assert "nnUNetv2_apply_postprocessing" in capsys.readouterr().out
    assert read_postprocessing(tmp_path / "model") == decided
    assert (tmp_path / "model" / "postprocessing.pkl").is_file()
