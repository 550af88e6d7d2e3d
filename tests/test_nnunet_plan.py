"""Planning, preprocessing and splits: from the labelled cases alone, once, and never from stale labels."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from anisotropic_data import Dataset, small_round

from nnunet_sam2.errors import InputError
from nnunet_sam2.rounds.nnunet import plan as nnunet_plan
from nnunet_sam2.rounds.nnunet import plan_and_preprocess, read_plans, require_splits, write_splits
from nnunet_sam2.storage import file_hash, read_json, write_json
from nnunet_sam2.volumes import read_label, write_label


class CommandNeededError(Exception):
    """Says which nnU-Net command would have run."""


def plan(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, configuration: str = "3d_fullres") -> Path:
    """Plan again, but report the command instead of running it."""

    def report(argv: list[str], **_: Any) -> None:
        raise CommandNeededError(" ".join([Path(argv[0]).name, *argv[1:]]))

    monkeypatch.setattr(nnunet_plan, "run_logged", report)
    return plan_and_preprocess(dataset.folders, dataset.cohort, configuration, log=dataset.log)


def change_label(dataset: Dataset) -> Path:
    path = dataset.cohort.label_path(dataset.cohort.labelled[0])
    label, geometry = read_label(path)
    label[label == 2] = 1
    write_label(path, label, geometry)
    os.utime(path, (1, 1))  # older than nnU-Net's copy
    return path


def test_fingerprint_and_preprocessed_cases_are_the_labelled_ones_alone(planned: Dataset) -> None:
    labelled = {case.case_id for case in planned.cohort.labelled}
    folder = planned.folders.preprocessed / "nnUNetPlans_3d_fullres"
    assert {name.split(".")[0].removesuffix("_seg") for name in os.listdir(folder)} == labelled
    fingerprint = read_json(planned.folders.preprocessed / "dataset_fingerprint.json")
    assert len(fingerprint["spacings"]) == len(labelled)


def test_planning_again_runs_nothing(planned: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(planned, monkeypatch) == planned.folders.preprocessed / "nnUNetPlans.json"


def test_a_changed_label_is_planned_anew_even_if_its_file_is_older(
    planned: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_label(planned)
    with pytest.raises(CommandNeededError, match=r"nnUNetv2_plan_and_preprocess .* --clean"):
        plan(planned, monkeypatch)
    # killed there, the step is not taken for done
    with pytest.raises(CommandNeededError, match=r"nnUNetv2_plan_and_preprocess .* --clean"):
        plan(planned, monkeypatch)


def test_references_of_the_validation_follow_the_labels(planned: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = planned.folders.preprocessed / "gt_segmentations" / "case_00.nii.gz"
    shutil.copy(planned.cohort.label_path(planned.cohort.labelled[1]), reference)
    (reference.parent / "case_99.nii.gz").write_bytes(b"of a case that is no more")
    plan(planned, monkeypatch)
    assert file_hash(reference) == file_hash(planned.cohort.label_path(planned.cohort.labelled[0]))
    assert not (reference.parent / "case_99.nii.gz").exists()


def test_changed_labels_are_refused_once_rounds_were_built_on_them(
    planned: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_round(planned, "3d_fullres_r01")
    change_label(planned)
    with pytest.raises(InputError, match="changed after rounds were built"):
        plan(planned, monkeypatch)


def test_another_nnunet_is_refused_once_rounds_were_built_on_plans_of_the_first(
    planned: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_round(planned, "3d_fullres_r01")
    here = nnunet_plan.require_nnunet()
    monkeypatch.setattr(nnunet_plan, "require_nnunet", lambda: "2.99")
    with pytest.raises(
        InputError, match=rf"planned with nnunetv2 {here}, this is 2.99; .*pip install nnunetv2=={here}"
    ):
        plan(planned, monkeypatch)


def test_a_missing_preprocessed_file_is_made_again_with_the_same_plans(
    planned: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    (planned.folders.preprocessed / "nnUNetPlans_3d_fullres" / "case_00_seg.b2nd").unlink()
    with pytest.raises(CommandNeededError, match=r"nnUNetv2_preprocess .* -c 3d_fullres"):
        plan(planned, monkeypatch)


def test_a_preprocessed_file_that_is_no_longer_what_nnunet_wrote_is_made_again(
    planned: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = planned.folders.preprocessed / "nnUNetPlans_3d_fullres" / "case_00.b2nd"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CommandNeededError, match=r"nnUNetv2_preprocess .* -c 3d_fullres"):
        plan(planned, monkeypatch)


def test_plans_of_the_users_own_are_kept(planned: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    (planned.folders.preprocessed / nnunet_plan.MARKER_FILE).unlink()
    with pytest.raises(CommandNeededError, match=r"nnUNetv2_preprocess .* -plans_name nnUNetPlans"):
        plan(planned, monkeypatch)


def test_a_configuration_that_was_not_planned_is_refused_with_those_that_were(
    planned: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned_ones = ", ".join(read_plans(planned.folders)["configurations"])
    with pytest.raises(InputError, match=f"no 3d_lowres, only: {planned_ones}"):
        plan(planned, monkeypatch, "3d_lowres")


def test_splits_are_written_once_and_kept(planned: Dataset) -> None:
    splits = write_splits(planned.folders, planned.cohort)
    assert len(splits) == 4
    kept = [splits[1], splits[0]]
    write_json(planned.folders.preprocessed / "splits_final.json", kept)
    assert write_splits(planned.folders, planned.cohort) == kept


def test_splits_that_validate_on_a_machine_labelled_case_are_refused(planned: Dataset) -> None:
    path = planned.folders.preprocessed / "splits_final.json"
    write_json(path, [{"train": ["case_00"], "val": [planned.unlabelled[0]]}])
    with pytest.raises(InputError, match=f"names {planned.unlabelled[0]}, no labelled case"):
        write_splits(planned.folders, planned.cohort)


def test_other_folds_than_a_run_began_with_are_refused_and_lost_ones_written_anew(planned: Dataset) -> None:
    path = planned.folders.preprocessed / "splits_final.json"
    folds = read_json(path)
    require_splits(planned.folders, folds)
    write_json(path, folds[::-1])
    with pytest.raises(InputError, match="other folds than this run began with"):
        require_splits(planned.folders, folds)
    path.unlink()
    require_splits(planned.folders, folds)
    assert read_json(path) == folds


def test_splits_that_share_a_patient_are_refused(planned: Dataset) -> None:
    write_json(planned.folders.preprocessed / "splits_final.json", [{"train": ["case_00"], "val": ["case_00"]}])
    with pytest.raises(InputError, match="trains and validates on patient case_00"):
        write_splits(planned.folders, planned.cohort)
