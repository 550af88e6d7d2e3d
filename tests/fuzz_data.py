"""Image files as an adversary or a careless program would write them, for the fuzz tests."""

from __future__ import annotations

import gzip
import zlib
from typing import Any

import nibabel
import numpy as np
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

LENGTHS = st.integers(1, 5)
ODD_FLOATS = st.sampled_from([0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf"), 0.3, 2.0])
DTYPES = st.sampled_from(
    ["u1", "i1", "<i2", ">i2", "<u2", "<i4", "<u4", "<f4", ">f4", "<f8", "<i8", "<u8", "<f4", "<f4", "<c8"]
)


@st.composite
def mendable_files(draw: st.DrawFn) -> bytes:
    """Draw a NIfTI file that holds what it says, with voxels or a placement that a `ReadPolicy` may mend."""
    values = np.random.default_rng(draw(st.integers(0, 9))).normal(0, 300, [draw(LENGTHS) for _ in range(3)])
    values.flat[0] = draw(ODD_FLOATS)
    image = nibabel.Nifti1Image(values.astype(np.float32), np.eye(4))
    image.set_sform(draw(affines()), draw(st.integers(0, 2)))
    image.set_qform(draw(affines()), draw(st.integers(0, 2)), strip_shears=True)
    return image.to_bytes()


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Draw a placement: turned, mirrored, seldom sheared."""
    turn = Rotation.from_euler("xyz", [draw(st.sampled_from([0, 90, 180, 7.5, -33])) for _ in range(3)], degrees=True)
    spacing = [draw(st.sampled_from([0.3, 1.0, 2.5, 6.0])) for _ in range(3)]
    matrix = turn.as_matrix() @ np.diag(np.array(spacing) * [draw(st.sampled_from([1, 1, -1])), 1, 1])
    shear = draw(st.sampled_from([0.0] * 8 + [1e-6, 5e-5, 1e-3, 0.05, 0.5]))
    matrix[:, 1] += shear * matrix[:, 0]
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = [draw(st.sampled_from([0.0, -90.5, 126.25])) for _ in range(3)]
    return affine


@st.composite
def nifti_files(draw: st.DrawFn) -> tuple[bytes, bool]:
    """Draw the bytes of a NIfTI file, mostly sound, and whether they were cut or changed after they were made."""
    dtype = np.dtype(draw(DTYPES))
    shape = [draw(LENGTHS) for _ in range(draw(st.sampled_from([2, 3, 3, 3, 3, 3, 3, 4, 5])))]
    seed = draw(st.integers(0, 50))
    values = np.random.default_rng(seed).normal(0, 300, shape)
    with np.errstate(invalid="ignore"):
        values = values.astype(dtype) if dtype.kind != "u" else np.abs(values).astype(dtype)
    if dtype.kind == "f" and draw(st.integers(0, 5)) == 0:
        values.flat[0] = draw(ODD_FLOATS)
    stored = values.dtype.newbyteorder(">" if values.dtype.byteorder == ">" else "<")
    header = _header(draw, values)
    raw = bytearray(header.binaryblock + b"\0\0\0\0" + values.astype(stored).tobytes(order="F"))
    if draw(st.integers(0, 6)) == 0:
        raw += b"\0" * draw(st.sampled_from([1, 16, 4096]))
    damaged = False
    data = bytes(raw)
    if draw(st.booleans()):
        data = gzip.compress(data, 1, mtime=0)
    if draw(st.integers(0, 4)) == 0:
        data, damaged = _damage(draw, data), True
    return data, damaged


def _header(draw: st.DrawFn, values: np.ndarray) -> Any:
    header = nibabel.Nifti1Header(endianness=">" if values.dtype.byteorder == ">" else "<")
    header.set_data_dtype(values.dtype)
    header.set_data_shape(values.shape)
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    affine = draw(affines())
    codes = draw(st.sampled_from([(1, 1), (1, 1), (0, 2), (1, 0), (0, 0), (4, 1), (-1, 2)]))
    header.set_qform(affine if draw(st.integers(0, 7)) else draw(affines()), strip_shears=True)
    header.set_sform(affine)
    header["qform_code"], header["sform_code"] = codes
    scaling = draw(st.sampled_from([None] * 6 + [(2.0, -1024.0), (0.5, 0.0), (1.0, 0.0), (0.0, 0.0), "odd"]))
    if scaling == "odd":
        header["scl_slope"], header["scl_inter"] = draw(ODD_FLOATS), draw(ODD_FLOATS)
    elif scaling is not None:
        header["scl_slope"], header["scl_inter"] = scaling
    header["xyzt_units"] = draw(st.sampled_from([2, 2, 2, 2, 2, 2, 10, 0, 1, 3, 5]))
    if draw(st.integers(0, 5)) == 0:
        name = draw(st.sampled_from(["dim", "pixdim", "vox_offset", "bitpix", "datatype", "srow_x", "quatern_b"]))
        field = header[name]
        value = draw(ODD_FLOATS) if field.dtype.kind == "f" else draw(st.sampled_from([-1, 0, 1, 7, 99, 512, 32767]))
        if field.shape:
            header[name][draw(st.integers(0, field.shape[0] - 1))] = value
        else:
            header[name] = value
    return header


@st.composite
def meta_files(draw: st.DrawFn) -> tuple[bytes, bool]:
    """Draw the bytes of a MetaImage file, mostly sound, and whether they were cut or changed after they were made."""
    kinds = {"MET_UCHAR": "u1", "MET_SHORT": "<i2", "MET_USHORT": "<u2", "MET_FLOAT": "<f4", "MET_DOUBLE": "<f8"}
    kind = draw(st.sampled_from(sorted(kinds)))
    shape = [draw(LENGTHS) for _ in range(draw(st.sampled_from([2, 3, 3, 3])))]
    values = np.abs(np.random.default_rng(draw(st.integers(0, 50))).normal(0, 90, shape)).astype(kinds[kind])
    body = values.tobytes(order="F")
    packed = draw(st.booleans())
    if packed:
        body = zlib.compress(body, 1)
    n = len(shape)
    fields: dict[str, str] = {
        "ObjectType": "Image",
        "NDims": str(n),
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": str(packed),
        "TransformMatrix": " ".join("1" if i % (n + 1) == 0 else "0" for i in range(n * n)),
        "Offset": " ".join(["-7.5"] * n),
        "ElementSpacing": " ".join(draw(st.sampled_from(["0.5", "1", "6"])) for _ in range(n)),
        "DimSize": " ".join(map(str, shape)),
        "ElementType": kind,
    }
    if packed and draw(st.booleans()):
        fields["CompressedDataSize"] = str(len(body))
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from([*fields, "HeaderSize", "ElementNumberOfChannels"]))
        odd = ["", "-1", "0", "nan", "1 1 1", "99999999999", "MET_OTHER", "True", "x" * 50, "0 0 0", "3 1e400 2"]
        fields[name] = draw(st.sampled_from(odd))
    where = draw(st.sampled_from(["LOCAL"] * 9 + ["/etc/passwd", "../x.raw", "LIST", ""]))
    head = "".join(f"{name} = {value}\n" for name, value in fields.items()) + f"ElementDataFile = {where}\n"
    data, damaged = head.encode() + body, False
    if draw(st.integers(0, 4)) == 0:
        data, damaged = _damage(draw, data), True
    return data, damaged


def _damage(draw: st.DrawFn, data: bytes) -> bytes:
    if draw(st.booleans()):
        return data[: draw(st.integers(0, len(data) - 1))]
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        changed[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)
