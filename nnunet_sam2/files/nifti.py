"""What a NIfTI file says of itself, held against what it holds, before an image library sees it.

SimpleITK reads a truncated ``.nii.gz`` without an error, turns NaN into 0, takes the qform where the sform is not at
right angles, and multiplies out fields that other readers ignore. Here every such file is refused, or mended where the
user's `ReadPolicy` says so; what is left means the same to SimpleITK, nibabel and nnU-Net.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from nnunet_sam2.errors import InputError
from nnunet_sam2.files.expansion import check_expansion
from nnunet_sam2.files.gzipped import is_gzipped, open_stream
from nnunet_sam2.files.nifti_placement import UNIT_MM, placement_of
from nnunet_sam2.files.repairs import ERROR, STRICT, ReadPolicy, Repairs
from nnunet_sam2.geometry import Geometry

SURPLUS_BYTES = 1 << 20
"""How much more than its header promises a file may hold."""

_LEAST_SLOPE = 1e-12
"""ITK takes a smaller scl_slope for none at all."""

_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class NiftiFacts:
    """Hold what a whole NIfTI file turned out to be."""

    geometry: Geometry
    nonfinite_voxels: int
    repairs: Repairs
    """What was mended in the header; voxels are mended by `mend_nonfinite`."""
    axes: int

    @property
    def by_own_rules(self) -> bool:
        """Say whether SimpleITK would read something else: what is to be mended, or a slice without its place."""
        return bool(self.nonfinite_voxels or self.repairs) or self.axes not in (3, 4)


def check_nifti(path: Path, policy: ReadPolicy = STRICT) -> NiftiFacts:
    """Read a file from end to end, in bounded memory, and refuse one that is damaged or can be read in two ways."""
    try:
        with open_stream(path) as stream:
            if isinstance(stream, gzip.GzipFile) and not path.name.lower().endswith(".gz"):
                raise InputError(f"{path} is compressed but not named so; call it {path.name}.gz")
            head = stream.read(600)
            header = read_header(path, head)
            shape, dtype = _check_fields(path, header)
            nan, infinite = _read_to_the_end(path, stream, head, header, shape, dtype)
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path} is damaged or cut off ({error}); copy or download it again") from None
    if nan + infinite and policy.nonfinite == ERROR:
        refuse_nonfinite(path, nan, infinite)
    geometry, repairs = placement_of(path, header, shape, policy)
    return NiftiFacts(geometry=geometry, nonfinite_voxels=nan + infinite, repairs=repairs, axes=len(shape))


def read_values(path: Path) -> np.ndarray:
    """Read a checked file's values, NaN and infinite ones as they are, axes reversed as SimpleITK has them."""
    import nibabel

    with open_stream(path) as stream:
        raw = stream.read()
    header = read_header(path, raw[:600])
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.asarray(nibabel.Nifti1Image.from_bytes(raw).dataobj)
        if array.dtype.kind == "f" and np.dtype(header.get_data_dtype()).itemsize <= 4:
            array = array.astype(np.float32)
    array = array.reshape(array.shape[: max(2, min(4, array.ndim))])
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")).T)


def mend_nonfinite(path: Path, values: np.ndarray, policy: ReadPolicy) -> tuple[np.ndarray, Repairs]:
    """Refuse or replace NaN and infinite values as the policy says; returns the values and how many there were."""
    if values.dtype.kind != "f":
        return values, Repairs()
    finite = np.isfinite(values)
    count = int(values.size - np.count_nonzero(finite))
    if not count:
        return values, Repairs()
    if policy.nonfinite == ERROR:
        refuse_nonfinite(path, int(np.isnan(values).sum()), int(np.isinf(values).sum()))
    if count == values.size:
        raise InputError(f"{path} holds nothing but NaN and infinite voxels; get the file again")
    value = 0 if policy.nonfinite == "zero" else values[finite].min()
    return np.where(finite, values, value).astype(values.dtype), Repairs(
        nonfinite_voxels=count, nonfinite_set_to=policy.nonfinite
    )


def refuse_nonfinite(path: Path, nan: int, infinite: int) -> None:
    """Refuse a file for its NaN and infinite voxels."""
    raise InputError(
        f"{path} holds {nan} NaN and {infinite} infinite voxels; replace them, for example by the background's value "
        "(convert takes --nan zero or --nan min for images)"
    )


def read_header(path: Path, start: bytes) -> Any:
    """Return nibabel's header for a file's first bytes; raise `InputError` where they are none."""
    import nibabel

    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        try:
            header = kind(start[: kind.sizeof_hdr], check=False)
        except Exception:  # nibabel raises many kinds for bytes that are no header
            continue
        single = bytes(header["magic"])[:3] == b"n+1" or bytes(header["magic"])[:3] == b"n+2"
        if int(header["sizeof_hdr"]) == kind.sizeof_hdr and 1 <= int(header["dim"][0]) <= 7 and single:
            if kind is nibabel.Nifti2Header:
                raise InputError(f"{path} is NIfTI-2, which SimpleITK and nnU-Net do not read; save it as NIfTI-1")
            return header
    raise InputError(f"{path} is named like NIfTI but has no NIfTI header; get the file again or name it by its format")


def is_plain_nifti_gz(path: Path, *, whole_numbers: bool = False) -> bool:
    """Say whether a checked file is a gzipped three-dimensional NIfTI, which nnU-Net can take as it is.

    With ``whole_numbers`` its voxels are to be integers that the header does not scale.
    """
    if not path.name.lower().endswith(".nii.gz") or not is_gzipped(path):
        return False
    with open_stream(path) as stream:
        header = read_header(path, stream.read(600))
    # As nibabel says it: None for a slope that is 0 or NaN, and so means nothing.
    scaled = header.get_slope_inter() not in ((None, None), (1.0, 0.0))
    if whole_numbers and (scaled or header.get_data_dtype().kind not in "iu"):
        return False
    return int(header["dim"][0]) == 3


def _check_fields(path: Path, header: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    shape = tuple(int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])])
    if min(shape) < 1:
        raise InputError(f"{path} has an axis without voxels, shape {shape}; get the file again")
    try:
        dtype = np.dtype(header.get_data_dtype())
    except Exception:
        raise InputError(f"{path} has an unknown NIfTI data type {int(header['datatype'])}") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise InputError(
            f"{path} holds {dtype} voxels (complex, colour or extended); export one real-valued file a channel"
        )
    if int(header["bitpix"]) != 8 * dtype.itemsize:
        raise InputError(f"{path} has a damaged header: {int(header['bitpix'])} bits a voxel for {dtype}; get it again")
    if len(shape) > 4 and max(shape[4:]) > 1:
        raise InputError(f"{path} has {len(shape)} axes, shape {shape}; export one three-dimensional file a channel")
    pixdim = np.asarray(header["pixdim"][1 : 1 + min(3, len(shape))], dtype=float)
    if not np.isfinite(pixdim).all() or (pixdim <= 0).any():
        raise InputError(f"{path} has voxel size {pixdim.tolist()} mm in its header; set the true one")
    slope, offset = float(header["scl_slope"]), float(header["scl_inter"])
    if np.isinf(slope) or 0 < abs(slope) < _LEAST_SLOPE:
        raise InputError(f"{path} multiplies its voxels by {slope:g} (scl_slope); get the file again")
    unscaled = slope == 0 or np.isnan(slope)
    # nibabel writes NaN for both where nothing is scaled.
    if np.isinf(offset) or (unscaled and offset != 0 and not np.isnan(offset)) or (not unscaled and np.isnan(offset)):
        raise InputError(
            f"{path} has scl_slope {slope:g} with scl_inter {offset:g}, which some readers apply and others do not; "
            "set both to what is meant"
        )
    if int(header["xyzt_units"]) & 7 not in UNIT_MM:
        raise InputError(f"{path} measures lengths in an unknown unit (xyzt_units {int(header['xyzt_units'])})")
    return shape, dtype


def _read_to_the_end(
    path: Path, stream: IO[bytes], head: bytes, header: Any, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[int, int]:
    """Hold the length against the header's and the gzip checksum against the bytes; count NaN and infinite values."""
    begin = float(header["vox_offset"])
    if not header["sizeof_hdr"] <= begin <= SURPLUS_BYTES or begin != int(begin):
        raise InputError(f"{path} has a damaged header: its voxels begin at byte {begin:g}; copy or download it again")
    offset = int(begin)
    # In exact arithmetic: a header may promise more than 64 bits can count.
    voxel_bytes = math.prod(shape) * dtype.itemsize
    promised = offset + voxel_bytes
    if not isinstance(stream, gzip.GzipFile) and path.stat().st_size < promised:
        _refuse_short(path, promised, path.stat().st_size)
    check_expansion(path, voxel_bytes)
    nan = infinite = 0
    rest = head[offset:]
    position = len(head)
    if position < offset:
        position += len(stream.read(offset - position))
    seen = 0
    while seen < voxel_bytes:
        chunk = rest + stream.read(_CHUNK_VALUES * dtype.itemsize - len(rest))
        position += len(chunk) - len(rest)
        if not chunk:
            break
        whole = min(len(chunk), voxel_bytes - seen) // dtype.itemsize * dtype.itemsize
        if not whole:
            break
        if dtype.kind == "f":
            part = np.frombuffer(chunk[:whole], dtype=dtype)
            nan += int(np.isnan(part).sum())
            infinite += int(np.isinf(part).sum())
        seen += whole
        rest = chunk[whole:]
    while position <= promised + SURPLUS_BYTES:
        drained = len(stream.read(_CHUNK_VALUES))
        position += drained
        if not drained:
            break
    if position < promised:
        _refuse_short(path, promised, position)
    if position > promised + SURPLUS_BYTES:
        raise InputError(
            f"{path} holds more than the {promised} bytes that its header promises; copy or download it again"
        )
    return nan, infinite


def _refuse_short(path: Path, promised: int, found: int) -> None:
    raise InputError(
        f"{path} is cut off: its header promises {promised} bytes, it holds {found}; copy or download it again"
    )
