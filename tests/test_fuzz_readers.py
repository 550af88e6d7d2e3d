"""Whatever bytes an image file holds, reading it ends in one of our own errors or in the right voxels and place."""

from __future__ import annotations

import gzip
import tempfile
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
from fuzz_data import mendable_files, meta_files, nifti_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_sam2.errors import InputError
from nnunet_sam2.files.nifti_placement import FORM_TOLERANCE_MM
from nnunet_sam2.files.repairs import ReadPolicy
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.volumes import read_label, read_label_as, read_stored, read_stored_as, write_label

# The same examples each time: a failure in CI is one that can be repeated.
QUICK = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
UNIT_MM = {0: 1, 1: 1000, 2: 1, 3: 0.001}
MEND = ReadPolicy(nonfinite="zero", fix_geometry=True, form="sform")


@pytest.fixture(scope="module")
def folder():
    """A folder in memory where there is one: thousands of files come and go."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as name:
        yield Path(name)


def _affine_of(geometry: Geometry) -> np.ndarray:
    """The affine in NIfTI's patient axes."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(geometry.direction, (3, 3)) * geometry.spacing_xyz_mm
    affine[:3, 3] = geometry.origin_xyz_mm
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _expected(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """What nibabel reads, in the unit that the header names; without a placement, SimpleITK's axes."""
    raw = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    image = nibabel.Nifti1Image.from_bytes(raw)
    header = image.header
    unit = UNIT_MM[int(header["xyzt_units"]) & 7]
    affine = image.affine.copy()
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.diag([*header["pixdim"][1:4], 1.0])
        affine[2, 2] = affine[2, 2] if affine[2, 2] > 0 else 1.0
    affine[:3] *= unit
    return np.asarray(image.dataobj), affine


def test_any_nifti_file_is_refused_or_read_as_nibabel_reads_it(folder: Path) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=1000, **QUICK)
    @given(file=nifti_files(), ending=st.sampled_from([".nii.gz", ".nii.gz", ".NII.GZ", ".nii"]))
    def check(file: tuple[bytes, bool], ending: str) -> None:
        data, damaged = file
        path = folder / f"x{ending}"
        path.write_bytes(data)
        try:
            array, geometry = read_stored(path, split_fourth_axis=True)
        except InputError as error:
            told = str(error)
            array = None
        finally:
            path.unlink()
        if array is None:
            assert str(path) in told
            assert "\n" not in told
            seen["refused"] += 1
            return
        seen["read, damaged" if damaged else "read"] += 1
        values, affine = _expected(data)
        values = values.reshape(values.shape[:4]).T
        assert array.size == values.size
        assert np.isfinite(array).all()
        assert np.allclose(array.reshape(values.shape), values, rtol=1e-6, atol=1e-4), (array.dtype, values.dtype)
        corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)
        corners[:, :3] *= np.array(geometry.shape_zyx[::-1]) - 1
        apart = np.linalg.norm(corners @ (_affine_of(geometry) - affine).T, axis=1).max()
        assert apart <= FORM_TOLERANCE_MM + 1e-4 * np.abs(corners @ affine.T).max(), (apart, affine)

    check()
    assert seen["read"] > 250, seen
    assert seen["refused"] > 250, seen


def test_what_may_be_mended_is_mended_or_refused(folder: Path) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=300, **QUICK)
    @given(data=mendable_files())
    def check(data: bytes) -> None:
        path = folder / "m.nii.gz"
        path.write_bytes(data)
        try:
            array, geometry, repairs = read_stored_as(path, MEND, split_fourth_axis=True)
        except InputError:
            seen["refused"] += 1
            return
        finally:
            path.unlink()
        seen["mended" if repairs else "read"] += 1
        assert np.isfinite(array).all()
        cosines = np.reshape(geometry.direction, (3, 3))
        assert np.abs(cosines.T @ cosines - np.eye(3)).max() < 3e-4
        assert bool(repairs.notes("x")) == bool(repairs)
        if repairs:
            write_label(folder / "back.nii.gz", np.zeros(geometry.shape_zyx, np.uint8), geometry)
            assert geometry.mismatch(read_label(folder / "back.nii.gz")[1]) is None

    check()
    assert seen["mended"] > 100, seen


def test_any_metaimage_file_is_refused_or_read_whole(folder: Path) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=400, **QUICK)
    @given(file=meta_files())
    def check(file: tuple[bytes, bool]) -> None:
        data, damaged = file
        path = folder / "x.mha"
        path.write_bytes(data)
        try:
            array, geometry = read_stored(path)
        except InputError as error:
            told = str(error)
            array = None
        if array is None:
            assert str(path) in told
            seen["refused"] += 1
            return
        seen["read"] += 1
        assert array.shape[1:] == geometry.shape_zyx
        assert np.isfinite(array).all()
        if not damaged and b"CompressedData = False" in data and b"ElementNumberOfChannels" not in data:
            assert data.endswith(array.tobytes())

    check()
    assert seen["read"] > 100, seen


@settings(max_examples=300, **QUICK)
@given(
    values=st.lists(
        st.sampled_from([0, 1, 2, 5, 255, 256, 65535, 65536, -1, 1.0000001, 1.0005, 1.5, 2**31, float("nan")]),
        min_size=1,
        max_size=6,
    ),
    dtype=st.sampled_from(["f4", "f8", "i2", "u1", "i4"]),
    allowed=st.sampled_from([None, (1, 2), (1, 2, 5, 255, 256, 65535)]),
)
def test_any_label_values_are_refused_or_come_back_as_whole_numbers(
    folder: Path, values: list[float], dtype: str, allowed: tuple[int, ...] | None
) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        stored = np.array(values).astype(dtype)
    image = nibabel.Nifti1Image(stored.reshape(-1, 1, 1), np.eye(4))
    (folder / "label.nii").write_bytes(image.to_bytes())
    try:
        label, _, repairs = read_label_as(folder / "label.nii", ReadPolicy(), allowed=allowed)
    except InputError:
        sound = np.isfinite(stored.astype(float)).all() and (np.abs(stored - np.rint(stored)) <= 1e-3).all()
        whole = {int(v) for v in np.rint(stored)} if sound else set()
        in_range = sound and min(whole) >= 0 and max(whole) <= 65535
        assert not (in_range and (allowed is None or whole <= {0, *allowed}))
        return
    assert label.dtype in (np.uint8, np.uint16)
    assert np.array_equal(label.ravel(), np.rint(stored))
    assert repairs.rounded_voxels == np.count_nonzero(stored != np.rint(stored))
