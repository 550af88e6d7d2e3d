"""Which images and which model ``nnunet_sam2 predict`` and ``export`` take."""

from __future__ import annotations

import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from anisotropic_data import Dataset

from nnunet_sam2.cli.main import main
from nnunet_sam2.cli.predict import _tell_orientation, chosen_model, find_cases
from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.checks import VOLUME_ENDINGS
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.largest import keep_largest, single_classes
from nnunet_sam2.rounds.ledger import Ledger, StageResult
from nnunet_sam2.rounds.nnunet import predict as nnunet_predict
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.state import run_folder
from nnunet_sam2.volumes import read_label


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_cases_are_found_by_nnunets_names_in_the_order_of_their_channels(tmp_path: Path) -> None:
    folder = files(tmp_path, "b_0001.nii.gz", "a_0000.nii.gz", "b_0000.nii.gz", "a_0001.nii.gz", "notes.txt")
    cases = find_cases(folder, VOLUME_ENDINGS, files_a_case=2)
    assert cases == {c: [folder / f"{c}_0000.nii.gz", folder / f"{c}_0001.nii.gz"] for c in ("a", "b")}


def test_with_one_channel_plain_names_and_other_volume_formats_will_do(tmp_path: Path) -> None:
    folder = files(tmp_path, "a.nii.gz", "b.nii", "c.mha", "d_0000.nrrd", ".hidden.nii.gz")
    cases = find_cases(folder, VOLUME_ENDINGS, files_a_case=1)
    assert {case: paths[0].name for case, paths in cases.items()} == {
        "a": "a.nii.gz",
        "b": "b.nii",
        "c": "c.mha",
        "d": "d_0000.nrrd",
    }


@pytest.mark.parametrize(
    ("names", "count", "message"),
    [
        (["a_0000.nii.gz"], 2, "lacks channel a_0001"),
        (["a_0000.nii.gz", "a_0001.nii.gz", "a_0002.nii.gz"], 2, "channel a_0002 in .* is surplus"),
        (["a.nii.gz"], 2, "takes 2 files here; name it a_0000"),
        (["a.nii", "a.nii.gz"], 1, "both name case a"),
        (["a.png"], 1, "holds no images with the ending .nii.gz"),
    ],
)
def test_unclear_images_are_refused(tmp_path: Path, names: list[str], count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_cases(files(tmp_path, *names), VOLUME_ENDINGS, files_a_case=count)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder; give the folder of the images with -i"):
        find_cases(tmp_path / "none", VOLUME_ENDINGS, files_a_case=1)


def record_run(folders: DatasetFolders, options: RunOptions, dice: dict[int, float]) -> None:
    """Write the ledger of a run whose rounds have these validation scores."""
    ledger = Ledger(run_folder(folders, options.run_name))
    ledger.append("run", options=options.to_json())
    for number, value in dice.items():
        data = {"round": number, "configuration": options.round_configuration(number), "final": False}
        for stage, info in (("data", data), ("train", {"validation_dice": value, "validation_by_class": {}})):
            ledger.run_stage(f"r{number:02d}/{stage}", {}, lambda info=info: StageResult(info=info), what=stage)


def choose(folders: DatasetFolders, **options: object) -> tuple[str, ...]:
    chosen = chosen_model(folders, Namespace(**{"round": None, "run_name": None, "fold": None, **options}))
    return chosen.configuration, *chosen.folds


@pytest.fixture
def two_runs(tmp_path: Path) -> DatasetFolders:
    folders = DatasetFolders(
        name="Dataset501_Toy",
        raw=tmp_path / "raw",
        preprocessed=tmp_path / "preprocessed",
        results=tmp_path / "results",
    )
    record_run(folders, RunOptions(fold="1"), {0: 0.5, 1: 0.6})
    record_run(folders, RunOptions(fold="0"), {0: 0.5, 1: 0.9, 2: 0.8})
    return folders


def test_the_best_round_of_the_last_run_is_taken_unless_another_is_named(two_runs: DatasetFolders) -> None:
    assert choose(two_runs) == ("3d_fullres_r01", "0")
    assert choose(two_runs, round=2) == ("3d_fullres_r02", "0")
    assert choose(two_runs, fold=["1"]) == ("3d_fullres_f1_r01", "1")
    assert choose(two_runs, run_name="3d_fullres_fold1", round=0) == ("3d_fullres_f1_r00", "1")


def test_models_that_are_not_there_are_refused_with_those_that_are(two_runs: DatasetFolders) -> None:
    with pytest.raises(InputError, match=r"round 7 has no trained model .* finished rounds: 0, 1, 2"):
        choose(two_runs, round=7)
    with pytest.raises(InputError, match="no run of fold 3; folds with runs: 0, 1"):
        choose(two_runs, fold=["3"])
    with pytest.raises(InputError, match="run 3d_fullres_fold1 trained fold 1, not 0"):
        choose(two_runs, fold=["0"], run_name="3d_fullres_fold1")


def test_predict_and_export_work_from_the_command_line(
    trained: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record_run(trained.folders, RunOptions(), {1: 0.5})
    # the same inputs were predicted into this folder before, so no process is needed
    monkeypatch.setattr(nnunet_predict, "stream_logged", None)
    images, out = str(trained.folders.raw / "imagesTs"), str(trained.root / "predicted")
    assert main(["predict", "-d", "502", "-i", images, "-o", out, "--device", "cpu"]) == 0
    assert "1 cases with 3d_fullres_r01, fold 0" in capsys.readouterr().out
    filtered = tmp_path / "filtered"
    shutil.copytree(out, filtered / "unfiltered")
    asked = ["predict", "-d", "502", "-i", images, "-o", str(filtered), "--device", "cpu", "--keep-largest"]
    assert main(asked) == 0
    told = capsys.readouterr().out
    cohort = Cohort.load(trained.folders.raw)
    values = single_classes(cohort)
    name = f"{cohort.test[0].case_id}.nii.gz"
    kept, dropped = keep_largest(read_label(trained.root / "predicted" / name)[0], values)
    np.testing.assert_array_equal(read_label(filtered / name)[0], kept)
    assert f": {dropped} voxels dropped in {int(dropped > 0)} of 1 cases" in told
    assert main(["check-submission", "-d", "502", "-p", str(filtered)]) == 0
    capsys.readouterr()
    assert main(["export", "-d", "502", "-o", str(tmp_path / "model")]) == 0
    assert f"-m {tmp_path / 'model'} -f 0" in capsys.readouterr().out
    assert (tmp_path / "model" / "fold_0" / "checkpoint_final.pth").is_file()
    assert main(["predict", "-d", "502", "-i", images, "-o", images]) == 2
    assert "is the folder of the images" in capsys.readouterr().err


def test_images_that_are_stored_as_no_case_of_the_model_is_are_told_of(
    tiny_dataset: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = Cohort.load(tiny_dataset.raw)
    own = cohort.cases[0].geometry
    turned = replace(own, direction=tuple(-one for one in own.direction))
    _tell_orientation(cohort, {"a": own})
    assert capsys.readouterr().out == ""
    _tell_orientation(cohort, {"a": own, "b": turned})
    assert "1 of 2 images are stored in an orientation that no case of" in capsys.readouterr().out
