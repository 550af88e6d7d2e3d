"""Lists of annotated classes: what they may say, what is refused, and where they end up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.annotated import known_values
from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.evaluation import evaluate
from nnunet_sam2.folders import new_dataset_folders
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.volumes import write_image, write_label

GRID = Geometry(shape_zyx=(3, 8, 8), spacing_xyz_mm=(1.0, 1.0, 2.0))
TABLE = "liver=1,kidney=2"


def _label(*values: int) -> np.ndarray:
    label_zyx = np.zeros(GRID.shape_zyx, np.uint8)
    for value in values:
        label_zyx[1, 3 * value - 2 : 3 * value, 2:6] = value
    return label_zyx


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Scan one with the liver alone, scan two with the kidney alone, scan three with both, a fourth without a label."""
    folder = tmp_path / "source"
    for i, values in enumerate([(1,), (2,), (1, 2), None]):
        image = np.random.default_rng(i).integers(0, 99, (1, *GRID.shape_zyx)).astype(np.int16)
        write_image(folder / "images" / f"scan_{i + 1}.nii.gz", image, GRID)
        if values:
            write_label(folder / "labels" / f"scan_{i + 1}.nii.gz", _label(*values), GRID)
    return folder


def _convert(source: Path, *options: str, labels: str = TABLE) -> Cohort:
    folders = new_dataset_folders(7, "T")
    assert main(["convert", str(source), "-d", "7", "-n", "T", "--labels", labels, *options]) == 0
    return Cohort.load(folders.raw)


def _list(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def _annotated(cohort: Cohort) -> dict[str, tuple[int, ...] | None]:
    return {case.case_id: case.annotated for case in cohort.cases}


def test_a_list_is_kept_by_case_in_the_datasets_values(source: Path, tmp_path: Path, fresh_roots: Path) -> None:
    path = _list(tmp_path / "list.json", {"scan_1": ["liver"], "scan_2": [2], "scan_3": ["liver", "kidney"]})
    cohort = _convert(source, "--annotated", str(path))
    assert _annotated(cohort) == {"scan_1": (1,), "scan_2": (2,), "scan_3": None, "scan_4": None}
    scan = cohort.case("scan_1")
    assert [scan.answers_for(value) for value in (1, 2)] == [True, False]
    assert Case.from_json(scan.to_json()) == scan
    assert "annotated" not in cohort.case("scan_3").to_json(), "earlier versions read what is annotated with all"


def test_values_are_those_of_the_files_and_a_star_stands_for_the_others(
    source: Path, tmp_path: Path, fresh_roots: Path
) -> None:
    for i, values in enumerate([(1,), (2,), (1, 2)]):
        label_zyx = _label(*values)
        write_label(source / "labels" / f"scan_{i + 1}.nii.gz", np.where(label_zyx == 2, 20, label_zyx), GRID)
    path = _list(tmp_path / "list.json", {"scan_2": ["20"], "scan_1": ["liver"], "*": ["background", 1, 20]})
    cohort = _convert(source, "--annotated", str(path), labels="liver=1,kidney=20")
    assert _annotated(cohort) == {"scan_1": (1,), "scan_2": (2,), "scan_3": None, "scan_4": None}


def test_a_list_beside_the_labels_is_found_and_told(
    source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _list(source / "labels" / "labels.json", {"scan_1": ["liver"], "scan_2": ["kidney"], "scan_4": ["liver"]})
    cohort = _convert(source)
    assert _annotated(cohort)["scan_1"] == (1,)
    told = capsys.readouterr().out
    assert f"{path} says which classes are annotated in which case" in told
    assert "names scan_4, which have no label file" in told
    assert "2 cases are annotated in part" in told
    assert "shows no" not in told


def test_classes_that_some_labels_lack_are_told_with_the_option(
    source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(_annotated(_convert(source)).values()) == {None}
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "shows no" in line]
    assert "scan_2 shows no liver, others do (other cases lack kidney)" in note
    assert "--annotated FILE" in note


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"scan_9": ["liver"]}, "names case scan_9, which the source does not have; did you mean scan_"),
        ({"scan_1": ["livr"]}, "names class livr, which the label table does not have; did you mean liver"),
        ({"scan_1": [3]}, "names class 3"),
        ({"scan_1": []}, "no class of scan_1 is annotated; remove its label file"),
        ({"scan_1": "liver"}, "is no list of annotated classes"),
        ({"scan_1": [True]}, "is no list of annotated classes"),
        (["scan_1"], "is no list of annotated classes"),
        ({"scan_3": ["liver"]}, "scan_3.nii.gz holds kidney, which .*list.json leaves out for case scan_3"),
        ({"*": ["kidney"]}, "scan_1.nii.gz holds liver, which"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    value: Any, message: str, source: Path, tmp_path: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _list(tmp_path / "list.json", value)
    assert main(["convert", str(source), "-d", "7", "-n", "T", "--labels", TABLE, "--annotated", str(path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said), said
    assert not new_dataset_folders(7, "T").raw.exists()


def test_a_region_without_the_one_inside_is_refused() -> None:
    labels: dict[str, int | list[int]] = {"background": 0, "whole": [1, 2], "core": 2}
    assert known_values(["core"], labels, where="list") == {2}
    assert known_values(["whole", "core"], labels, where="list") == {1, 2}
    with pytest.raises(InputError, match="names whole without core, whose voxels lie inside"):
        known_values(["whole"], labels, where="list")


def _compared(tmp_path: Path) -> tuple[Path, Path]:
    reference, prediction = tmp_path / "gt", tmp_path / "pred"
    for name, values in (("scan_1", (1,)), ("scan_3", (1, 2))):
        write_label(reference / f"{name}.nii.gz", _label(*values), GRID)
        write_label(prediction / f"{name}.nii.gz", _label(1, 2), GRID)
    return reference, prediction


def test_evaluation_counts_a_class_where_it_was_annotated_alone(tmp_path: Path) -> None:
    reference, prediction = _compared(tmp_path)
    blind = evaluate(reference, prediction, class_values=(1, 2))
    assert blind["classes"]["2"]["dice"] == 0.5
    result = evaluate(reference, prediction, class_values=(1, 2), annotated={"scan_1": (1,)})
    assert result["classes"]["2"]["dice"] == result["mean"]["dice"] == 1.0
    assert set(result["cases"]["scan_1"]["classes"]["2"].values()) == {None}
    one = evaluate(
        reference / "scan_1.nii.gz", prediction / "scan_1.nii.gz", class_values=(1, 2), annotated={"scan_1": (1,)}
    )
    assert one["mean"]["dice"] == 1.0


def test_evaluate_takes_a_list_or_the_one_of_the_dataset(
    source: Path, tmp_path: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, prediction = _compared(tmp_path)
    command = ["evaluate", "-g", str(reference), "-p", str(prediction), "--labels", TABLE, "--json"]
    path = _list(tmp_path / "list.json", {"scan_1": ["liver"], "elsewhere": ["kidney"]})
    assert main([*command, "--annotated", str(path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["classes"]["2"]["dice"] == 1.0
    assert result["annotated"] == {"file": str(path), "values": {"scan_1": [1]}}
    path.write_text('{"elsewhere": ["kidney"]}')
    assert main([*command, "--annotated", str(path)]) == 2
    assert "names none of the references" in capsys.readouterr().err

    _list(source / "labels" / "labels.json", {"scan_1": ["liver"], "scan_2": ["kidney"]})
    cohort = _convert(source)
    for name in ("scan_1", "scan_2", "scan_3"):
        write_label(tmp_path / "all" / f"{name}.nii.gz", _label(1, 2), GRID)
    capsys.readouterr()
    assert main(["evaluate", "-g", str(cohort.root / "labelsTr"), "-p", str(tmp_path / "all")]) == 0
    told = capsys.readouterr().out
    assert "cohort.json says which classes are annotated" in told
    assert [line.split()[-4] for line in told.splitlines() if line.startswith(("mean", "2 kidney"))] == ["1.0000"] * 2
