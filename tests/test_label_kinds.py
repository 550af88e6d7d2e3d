"""Kinds of label that people have: a volume a class, regions with gaps, ignore in the middle, stacks of ImageJ."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from small_source import GRID, SHAPE, random_image

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.cohort.labels import make_label_table
from nnunet_sam2.cohort.layouts.found import image_files, match_labels
from nnunet_sam2.errors import InputError
from nnunet_sam2.volumes import read_label, read_stored, write_label

CONVERT = ["-d", "7", "-n", "T"]


def _one_hot(path: Path, masks_czyx: np.ndarray) -> None:
    plain = path.with_name("plain.nii")
    write_label(plain, np.zeros(SHAPE, np.uint8), GRID)
    affine = nibabel.load(plain).affine
    plain.unlink()
    nibabel.save(nibabel.Nifti1Image(masks_czyx.astype(np.float32).T, affine), path)


def _stored(folder: Path, case: str) -> np.ndarray:
    raw = folder / "nnUNet_raw" / "Dataset007_T"
    return read_label(raw / f"labelsTr/{case}.nii.gz")[0]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("labels", [[], ["--labels", "liver=1,spleen=2"], ["--labels", "liver=3,spleen=7"]])
def test_a_volume_a_class_is_merged_into_one_label_map_when_asked(
    background: bool,
    labels: list[str],
    source: Path,
    fresh_roots: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    truth = [read_label(source / f"labels/case{i}.nii.gz")[0] for i in range(2)]
    for i in range(2):
        _one_hot(
            source / f"labels/case{i}.nii.gz", np.stack([truth[i] == v for v in ([0, 1, 2] if background else [1, 2])])
        )
    assert main(["convert", str(source), *CONVERT, *labels]) == 2
    assert "--one-hot" in capsys.readouterr().err
    assert main(["convert", str(source), *CONVERT, *labels, "--one-hot"]) == 0
    told = capsys.readouterr().out
    assert ("volume 1 is background" in told) == background
    assert "merged into one label map (--one-hot: volume 1 is" in told
    for i in range(2):
        np.testing.assert_array_equal(_stored(fresh_roots, f"case{i}"), truth[i])


@pytest.mark.parametrize(
    ("change", "words"),
    [("overlap", "volumes overlap in 1 voxels"), ("probability", "other values than 0 and 1"), ("many", "3 volumes")],
)
def test_volumes_that_are_no_label_map_are_refused(
    change: str,
    words: str,
    source: Path,
    fresh_roots: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    masks = np.zeros((3 if change == "many" else 2, *SHAPE))
    masks[0, 1, 2, 3], masks[1, 1, 2, 4] = 1, 1
    if change != "many":
        masks[1, 1, 2, 3] = {"overlap": 1, "probability": 0.4}[change]
    _one_hot(source / "labels/case0.nii.gz", masks)
    declared = ["--labels", "a=1" if change == "many" else "a=1,b=2"]
    _one_hot(source / "labels/case1.nii.gz", masks)
    assert main(["convert", str(source), *CONVERT, *declared, "--one-hot"]) == 2
    assert words in "".join(capsys.readouterr())


def test_regions_with_gaps_are_renumbered_as_plain_labels_are(
    source: Path,
    fresh_roots: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored = np.array([0, 1, 2, 4], np.uint8)
    truth = [(random_image(20 + i)[0] % 4).astype(np.uint8) for i in range(2)]
    for i in range(2):
        write_label(source / f"labels/case{i}.nii.gz", stored[truth[i]], GRID)
    regions = ["--labels", "whole=1+2+4,core=1+4,enhancing=4", "--regions-class-order", "2,1,4"]
    assert main(["convert", str(source), *CONVERT, *regions]) == 0
    assert "label values are renumbered for nnU-Net: 4 -> 3" in capsys.readouterr().out
    cohort = Cohort.load(fresh_roots / "nnUNet_raw" / "Dataset007_T")
    assert cohort.labels == {"background": 0, "whole": [1, 2, 3], "core": [1, 3], "enhancing": 3}
    assert cohort.regions_class_order == (2, 1, 3)
    for i in range(2):
        np.testing.assert_array_equal(_stored(fresh_roots, f"case{i}"), truth[i])


def test_an_ignore_label_below_a_class_is_moved_to_the_top(
    source: Path,
    fresh_roots: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    truth = read_label(source / "labels/case0.nii.gz")[0]
    assert main(["convert", str(source), *CONVERT, "--labels", "ignore=1,liver=2"]) == 0
    told = capsys.readouterr().out
    assert "renumbered for nnU-Net: 2 -> 1, 1 -> 2; the ignore label is moved above the classes" in told
    np.testing.assert_array_equal(_stored(fresh_roots, "case0"), np.array([0, 2, 1], np.uint8)[truth])
    table = make_label_table({"a": [2, 9], "b": 9, "ignore": 5}, (2, 9))
    assert table.labels == {"background": 0, "a": [1, 2], "b": 2, "ignore": 3}
    assert table.regions_class_order == (1, 2)


def test_an_accent_that_is_spelled_in_two_ways_is_one_name(tmp_path: Path) -> None:
    for folder, form in (("images", "NFC"), ("labels", "NFD")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / unicodedata.normalize(form, "Jos\u00e9.nii.gz")).write_bytes(b"x")
    images, labels = image_files(tmp_path / "images"), image_files(tmp_path / "labels")
    assert list(match_labels(images, labels, tmp_path)) == ["Jos\u00e9"]


def _imagej(path: Path, array_zyx: np.ndarray, **metadata: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, array_zyx, imagej=True, resolution=(0.8, 0.8), metadata={"axes": "ZYX", **metadata})


def test_an_imagej_stack_is_read_with_the_voxel_size_that_it_carries(
    tmp_path: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "stacks"
    images = [random_image(i)[0].astype(np.uint16) for i in range(3)]
    label = (random_image(9)[0] % 3).astype(np.uint8)
    for i in range(3):
        _imagej(folder / f"images/case{i}.tif", images[i], unit="mm", spacing=5.0)
    for i in range(2):
        _imagej(folder / f"labels/case{i}.tif", label, unit="mm", spacing=5.0)
    assert main(["convert", str(folder), *CONVERT]) == 0
    told = capsys.readouterr().out
    assert told.count("ImageJ's voxel size") == 1
    assert "3 TIFF stacks are read with ImageJ's voxel size (case0: 1.25 x 1.25 x 5 mm)" in told
    raw = fresh_roots / "nnUNet_raw" / "Dataset007_T"
    np.testing.assert_array_equal(read_stored(raw / "imagesTr/case0_0000.nii.gz")[0][0], images[0])
    np.testing.assert_array_equal(_stored(fresh_roots, "case0"), label)
    assert Cohort.load(raw).cases[0].geometry.spacing_xyz_mm == (1.25, 1.25, 5.0)


@pytest.mark.parametrize("unit", ["micron", "um", "\\u00B5m"])
def test_the_unit_of_a_stack_is_read(unit: str, tmp_path: Path) -> None:
    _imagej(tmp_path / "x.tif", random_image(0)[0].astype(np.uint16), unit=unit, spacing=5.0)
    array, geometry = read_stored(tmp_path / "x.tif")
    assert array.shape == (1, *SHAPE)
    assert geometry.spacing_xyz_mm == pytest.approx((1.25e-3, 1.25e-3, 5e-3))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "no voxel size; set it in ImageJ"),
        ({"unit": "pixel", "spacing": 2.0}, "no voxel size"),
        ({"unit": "mm", "spacing": 0.0}, "no voxel size"),
        ({"unit": "um", "spacing": 1e-4}, "too small for a NIfTI header"),
        ({"unit": "mm", "spacing": 2.0, "axes": "TYX"}, "several channels, times or colours"),
    ],
)
def test_a_stack_that_does_not_tell_its_voxels_is_refused(
    metadata: dict[str, object], words: str, tmp_path: Path
) -> None:
    _imagej(tmp_path / "x.tif", random_image(0)[0].astype(np.uint16), **metadata)
    with pytest.raises(InputError, match=words):
        read_stored(tmp_path / "x.tif")
