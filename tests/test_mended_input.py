"""Faults that may be mended: refused by default with the option that mends, mended and counted when asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from scipy.spatial.transform import Rotation
from small_source import GRID, SHAPE, random_image, write_source

from nnunet_sam2.cli.main import main
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.repairs import ReadPolicy
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.volumes import read_label, read_stored, read_stored_as, write_image


def _nifti(path: Path, values_zyx: np.ndarray, *, sform: np.ndarray, qform: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values_zyx.T, sform)
    image.set_sform(sform, 1)
    image.set_qform(qform, 0 if qform is None else 1)
    nibabel.save(image, path)
    return path


def _sheared(shear: float) -> np.ndarray:
    affine = np.diag([1.25, 1.25, 5.0, 1.0])
    affine[0, 2] = shear * 5.0
    return affine


def _convert(source: Path, *options: str) -> int:
    return main(["convert", str(source), "-d", "7", "-n", "T", *options])


def _cases(root: Path) -> dict[str, dict]:
    value = json.loads((root / "nnUNet_raw/Dataset007_T/cohort.json").read_text())
    return {case["id"]: case for case in value["cases"]}


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
@pytest.mark.parametrize(("choice", "value"), [("zero", 0.0), ("min", -7.0)])
def test_nan_and_inf_are_replaced_as_asked_and_counted(
    source: Path, fresh_roots: Path, ending: str, choice: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    values = random_image(2)[0].astype(np.float32)
    values[0, 0, :3] = (np.nan, np.inf, -np.inf)
    values[1, 1, 1] = -7
    (source / "images/case2.nii.gz").unlink()
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values), str(source / f"images/case2{ending}"))
    assert _convert(source) == 2
    assert "1 NaN and 2 infinite voxels" in (told := capsys.readouterr().err)
    assert "--nan zero or --nan min" in told
    assert _convert(source, "--nan", choice) == 0
    assert f"3 NaN or infinite voxels were set to {choice}" in capsys.readouterr().out
    case = _cases(fresh_roots)["case2"]
    assert case["repairs"] == {f"case2{ending}": {"nonfinite_voxels": 3, "nonfinite_set_to": choice}}
    written, _ = read_stored(fresh_roots / "nnUNet_raw/Dataset007_T" / case["images"][0])
    values[0, 0, :3] = value
    assert np.array_equal(written[0], values)
    assert set(_cases(fresh_roots)["case0"]) >= {"file_hashes", "placed_hash"}
    assert "repairs" not in _cases(fresh_roots)["case0"]


def test_what_is_mended_is_kept_for_each_channel_where_their_files_have_one_name(
    tmp_path: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "source", cases=3)
    shutil.rmtree(source / "images")
    for c, channel in enumerate(("flair", "t1")):
        for i in range(3):
            values = random_image(10 * c + i)[0].astype(np.float32)
            values[0, 0, : c + 1] = np.nan if i == 2 else 5
            (source / "images" / channel).mkdir(parents=True, exist_ok=True)
            path = source / "images" / channel / f"case{i}.nii.gz"
            _nifti(path, values, sform=np.diag([-1.25, -1.25, 5.0, 1.0]))
    assert _convert(source, "--nan", "zero") == 0
    repairs = _cases(fresh_roots)["case2"]["repairs"]
    assert {name: found["nonfinite_voxels"] for name, found in repairs.items()} == {
        "flair/case2.nii.gz": 1,
        "t1/case2.nii.gz": 2,
    }
    assert "t1/case2.nii.gz: 2 NaN" in capsys.readouterr().out


def test_nan_in_a_label_is_refused_whatever_is_asked_for_images(
    source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.ones(SHAPE, np.float32)
    values[0, 0, 0] = np.nan
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values), str(source / "labels/case1.nii.gz"))
    assert _convert(source, "--nan", "zero") == 2
    assert "labels/case1.nii.gz holds 1 NaN" in capsys.readouterr().err


def test_sheared_axes_become_the_nearest_right_angles_and_the_angle_is_told(
    source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        _nifti(source / f"images/case{i}.nii.gz", random_image(i)[0], sform=_sheared(0.02))
        if i < 2:
            _nifti(source / f"labels/case{i}.nii.gz", (random_image(i)[0] % 3).astype(np.uint8), sform=_sheared(0.02))
    assert _convert(source) == 2
    assert "case0.nii.gz has sheared axes (0.573 degrees" in (told := capsys.readouterr().err)
    assert "--fix-geometry" in told
    assert _convert(source, "--fix-geometry") == 0
    assert "axes were turned by up to 0.573 degrees" in capsys.readouterr().out
    case = _cases(fresh_roots)["case0"]
    assert case["repairs"]["case0.nii.gz"]["angle_degrees"] == pytest.approx(0.573, abs=1e-3)
    assert set(case["repairs"]) == {"case0.nii.gz", "labels/case0.nii.gz"}
    written, geometry = read_stored(fresh_roots / "nnUNet_raw/Dataset007_T" / case["images"][0])
    assert np.array_equal(written, random_image(0))
    direction = np.reshape(geometry.direction, (3, 3))
    assert np.allclose(direction.T @ direction, np.eye(3), atol=1e-6)
    # No rotation is nearer to the sheared axes, and the middle of the volume has not moved.
    wanted = np.diag([-1.0, -1.0, 1.0]) @ _sheared(0.02)[:3, :3] / np.linalg.norm(_sheared(0.02)[:3, :3], axis=0)
    for turn in Rotation.random(50, random_state=0).as_rotvec():
        near = Rotation.from_rotvec(0.01 * turn).as_matrix() @ direction
        assert np.linalg.norm(direction - wanted) <= np.linalg.norm(near - wanted)
    middle = (np.array(SHAPE[::-1]) - 1) / 2
    before = np.diag([-1.0, -1.0, 1.0]) @ _sheared(0.02)[:3, :3] @ middle
    after = direction @ (middle * geometry.spacing_xyz_mm) + geometry.origin_xyz_mm
    assert np.allclose(before, after, atol=1e-3)


def test_a_shear_of_more_than_five_degrees_is_refused_even_so(tmp_path: Path) -> None:
    path = _nifti(tmp_path / "tilted.nii.gz", random_image(0)[0], sform=_sheared(0.3))
    with pytest.raises(InputError, match="more than 5 degrees away: resample it"):
        read_stored_as(path, ReadPolicy(fix_geometry=True))


def test_qform_and_sform_that_contradict_each_other_need_a_word(
    source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sform, qform = np.diag([2.0, 2.0, 5.0, 1.0]), np.diag([1.0, 1.0, 5.0, 1.0])
    _nifti(source / "images/case2.nii.gz", random_image(2)[0], sform=sform, qform=qform)
    assert _convert(source) == 2
    assert "a qform and an sform that lie 14.2 mm apart" in (told := capsys.readouterr().err)
    assert "--form sform or --form qform" in told
    for form, size in (("sform", 2.0), ("qform", 1.0)):
        assert _convert(source, "--form", form, "--overwrite") == 0
        assert f"14.2 mm apart, the {form} was taken" in capsys.readouterr().out
        case = _cases(fresh_roots)["case2"]
        assert case["repairs"] == {"case2.nii.gz": {"form": form, "form_difference_mm": 14.213}}
        # nnU-Net's reader sees what was chosen.
        back = SimpleITK.ReadImage(str(fresh_roots / "nnUNet_raw/Dataset007_T" / case["images"][0]))
        assert back.GetSpacing()[:2] == (size, size)


@pytest.mark.parametrize(
    ("pixdim", "size"), [((1, 0, 1, 1), "voxel size"), ((1, -1, 1, 1), "voxel size"), ((1, np.nan, 1, 1), "voxel size")]
)
def test_a_voxel_size_that_is_none_is_refused(tmp_path: Path, pixdim: tuple[float, ...], size: str) -> None:
    image = nibabel.Nifti1Image(random_image(0)[0].T, np.eye(4))
    raw = bytearray(image.to_bytes())
    header = nibabel.Nifti1Header(bytes(raw[:348]), check=False)
    header["pixdim"][:4] = pixdim
    raw[:348] = header.binaryblock
    (tmp_path / "x.nii").write_bytes(bytes(raw))
    with pytest.raises(InputError, match=size):
        read_stored(tmp_path / "x.nii")


def test_without_qform_and_sform_a_file_is_placed_as_nnunet_places_it(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(random_image(0)[0].T, None)
    image.header.set_zooms((1.5, 2.0, 3.0))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / "x.nii.gz")
    _, geometry = read_stored(tmp_path / "x.nii.gz")
    assert geometry == Geometry(shape_zyx=SHAPE, spacing_xyz_mm=(1.5, 2.0, 3.0))
    back = SimpleITK.ReadImage(str(tmp_path / "x.nii.gz"))
    assert (back.GetDirection(), back.GetOrigin()) == (geometry.direction, geometry.origin_xyz_mm)


@pytest.mark.parametrize(
    ("dtype", "slope", "inter", "value", "expected"),
    [
        (np.int16, 2.0, -1024.0, 30000, 58976.0),
        (np.uint16, 1.0, -1024.0, 65535, 64511.0),
        (np.int16, np.nan, 0.0, -1024, -1024.0),
        (np.uint8, 0.5, 0.0, 255, 127.5),
        (np.float64, 1.0, 0.0, 1e7 + 1, 1e7 + 1),
        (np.uint16, 1.0, 0.0, 40000, 40000.0),
    ],
)
def test_scaled_values_are_read_without_overflow(
    tmp_path: Path, dtype: type, slope: float, inter: float, value: float, expected: float
) -> None:
    raw = bytearray(nibabel.Nifti1Image(np.full((3, 4, 5), value, dtype), np.eye(4)).to_bytes())
    header = nibabel.Nifti1Header(bytes(raw[:348]), check=False)
    header["scl_slope"], header["scl_inter"] = slope, inter
    raw[:348] = header.binaryblock
    (tmp_path / "x.nii").write_bytes(bytes(raw))
    assert read_stored(tmp_path / "x.nii")[0].ravel()[0] == expected


def test_labels_near_a_whole_number_are_rounded_and_counted(
    source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = (random_image(3)[0] % 3).astype(np.float64)
    near = label.copy()
    near[0, 0, :5] += 1e-4
    write_image(source / "labels/case1.nii.gz", near[None], GRID)
    assert _convert(source) == 0
    assert "5 label voxels were rounded" in capsys.readouterr().out
    case = _cases(fresh_roots)["case1"]
    assert case["repairs"] == {"labels/case1.nii.gz": {"rounded_voxels": 5}}
    assert np.array_equal(read_label(fresh_roots / "nnUNet_raw/Dataset007_T" / case["label"])[0], label)


def test_a_class_that_no_labelled_case_holds_is_named(
    source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _convert(source, "--labels", "a=1,b=2,ghost=3") == 0
    assert "class ghost is in no labelled case and cannot be learned" in capsys.readouterr().out
