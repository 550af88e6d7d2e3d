from __future__ import annotations

import gzip
import hashlib
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import tifffile
from PIL import Image

from nnunet_sam2 import volumes
from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.volumes import (
    read_label,
    read_map,
    read_volume,
    write_image,
    write_label,
    write_map,
)
from nnunet_sam2.voxel_hashes import voxel_hash

SHAPE = (4, 10, 12)
GEOMETRY = Geometry(
    shape_zyx=SHAPE,
    spacing_xyz_mm=(1.25, 0.5, 7.7),
    origin_xyz_mm=(-10.123, 3.0, 4.5),
    direction=(0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0),
)
PICTURE = Geometry(shape_zyx=(1, 10, 12))


def _values(dtype: type = np.int16, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, shape).astype(dtype)


def _write_float(path: Path, *, bad: float | None = None) -> Path:
    array = _values(np.float32)
    if bad is not None:
        array[1, 2, 3] = bad
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path))
    return path


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_a_label_map_comes_back_with_values_and_geometry(tmp_path: Path, ending: str) -> None:
    label = _values(np.uint8) % 5
    write_label(tmp_path / f"a{ending}", label, GEOMETRY)
    back, geometry = read_label(tmp_path / f"a{ending}")
    assert back.dtype == np.uint8
    assert np.array_equal(back, label)
    assert GEOMETRY.mismatch(geometry) is None


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_a_picture_label_keeps_values_above_255(tmp_path: Path, ending: str) -> None:
    label = (_values(np.uint16) * 200)[:1]
    write_label(tmp_path / f"a{ending}", label, PICTURE)
    back, _ = read_label(tmp_path / f"a{ending}")
    assert back.dtype == np.uint16
    assert np.array_equal(back, label)


@pytest.mark.parametrize(("ending", "geometry"), [(".nii.gz", GEOMETRY), (".png", PICTURE), (".tif", PICTURE)])
def test_a_map_comes_back_in_steps_of_one_255th(tmp_path: Path, ending: str, geometry: Geometry) -> None:
    values = np.random.default_rng(1).random(geometry.shape_zyx, dtype=np.float32)
    write_map(tmp_path / f"m{ending}", values, geometry)
    back, _ = read_map(tmp_path / f"m{ending}")
    assert back.dtype == np.float32
    assert np.array_equal(back, np.rint(values * 255).astype(np.float32) / np.float32(255))
    write_map(tmp_path / f"n{ending}", back, geometry)
    assert (tmp_path / f"n{ending}").read_bytes() == (tmp_path / f"m{ending}").read_bytes()


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for name in ("a.nii.gz", "b.nii.gz"):
        write_label(tmp_path / name, _values(np.uint8), GEOMETRY)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("bits", [8, 16])
def test_a_16_bit_rgb_picture_is_read_without_loss(tmp_path: Path, bits: int) -> None:
    colours = np.random.default_rng(2).integers(0, 2**bits, (10, 12, 3)).astype(f"uint{bits}")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(colours, isVector=True), str(tmp_path / "c.png"))
    tifffile.imwrite(tmp_path / "c.tif", colours, photometric="rgb")
    for name in ("c.png", "c.tif"):
        volume = read_volume([tmp_path / name])
        assert volume.array_czyx.shape == (3, 1, 10, 12)
        assert np.array_equal(volume.array_czyx[:, 0], np.moveaxis(colours, -1, 0))


def test_pgm_of_8_and_16_bit_and_palette_png_are_read_by_value(tmp_path: Path) -> None:
    deep = np.arange(0, 12000, 100, dtype=np.uint16).reshape(10, 12)
    (tmp_path / "d.pgm").write_bytes(b"P5\n12 10\n65535\n" + deep.astype(">u2").tobytes())
    assert np.array_equal(read_volume([tmp_path / "d.pgm"]).array_czyx[0, 0], deep)
    (tmp_path / "e.pgm").write_bytes(b"P5\n12 10\n255\n" + (deep // 100).astype(np.uint8).tobytes())
    assert np.array_equal(read_volume([tmp_path / "e.pgm"]).array_czyx[0, 0], deep // 100)
    palette = Image.fromarray((deep // 3000).astype(np.uint8), mode="P")
    palette.putpalette([200, 3, 9, 0, 255, 0, 7, 7, 7, 255, 0, 0])
    palette.save(tmp_path / "p.png")
    assert np.array_equal(read_label(tmp_path / "p.png")[0][0], deep // 3000)


def test_a_palette_gives_its_colours_to_an_image_and_its_indices_to_a_label_map(tmp_path: Path) -> None:
    indices = (_values(np.uint8) % 3)[0]
    for name, colours in (("grey", [9, 9, 9, 80, 80, 80, 40, 40, 40]), ("colour", [9, 9, 9, 80, 0, 0, 0, 0, 7])):
        picture = Image.fromarray(indices, mode="P")
        picture.putpalette(colours)
        picture.save(tmp_path / f"{name}.png")
        shown = np.moveaxis(np.reshape(colours, (3, 3))[indices], -1, 0)
        values = read_volume([tmp_path / f"{name}.png"]).array_czyx[:, 0]
        assert np.array_equal(values, shown[:1] if name == "grey" else shown)
        assert np.array_equal(read_label(tmp_path / f"{name}.png")[0][0], indices)
    colormap = np.zeros((3, 256), np.uint16)
    tifffile.imwrite(tmp_path / "p.tif", indices, photometric="palette", colormap=colormap)
    assert np.array_equal(read_label(tmp_path / "p.tif")[0][0], indices)
    with pytest.raises(InputError, match="numbers of a palette"):
        read_volume([tmp_path / "p.tif"])


def test_nnunets_own_readers_read_what_is_written(tmp_path: Path) -> None:
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    write_image(tmp_path / "v_0000.nii.gz", _values()[None], GEOMETRY)
    array, properties = SimpleITKIO().read_images([str(tmp_path / "v_0000.nii.gz")])
    assert np.array_equal(array[0], _values())
    assert np.allclose(properties["spacing"], GEOMETRY.spacing_zyx_mm)
    for ending, dtype, channels in ((".png", np.uint8, 3), (".png", np.uint16, 1), (".tif", np.uint16, 3)):
        picture = _values(dtype, (channels, 1, 10, 12))
        write_image(tmp_path / f"p_0000{ending}", picture, PICTURE)
        assert np.array_equal(NaturalImage2DIO().read_images([str(tmp_path / f"p_0000{ending}")])[0], picture)


def test_the_voxel_hash_ignores_format_type_and_name_and_sees_one_voxel(tmp_path: Path) -> None:
    array = _values()
    for name in ("a.nii.gz", "b.mha", "c.nrrd"):
        write_image(tmp_path / name, array[None], GEOMETRY)
    write_image(tmp_path / "d.nii.gz", array[None].astype(np.float64), GEOMETRY)
    hashes = {voxel_hash(read_volume([path]).array_czyx) for path in sorted(tmp_path.iterdir())}
    assert len(hashes) == 1
    other = array.copy()
    other[0, 0, 0] += 1
    assert voxel_hash(other[None]) not in hashes
    assert voxel_hash(array.reshape(1, 4, 12, 10)) not in hashes
    assert voxel_hash(np.zeros((1, 1, 1, 1))) == voxel_hash(np.full((1, 1, 1, 1), -0.0))


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_a_truncated_volume_is_refused_by_name(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"cut{ending}"
    write_image(path, _values()[None], GEOMETRY)
    raw = path.read_bytes()
    for share in (0.6, 0.97):
        path.write_bytes(raw[: int(share * len(raw))])
        with pytest.raises(InputError, match="cut"):
            read_volume([path])


def test_a_truncated_label_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "cut_label.nii.gz"
    write_label(path, _values(np.uint8), GEOMETRY)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"cut_label\.nii\.gz is damaged or cut off"):
        read_label(path)


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_one_flipped_byte_is_found_by_the_checksum(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"flip{ending}"
    write_image(path, _values()[None], GEOMETRY)
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(InputError, match="damaged"):
        read_volume([path])


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_are_refused_in_every_format(tmp_path: Path, ending: str, bad: float) -> None:
    path = _write_float(tmp_path / f"x{ending}", bad=bad)
    with pytest.raises(InputError, match="1 NaN and 0 infinite" if np.isnan(bad) else "0 NaN and 1 infinite"):
        read_volume([path])


def test_nan_in_a_tiff_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "x.tif", np.array([[1.0, np.nan]], np.float32))
    with pytest.raises(InputError, match="1 NaN"):
        read_volume([tmp_path / "x.tif"])


def test_nii_beside_nii_gz_is_refused_because_simpleitk_takes_the_wrong_voxels(tmp_path: Path) -> None:
    one, two = tmp_path / "x.nii.gz", tmp_path / "x.nii"
    write_image(one, np.full((1, *SHAPE), 1, np.int16), GEOMETRY)
    write_image(two, np.full((1, *SHAPE), 7, np.int16), GEOMETRY)
    assert SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(one))).max() == 7, "SimpleITK has mended this"
    with pytest.raises(InputError, match="beside"):
        read_volume([one])
    assert read_volume([two]).array_czyx.max() == 7


def test_a_nii_named_nii_gz_and_upper_case_endings_are_read(tmp_path: Path) -> None:
    write_image(tmp_path / "x.nii", _values()[None], GEOMETRY)
    shutil.move(tmp_path / "x.nii", tmp_path / "y.nii.gz")
    write_image(tmp_path / "z.nii.gz", _values()[None], GEOMETRY)
    shutil.move(tmp_path / "z.nii.gz", tmp_path / "z.NII.GZ")
    for name in ("y.nii.gz", "z.NII.GZ"):
        assert np.array_equal(read_volume([tmp_path / name]).array_czyx[0], _values())


def test_what_is_no_image_is_named_for_what_it_is(tmp_path: Path) -> None:
    faults = {
        "empty.nii.gz": (b"", "is empty"),
        "pointer.nii.gz": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        "page.nii.gz": (b"<!DOCTYPE html><html></html>", "web page"),
        "text.nii.gz": (b"hello" * 200, "no NIfTI header"),
        "zipped_text.nii.gz": (gzip.compress(b"hello" * 200), "no NIfTI header"),
        "text.mha": (b"hello" * 200, "no such header"),
        "text.nrrd": (b"hello" * 200, "cannot be read"),
        "text.png": (b"hello" * 200, "cannot be read as a picture"),
        "text.tif": (b"hello" * 200, "cannot be read as a picture"),
        "x.dcm": (b"hello", "known endings"),
    }
    for name, (content, said) in faults.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=said) as caught:
            read_volume([path])
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    os.mkfifo(tmp_path / "pipe.nii.gz")
    for name, said in {
        "folder.nii.gz": "not a regular file",
        "link.nii.gz": "link to",
        "pipe.nii.gz": "not a regular file",
        "absent.nii.gz": "does not exist",
    }.items():
        with pytest.raises(InputError, match=said):
            read_volume([tmp_path / name])


def test_a_header_that_cannot_be_true_is_refused(tmp_path: Path) -> None:
    def stored(name: str, **fields: object) -> Path:
        path = tmp_path / name
        image = nibabel.Nifti1Image(_values().T, np.diag([1, 1, 3, 1]))
        nibabel.save(image, path)
        raw = bytearray(gzip.decompress(path.read_bytes()))
        header = nibabel.Nifti1Header(bytes(raw[:348]), check=False)
        for key, value in fields.items():
            header[key] = value
        raw[:348] = header.binaryblock
        path.write_bytes(gzip.compress(bytes(raw)))
        return path

    huge = stored("huge.nii.gz", dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])
    flat = stored("flat.nii.gz", dim=[3, 12, 0, 4, 1, 1, 1, 1])
    no_size = stored("size.nii.gz", pixdim=[1, 1, 0, 3, 1, 1, 1, 1])
    nan_size = stored("nan.nii.gz", pixdim=[1, 1, np.nan, 3, 1, 1, 1, 1])
    colour = stored("rgb.nii.gz", datatype=128, bitpix=24, dim=[3, 12, 10, 1, 1, 1, 1, 1])
    for path, said in (
        (huge, "is cut off"),
        (flat, "axis without voxels"),
        (no_size, "voxel size"),
        (nan_size, "voxel size"),
        (colour, "one real-valued file"),
    ):
        with pytest.raises(InputError, match=said):
            read_volume([path])


def test_sheared_axes_are_refused_with_the_reason(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    affine[0, 1] = 0.1
    image = nibabel.Nifti1Image(_values().T, affine)
    image.header["qform_code"] = 0
    nibabel.save(image, tmp_path / "shear.nii.gz")
    with pytest.raises(InputError, match="sheared axes"):
        read_volume([tmp_path / "shear.nii.gz"])


def test_a_4d_file_is_refused_unless_its_volumes_are_channels(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(_values(shape=(12, 10, 4, 2)), np.eye(4)), tmp_path / "f.nii.gz")
    with pytest.raises(InputError, match="4D with 2 volumes"):
        read_volume([tmp_path / "f.nii.gz"])
    assert read_volume([tmp_path / "f.nii.gz"], split_fourth_axis=True).array_czyx.shape == (2, 4, 10, 12)


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz", _values()[None], GEOMETRY)
    other = Geometry(shape_zyx=SHAPE, spacing_xyz_mm=(1.25, 0.5, 7.8))
    write_image(tmp_path / "b.nii.gz", _values()[None], other)
    with pytest.raises(InputError, match=r"spacing \(x, y, z\) in mm"):
        read_volume([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"])


def test_label_values_are_whole_numbers_within_a_named_tolerance(tmp_path: Path) -> None:
    label = (_values(np.float64) % 3).astype(np.float64)
    write_image(tmp_path / "near.nii.gz", (label + 1e-7)[None], GEOMETRY)
    assert np.array_equal(read_label(tmp_path / "near.nii.gz")[0], label)
    for name, value, said in (
        ("half.nii.gz", 1.5, "1.5, which is not a whole number .tolerance 0.001."),
        ("minus.nii.gz", -1.0, "label -1"),
        ("large.nii.gz", 70000.0, "label 70000"),
        ("stray.nii.gz", 9.0, "holds label 9, declared are 0, 1, 2"),
    ):
        wrong = label.copy()
        wrong[0, 0, 0] = value
        write_image(tmp_path / name, wrong[None], GEOMETRY)
        with pytest.raises(InputError, match=said):
            read_label(tmp_path / name, allowed=(1, 2))


def test_a_jpeg_or_rgb_label_is_refused(tmp_path: Path) -> None:
    Image.fromarray(_values(np.uint8, (10, 12))).save(tmp_path / "a.jpg")
    Image.fromarray(_values(np.uint8, (10, 12, 3))).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="JPEG"):
        read_label(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="3 values a voxel"):
        read_label(tmp_path / "b.png")


def test_transparency_and_several_pages_are_refused_and_an_opaque_alpha_is_dropped(tmp_path: Path) -> None:
    colours = _values(np.uint8, (10, 12, 4))
    Image.fromarray(colours, mode="RGBA").save(tmp_path / "t.png")
    with pytest.raises(InputError, match="transparent"):
        read_volume([tmp_path / "t.png"])
    colours[..., 3] = 255
    Image.fromarray(colours, mode="RGBA").save(tmp_path / "o.png")
    assert np.array_equal(read_volume([tmp_path / "o.png"]).array_czyx[:, 0], np.moveaxis(colours[..., :3], -1, 0))
    tifffile.imwrite(tmp_path / "s.tif", _values(np.uint8, (5, 10, 12)), photometric="minisblack")
    with pytest.raises(InputError, match="5 pages"):
        read_volume([tmp_path / "s.tif"])


def test_a_picture_that_is_to_be_turned_when_shown_is_refused(tmp_path: Path) -> None:
    for turn in (1, 3):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(_values(np.uint8, (10, 12))).save(tmp_path / f"{turn}.jpg", exif=exif)
    assert read_volume([tmp_path / "1.jpg"]).array_czyx.shape == (1, 1, 10, 12)
    with pytest.raises(InputError, match="save it upright"):
        read_volume([tmp_path / "3.jpg"])


def test_a_write_that_does_not_arrive_is_an_error_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.nii.gz"
    write_label(path, np.ones(SHAPE, np.uint8), GEOMETRY)
    before = path.read_bytes()
    write = volumes._write_volume

    def short_write(target: Path, array_zyx: np.ndarray, geometry: Geometry) -> None:
        # What a full disk leaves behind: SimpleITK raises nothing.
        write(target, array_zyx, geometry)
        target.write_bytes(target.read_bytes()[:60])

    monkeypatch.setattr(volumes, "_write_volume", short_write)
    with pytest.raises(StageError, match="is the disk full"):
        write_label(path, np.zeros(SHAPE, np.uint8), GEOMETRY)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]
