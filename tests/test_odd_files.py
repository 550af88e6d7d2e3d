"""Files that are not what they are called, or cannot be had: refused in one line, or read the same by every reader."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from small_source import GRID, SHAPE, random_image

from nnunet_sam2.cli.main import main
from nnunet_sam2.cli.predict import find_cases
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.checks import VOLUME_ENDINGS
from nnunet_sam2.folders import VARIABLES
from nnunet_sam2.volumes import read_stored, read_volume, write_image


def test_a_gzip_file_of_several_members_is_read_whole(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz", random_image(0), GRID)
    raw = gzip.decompress((tmp_path / "a.nii.gz").read_bytes())
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(raw[:700]) + gzip.compress(raw[700:]))
    assert np.array_equal(read_stored(tmp_path / "b.nii.gz")[0], random_image(0))
    whole = (tmp_path / "b.nii.gz").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(whole[: len(gzip.compress(raw[:700]))])
    with pytest.raises(InputError, match=r"b\.nii\.gz is cut off"):
        read_stored(tmp_path / "b.nii.gz")


def test_a_compressed_file_without_the_ending_is_told_its_name(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz", random_image(0), GRID)
    (tmp_path / "a.nii.gz").rename(tmp_path / "b.nii")
    with pytest.raises(InputError, match=r"compressed but not named so; call it b\.nii\.gz"):
        read_stored(tmp_path / "b.nii")


def test_a_header_that_promises_terabytes_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    raw = bytearray(nibabel.Nifti1Image(np.zeros((3, 4, 5), np.float64), np.eye(4)).to_bytes())
    header = nibabel.Nifti1Header(bytes(raw[:348]), check=False)
    header["dim"] = [3, 30000, 30000, 30000, 1, 1, 1, 1]
    raw[:348] = header.binaryblock
    (tmp_path / "x.nii").write_bytes(bytes(raw))
    (tmp_path / "y.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    head = "NDims = 3\nDimSize = 30000 30000 30000\nElementType = MET_DOUBLE\nElementDataFile = LOCAL\n"
    (tmp_path / "z.mha").write_bytes(head.encode() + b"\0" * 99)
    for name in ("x.nii", "y.nii.gz", "z.mha"):
        with pytest.raises(InputError, match=r"header promises 216\d{12} bytes"):
            read_stored(tmp_path / name)


def test_more_than_the_header_promises_is_refused_without_being_held(tmp_path: Path) -> None:
    raw = nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4)).to_bytes()
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(raw + bytes(64 << 20), 1))
    with pytest.raises(InputError, match="holds more than the 472 bytes"):
        read_stored(tmp_path / "x.nii.gz")


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("x.mha", "NDims = 3\nDimSize = 1 1 1\nElementType = MET_UCHAR\nElementDataFile = {}\n"),
        (
            "x.mha",
            "NDims = 3\nDimSize = 1 1 1\nElementType = MET_UCHAR\nElementDataFile: {} =\nElementDataFile = LOCAL\n",
        ),
        ("x.nrrd", "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 1 1 1\nencoding: raw\ndata file: {}\n\n"),
    ],
)
def test_a_header_cannot_have_another_file_read(name: str, head: str, tmp_path: Path) -> None:
    (tmp_path / "secret.raw").write_bytes(b"\7")
    for target in ("secret.raw", "../secret.raw", str(tmp_path / "secret.raw")):
        (tmp_path / name).write_text(head.format(target))
        with pytest.raises(InputError, match="voxels in another file"):
            read_stored(tmp_path / name)


def test_a_long_header_does_not_hide_the_name_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "secret.raw").write_bytes(b"\7")
    head = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 1 1 1\nencoding: raw\n" + "# x\n" * (1 << 20)
    (tmp_path / "x.nrrd").write_text(head + "data file: secret.raw\n\n")
    with pytest.raises(InputError, match="header has no end"):
        read_stored(tmp_path / "x.nrrd")


def test_colour_vectors_and_segments_are_refused_with_advice(tmp_path: Path) -> None:
    vectors = SimpleITK.GetImageFromArray(np.zeros((*SHAPE, 3), np.uint8), isVector=True)
    for name, said in (
        ("x.nii.gz", "one real-valued file a channel|one three-dimensional file a channel"),
        ("x.mha", "export one file a channel"),
        ("x.seg.nrrd", "the segmentation as one label map"),
    ):
        SimpleITK.WriteImage(vectors, str(tmp_path / name))
        with pytest.raises(InputError, match=said):
            read_stored(tmp_path / name)
    nibabel.save(nibabel.Nifti2Image(np.zeros((3, 4, 5), np.int16), np.eye(4)), tmp_path / "two.nii.gz")
    with pytest.raises(InputError, match="save it as NIfTI-1"):
        read_stored(tmp_path / "two.nii.gz")
    complex_image = nibabel.Nifti1Image(np.zeros((3, 4, 5), np.complex64), np.eye(4))
    nibabel.save(complex_image, tmp_path / "c.nii.gz")
    with pytest.raises(InputError, match="complex"):
        read_stored(tmp_path / "c.nii.gz")


def test_one_volume_in_four_axes_and_a_two_dimensional_file_are_read(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(random_image(0)[0].T[..., None], np.diag([1, 2, 3, 1])), tmp_path / "one.nii.gz")
    assert np.array_equal(read_volume([tmp_path / "one.nii.gz"]).array_czyx, random_image(0))
    nibabel.save(nibabel.Nifti1Image(random_image(0)[0, 0].T, np.diag([1, 2, 3, 1])), tmp_path / "flat.nii.gz")
    flat = read_volume([tmp_path / "flat.nii.gz"])
    assert np.array_equal(flat.array_czyx, random_image(0)[:, :1])
    assert flat.geometry.spacing_xyz_mm[:2] == (1.0, 2.0)


def test_a_linked_image_is_read_and_what_cannot_be_read_is_named(
    source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = source / "images/case2.nii.gz"
    elsewhere = source / "elsewhere.nii.gz"
    image.rename(elsewhere)
    faults = {
        "which does not exist": lambda: image.symlink_to(source / "nowhere.nii.gz"),
        "not a regular file": image.mkdir,
        "not a regular file; name the image file itself": lambda: os.mkfifo(image),
    }
    for said, make in faults.items():
        make()
        assert main(["convert", str(source), "-d", "7", "-n", "T"]) == 2
        assert said in (told := capsys.readouterr().err)
        assert "images/case2.nii.gz" in told
        image.rmdir() if image.is_dir() else image.unlink()
    image.symlink_to(elsewhere)
    assert main(["convert", str(source), "-d", "7", "-n", "T"]) == 0
    written = next((fresh_roots / "nnUNet_raw").rglob("case2_0000.nii.gz"))
    assert not written.is_symlink()
    assert written.read_bytes() == elsewhere.read_bytes()


def test_no_permission_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "x.nii.gz", random_image(0), GRID)
    open_path = Path.open

    def refuse(self: Path, *args: object, **options: object) -> object:
        if self.name == "x.nii.gz":
            raise PermissionError(13, "Permission denied")
        return open_path(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"x\.nii\.gz may not be read; .*chmod u\+r"):
        read_stored(tmp_path / "x.nii.gz")


def test_a_constant_image_is_pointed_out_and_divides_nothing_by_zero(
    source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(source / "images/case2.nii.gz", np.full((1, *SHAPE), 7, np.int16), GRID)
    assert main(["convert", str(source), "-d", "7", "-n", "T"]) == 0
    assert "images/case2.nii.gz is constant: every voxel is 7" in capsys.readouterr().out


def test_a_folder_whose_name_is_not_utf8_is_refused_before_simpleitk_ends_the_process(
    source: Path, tmp_path: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latin = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        source.rename(latin)
    except OSError:
        pytest.skip("this file system holds only names that are UTF-8")
    assert main(["convert", str(latin), "-d", "7", "-n", "T"]) == 2
    assert "holds letters that are not UTF-8; rename" in capsys.readouterr().err
    with pytest.raises(InputError, match="not UTF-8"):
        write_image(latin / "new.nii.gz", random_image(5), GRID)


NAMES = ["a b", "-rf", "über", "x" * 121, "CON", "nul.x", "a.", "a+b", "case(1)"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_whose_name_cannot_be_a_case_is_refused_by_convert_and_predict(
    name: str, source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(source / "images" / "new.nii.gz", random_image(5), GRID)
    (source / "images" / "new.nii.gz").rename(source / "images" / f"{name}.nii.gz")
    assert main(["convert", str(source), "-d", "7", "-n", "T"]) == 2
    assert "cannot be a case id" in capsys.readouterr().err
    with pytest.raises(InputError, match="cannot be a case id"):
        find_cases(source / "images", VOLUME_ENDINGS, files_a_case=1)


def test_folders_of_nnunet_may_hold_spaces_but_not_be_relative(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, str(tmp_path / "my data" / name))
    assert main(["convert", str(source), "-d", "7", "-n", "T"]) == 0
    assert (tmp_path / "my data" / "nnUNet_raw" / "Dataset007_T" / "cohort.json").is_file()
    monkeypatch.setenv("nnUNet_raw", "my data")
    assert main(["convert", str(source), "-d", "8", "-n", "T"]) == 2
    assert "nnUNet_raw=my data is a relative path; set it to an absolute one" in capsys.readouterr().err
