"""A submission's faults are all listed at once, by kind and file."""

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
from PIL import Image

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.submission import EXTRA, FOLDER, GEOMETRY, MISSING, TYPE, UNREADABLE, VALUES, check_submission
from nnunet_sam2.volumes import write_image, write_label

GRID = Geometry(shape_zyx=(3, 8, 9), spacing_xyz_mm=(1.0, 1.0, 4.0))
CASES = {f"c{i}": GRID for i in range(6)}


def _write(folder: Path) -> Path:
    for i, case_id in enumerate(CASES):
        write_label(folder / f"{case_id}.nii.gz", np.full(GRID.shape_zyx, i % 3, np.uint8), GRID)
    return folder


def _packed(folder: Path, prefix: str) -> Path:
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as opened:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                opened.write(path, f"{prefix}{path.relative_to(folder)}")
    return archive


def _spoil(folder: Path) -> dict[tuple[str, str], str]:
    """Put one fault of each kind in and return what should be said of it."""
    write_image(folder / "c0.nii.gz", np.zeros((1, *GRID.shape_zyx), np.float32), GRID)
    moved = Geometry(shape_zyx=GRID.shape_zyx, spacing_xyz_mm=(1.0, 1.0, 4.0), origin_xyz_mm=(0.0, 5.0, 0.0))
    write_label(folder / "c1.nii.gz", np.zeros(GRID.shape_zyx, np.uint8), moved)
    write_label(folder / "c2.nii.gz", np.full(GRID.shape_zyx, 7, np.uint8), GRID)
    (folder / "c3.nii.gz").write_bytes((folder / "c3.nii.gz").read_bytes()[:-9])
    (folder / "c4.nii.gz").unlink()
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._c5.nii.gz").write_bytes(b"x")
    (folder / "._c5.nii.gz").write_bytes(b"x")
    (folder / "c9.nii.gz").write_bytes(b"x")
    (folder / "sub").mkdir()
    shutil.move(folder / "c5.nii.gz", folder / "sub" / "c5.nii.gz")
    return {
        (TYPE, "c0.nii.gz"): "float32",
        (GEOMETRY, "c1.nii.gz"): "origin",
        (VALUES, "c2.nii.gz"): "label 7, declared are 0, 1, 2",
        (UNREADABLE, "c3.nii.gz"): "cut off",
        (MISSING, "c4.nii.gz"): "no label file",
        (MISSING, "c5.nii.gz"): "no label file",
        (EXTRA, "__MACOSX/._c5.nii.gz"): "macOS",
        (EXTRA, "._c5.nii.gz"): "macOS",
        (EXTRA, "c9.nii.gz"): "no case is called so",
        (FOLDER, "sub/c5.nii.gz"): "wanted is c5.nii.gz",
    }


@pytest.mark.parametrize("zipped", [False, True])
def test_every_fault_is_listed_with_its_file(zipped: bool, tmp_path: Path) -> None:
    folder = _write(tmp_path / "out")
    expected = _spoil(folder)
    given = _packed(folder, "") if zipped else folder
    problems = check_submission(given, CASES, ending=".nii.gz", allowed=(1, 2))
    assert {(p.kind, p.file) for p in problems} == set(expected)
    for problem in problems:
        assert expected[problem.kind, problem.file] in problem.text
        assert str(tmp_path) not in problem.text


def test_a_sound_submission_has_no_problems_in_the_folder_that_is_asked_for(tmp_path: Path) -> None:
    archive = _packed(_write(tmp_path / "out"), "team/Task01_results/")
    assert check_submission(archive, CASES, ending=".nii.gz", root="team/Task01_results", allowed=(1, 2)) == []
    problems = check_submission(archive, CASES, ending=".nii.gz", allowed=(1, 2))
    assert (problems[0].kind, problems[0].file) == (FOLDER, "team/Task01_results")
    assert sum(p.kind == FOLDER for p in problems) == 7
    assert sum(p.kind == MISSING for p in problems) == 6


def test_the_command_lists_the_faults_and_its_status_tells(
    tmp_path: Path, tiny_dataset: object, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert main(["check-submission", "-d", "501", "-p", str(out)]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("missing case: subject_005.nii.gz")
    assert told[-1] == "1 cases wanted, 1 problems"
    _write(tmp_path / "labels")
    for name in CASES:
        write_image(tmp_path / "images" / f"{name}_0000.nii.gz", np.zeros((1, *GRID.shape_zyx), np.int16), GRID)
    shutil.rmtree(out)
    asked = ["check-submission", "-i", str(tmp_path), "-p", str(tmp_path / "labels"), "--json"]
    shutil.move(tmp_path / "labels", tmp_path / "given")
    asked[4] = str(tmp_path / "given")
    assert main([*asked, "--labels", "a=1,b=2"]) == 0
    assert main([*asked, "--labels", "a=1"]) == 1
    answer = json.loads(capsys.readouterr().out.split("\n}\n")[1] + "\n}")
    assert {p["kind"] for p in answer["problems"]} == {VALUES}
    assert main(["check-submission", "-d", "501", "-p", str(tmp_path / "nowhere")]) == 2


def test_for_pictures_pictures_are_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("images", "given"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((9, 7), np.uint8)).save(tmp_path / folder / "a.png")
    assert main(["check-submission", "-i", str(tmp_path / "images"), "-p", str(tmp_path / "given")]) == 0
    assert "1 cases, all good" in capsys.readouterr().out


def test_a_reader_that_goes_ends_the_command_in_one_line(tmp_path: Path) -> None:
    _write(tmp_path / "images")
    (tmp_path / "given").mkdir()
    asked = ["check-submission", "-i", str(tmp_path / "images"), "-p", str(tmp_path / "given")]
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-u", "-m", "nnunet_sam2.cli.main", *asked]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert done.returncode == 141
    assert done.stderr == (
        "nnunet_sam2 check-submission: what it prints is read no further; it ends here, what is finished is kept\n"
    )


def test_what_a_prediction_writes_beside_its_labels_is_a_problem_in_a_zip_alone(
    tiny_dataset: DatasetFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = Cohort.load(tiny_dataset.raw)
    folder = tmp_path / "out"
    for case in cohort.test:
        write_label(folder / f"{case.case_id}.nii.gz", np.zeros(case.geometry.shape_zyx, np.uint8), case.geometry)
    case_id = cohort.test[0].case_id
    for name in ("predict.log", "quality.json", f"records/{case_id}.json", f"student/{case_id}.nii.gz"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert main(["check-submission", "-d", str(tiny_dataset.dataset_id), "-p", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "all good" in told
    assert "to be left out of a zip: predict.log, quality.json, records/" in told
    packed = _packed(folder, "")
    assert main(["check-submission", "-d", str(tiny_dataset.dataset_id), "-p", str(packed)]) == 1
    assert capsys.readouterr().out.count("by-product: ") == 4
