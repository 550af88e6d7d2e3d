from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from nnunet_sam2.cli.main import main
from nnunet_sam2.errors import InputError
from nnunet_sam2.evaluation import METRICS, class_table, compare, evaluate
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.volumes import write_label

SHAPE = (6, 14, 16)
GEOMETRY = Geometry(shape_zyx=SHAPE, spacing_xyz_mm=(1.5, 2.0, 4.0))
DIAGONAL = float(np.linalg.norm([6 * 4.0, 14 * 2.0, 16 * 1.5]))


def _blob(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
    grid = np.indices(SHAPE)
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) < 1


def _pair() -> tuple[np.ndarray, np.ndarray]:
    truth, guess = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    truth[_blob((3, 6, 6), (2.5, 4, 5))] = 1
    guess[_blob((3, 6.5, 7), (2, 4.5, 4))] = 1
    truth[_blob((2, 11, 13), (2, 2, 2))] = 2
    guess[_blob((3, 11, 12.5), (2, 2.5, 2))] = 2
    return truth, guess


def _surface_mm(mask: np.ndarray) -> np.ndarray:
    edge = mask & ~ndimage.binary_erosion(mask)
    return np.argwhere(edge) * np.array(GEOMETRY.spacing_zyx_mm)


def test_dice_and_hausdorff_equal_their_obvious_definitions() -> None:
    truth, guess = _pair()
    result = compare(truth, guess, GEOMETRY, classes=class_table([1, 2]))
    for value in (1, 2):
        t, g = truth == value, guess == value
        distances = cdist(_surface_mm(t), _surface_mm(g))
        forth, back = distances.min(axis=1), distances.min(axis=0)
        entry = result[str(value)]
        assert entry["dice"] == pytest.approx(2 * (t & g).sum() / (t.sum() + g.sum()), abs=1e-6)
        assert entry["hd"] == pytest.approx(max(forth.max(), back.max()), abs=1e-4)
        assert entry["hd95"] == pytest.approx(max(np.percentile(forth, 95), np.percentile(back, 95)), abs=1e-4)


def test_surface_dice_of_shifted_boxes_is_the_share_of_area_within_the_tolerance() -> None:
    geometry = Geometry(shape_zyx=(30, 30, 30))
    truth, guess = np.zeros((2, 30, 30, 30), np.uint8)
    truth[5:25, 5:25, 5:25] = 1
    guess[5:25, 5:25, 8:28] = 1
    strict = compare(truth, guess, geometry, classes=class_table([1]), nsd_tolerance_mm=1.0)["1"]
    loose = compare(truth, guess, geometry, classes=class_table([1]), nsd_tolerance_mm=3.0)["1"]
    # Of six faces of 400 mm2 each, the four along x agree but for 2 of 20 rows (a third is within 1 mm), and the end
    # face inside the other box agrees in a rim of 1 mm; the error is that of surfaces made of voxels.
    assert strict["nsd"] == pytest.approx((4 * 400 * 18 / 20 + 400 - 18**2) / 2400, abs=0.035)
    assert loose["nsd"] == pytest.approx(1.0)
    inner = np.zeros_like(truth)
    inner[8:22, 8:22, 8:22] = 1
    assert compare(truth, inner, geometry, classes=class_table([1]), nsd_tolerance_mm=2.5)["1"]["nsd"] == 0.0
    assert strict["hd"] == pytest.approx(3.0)


def test_perfect_prediction_absent_class_false_positive_and_miss() -> None:
    truth, _ = _pair()
    guess = truth.copy()
    guess[guess == 2] = 0
    guess[0, 0, 0] = 3
    result = compare(truth, guess, GEOMETRY, classes=class_table([1, 2, 3, 4]))
    assert result["1"] == {"dice": 1.0, "hd95": 0.0, "hd": 0.0, "nsd": 1.0}
    for missed_or_invented in ("2", "3"):
        assert result[missed_or_invented]["dice"] == 0.0
        assert result[missed_or_invented]["nsd"] == 0.0
        assert result[missed_or_invented]["hd"] == pytest.approx(DIAGONAL)
    assert result["4"] == dict.fromkeys(METRICS)


def test_ignored_voxels_do_not_count() -> None:
    truth, guess = _pair()
    truth[:, :, 8:] = 5
    clean = compare(truth * (truth != 5), guess * (truth != 5), GEOMETRY, classes=class_table([1]))
    assert compare(truth, guess, GEOMETRY, classes=class_table([1]), ignore_value=5) == clean


def test_a_single_slice_is_compared_as_a_picture() -> None:
    geometry = Geometry(shape_zyx=(1, 20, 20))
    truth, guess = np.zeros((2, 1, 20, 20), np.uint8)
    truth[0, 5:15, 5:15] = 1
    guess[0, 5:15, 6:16] = 1
    entry = compare(truth, guess, geometry, classes=class_table([1]), nsd_tolerance_mm=0.5)["1"]
    assert entry["hd"] == pytest.approx(1.0)
    assert 0.3 < float(entry["nsd"] or 0) < 0.7  # the sides along x agree, those across do not


def _folders(tmp_path: Path) -> tuple[Path, Path]:
    truth, guess = _pair()
    for name, t, g in (("a", truth, guess), ("b", truth, truth), ("c", truth * (truth == 1), truth)):
        write_label(tmp_path / "gt" / f"{name}.nii.gz", t, GEOMETRY)
        write_label(tmp_path / "pred" / f"{name}.nii.gz", g, GEOMETRY)
    return tmp_path / "gt", tmp_path / "pred"


def test_folders_give_means_over_cases_and_classes(tmp_path: Path) -> None:
    reference, prediction = _folders(tmp_path)
    result = evaluate(reference, prediction, class_values=[1, 2, 7])
    cases = result["cases"]
    assert sorted(cases) == ["a", "b", "c"]
    assert cases["c"]["classes"]["2"]["dice"] == 0.0
    assert cases["a"]["classes"]["7"]["dice"] is None
    assert cases["a"]["dice"] == pytest.approx(np.mean([cases["a"]["classes"][c]["dice"] for c in "12"]))
    assert result["classes"]["2"]["dice"] == pytest.approx(np.mean([cases[c]["classes"]["2"]["dice"] for c in "abc"]))
    assert result["classes"]["7"] == dict.fromkeys(METRICS)
    assert result["mean"]["dice"] == pytest.approx(np.mean([result["classes"][c]["dice"] for c in "12"]))
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_dice_is_nnunets_own(tmp_path: Path) -> None:
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    reference, prediction = _folders(tmp_path)
    result = evaluate(reference, prediction, class_values={"1": (1,), "1+2": (1, 2)})
    for name in "abc":
        stock = compute_metrics(
            str(reference / f"{name}.nii.gz"), str(prediction / f"{name}.nii.gz"), SimpleITKIO(), [1, (1, 2)]
        )
        for ours, theirs in (("1", 1), ("1+2", (1, 2))):
            assert result["cases"][name]["classes"][ours]["dice"] == pytest.approx(stock["metrics"][theirs]["Dice"])


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    reference, prediction = _folders(tmp_path)
    with pytest.raises(InputError, match="at least one class"):
        evaluate(reference, prediction, class_values=[])
    with pytest.raises(InputError, match="surface tolerance"):
        evaluate(reference, prediction, class_values=[1], nsd_tolerance_mm=-1)
    with pytest.raises(InputError, match="holds label 2, declared are 0, 1"):
        evaluate(reference, prediction, class_values=[1], declared_values=[1])
    (prediction / "b.nii.gz").unlink()
    with pytest.raises(InputError, match="no prediction for b; predict all"):
        evaluate(reference, prediction, class_values=[1])
    assert sorted(evaluate(reference, prediction, class_values=[1], allow_missing=True)["cases"]) == ["a", "c"]
    other = Geometry(shape_zyx=SHAPE, spacing_xyz_mm=(1.5, 2.0, 4.1))
    write_label(prediction / "b.nii.gz", _pair()[0], other)
    with pytest.raises(InputError, match=r"b\.nii\.gz differ in spacing"):
        evaluate(reference, prediction, class_values=[1])


def test_the_command_prints_json_alone_and_takes_names_from_dataset_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, prediction = _folders(tmp_path)
    labels = {"background": 0, "organ": 1, "other": 2, "ignore": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    out = tmp_path / "result.json"
    assert main(["evaluate", "-g", str(reference), "-p", str(prediction), "--json", "-o", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text())
    assert set(result) >= {"mean", "classes", "cases"}
    assert result["class_names"] == {"1": "organ", "2": "other"}
    assert result["options"]["ignore_value"] == 3
    for entry in (result["mean"], *result["classes"].values(), *result["cases"].values()):
        assert set(entry) >= set(METRICS)


def test_the_command_prints_a_table_and_finds_the_values_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, prediction = _folders(tmp_path)
    assert main(["evaluate", "-g", str(reference), "-p", str(prediction)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["class", "1", "2", "a", "b", "c", "mean"]
    assert main(["evaluate", "-g", str(reference), "-p", str(prediction), "-l", "1"]) == 0
    assert "\n2 " not in capsys.readouterr().out


def test_the_command_refuses_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference, _ = _folders(tmp_path)
    assert main(["evaluate", "-g", str(reference), "-p", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
