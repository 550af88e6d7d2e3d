"""What a NIfTI file says of itself, held against what it holds, before an image library sees it.

SimpleITK reads a truncated ``.nii.gz`` without an error, turns NaN into 0, takes the qform where the sform is not at
right angles, and multiplies out fields that other readers ignore. Here every such file is refused, or mended where the
user's `ReadPolicy` says so; what is left means the same to SimpleITK, nibabel and nnU-Net.
"""

from __future__ import annotations

import gzip
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from nnunet_sam2.errors import InputError
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.repairs import ERROR, STRICT, ReadPolicy, Repairs

if TYPE_CHECKING:
    from collections.abc import Iterator

FORM_TOLERANCE_MM = 0.1
"""Distance of a volume's corners by qform and by sform above which the two contradict each other."""

SHEAR_TOLERANCE = 1e-4
"""Largest cosine between two axes that still counts as a right angle; ITK draws its line about here."""

MOST_DEGREES = 5.0
"""Largest turn of an axis by which axes are put at right angles; beyond it a volume needs resampling."""

SURPLUS_BYTES = 1 << 20
"""How much more than its header promises a file may hold."""

_SIZE_TOLERANCE = 1e-3
"""Relative difference of the voxel size by sform and by pixdim above which they contradict each other."""

_LEAST_SLOPE = 1e-12
"""ITK takes a smaller scl_slope for none at all."""

_CHUNK_VALUES = 1 << 20
_UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""Spatial part of xyzt_units: unknown, metre, millimetre, micrometre."""
_FLIP_XY = np.diag([-1.0, -1.0, 1.0])
"""From NIfTI's patient axes (right, anterior, superior) to SimpleITK's (left, posterior, superior)."""


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
        with _stream(path) as stream:
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
    geometry, repairs = _grid(path, header, shape, policy)
    return NiftiFacts(geometry=geometry, nonfinite_voxels=nan + infinite, repairs=repairs, axes=len(shape))


def read_values(path: Path) -> np.ndarray:
    """Read a checked file's values, NaN and infinite ones as they are, axes reversed as SimpleITK has them."""
    import nibabel

    with _stream(path) as stream:
        raw = stream.read()
    header = read_header(path, raw[:600])
    kind = nibabel.Nifti1Image if isinstance(header, nibabel.Nifti1Header) else nibabel.Nifti2Image
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.asarray(kind.from_bytes(raw).dataobj)
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
        "(for an image that is converted: --nan zero or --nan min)"
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
            return header
    raise InputError(f"{path} is named like NIfTI but has no NIfTI header; get the file again or name it by its format")


def is_plain_nifti_gz(path: Path) -> bool:
    """Say whether a file is a gzipped three-dimensional NIfTI in millimetres, which nnU-Net can take as it is."""
    with path.open("rb") as handle:
        if not path.name.lower().endswith(".nii.gz") or handle.read(2) != b"\x1f\x8b":
            return False
    with _stream(path) as stream:
        header = read_header(path, stream.read(600))
    return int(header["dim"][0]) == 3


@contextmanager
def _stream(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as handle:
        zipped = handle.read(2) == b"\x1f\x8b"
    with gzip.open(path) if zipped else path.open("rb") as stream:
        yield stream  # type: ignore[misc]


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
    if int(header["xyzt_units"]) & 7 not in _UNIT_MM:
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
    values = 1
    for length in shape:
        values *= length
    promised = offset + values * dtype.itemsize
    if not isinstance(stream, gzip.GzipFile) and path.stat().st_size < promised:
        _refuse_short(path, promised, path.stat().st_size)
    nan = infinite = 0
    rest = head[offset:]
    position = len(head)
    if position < offset:
        position += len(stream.read(offset - position))
    seen = 0
    while seen < values * dtype.itemsize:
        chunk = rest + stream.read(_CHUNK_VALUES * dtype.itemsize - len(rest))
        position += len(chunk) - len(rest)
        if not chunk:
            break
        whole = min(len(chunk), values * dtype.itemsize - seen) // dtype.itemsize * dtype.itemsize
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


def _grid(path: Path, header: Any, shape: tuple[int, ...], policy: ReadPolicy) -> tuple[Geometry, Repairs]:
    """Return the grid in SimpleITK's axes and in mm, and what was mended in it."""
    forms = _forms(path, header)
    lengths = np.array((*shape, 1, 1)[:3], dtype=float)
    if not forms:
        # Neither is set: the voxel size alone, along SimpleITK's axes, as nnU-Net reads it.
        sizes = np.array([v if v > 0 else 1.0 for v in np.asarray(header["pixdim"][1:4], dtype=float)])
        return _geometry(shape, sizes * _unit(header), np.zeros(3), np.eye(3)), Repairs()
    affine, taken = _chosen_form(path, header, forms, lengths, policy)
    # The unit applies to the header's lengths; the origin is a length too.
    matrix, origin = _FLIP_XY @ affine[:3, :3] * _unit(header), _FLIP_XY @ affine[:3, 3] * _unit(header)
    spacing = np.linalg.norm(matrix, axis=0)
    direction = matrix / spacing
    if _shear(affine) > SHEAR_TOLERANCE:
        left, _, right = np.linalg.svd(direction)
        straight = left @ right
        angle = float(np.degrees(np.arccos(np.clip((direction * straight).sum(axis=0), -1, 1))).max())
        if not policy.fix_geometry or angle > MOST_DEGREES:
            way = (
                f"right angles are more than {MOST_DEGREES:g} degrees away: resample it onto a straight grid"
                if angle > MOST_DEGREES
                else "take the nearest right angles with --fix-geometry, or resample it onto a straight grid"
            )
            raise InputError(
                f"{path} has sheared axes ({angle:.3g} degrees from right angles), which SimpleITK and nnU-Net cannot "
                f"hold; {way}"
            )
        # The middle of the volume stays where it is: so its corners move least.
        middle = (lengths - 1) / 2 * spacing
        before = np.eye(4)
        before[:3, :3], before[:3, 3] = direction * spacing, origin
        origin = origin + direction @ middle - straight @ middle
        after = np.eye(4)
        after[:3, :3], after[:3, 3] = straight * spacing, origin
        direction = straight
        taken |= {"angle_degrees": angle, "moved_mm": _corner_distance(before, after, lengths)}
    return _geometry(shape, spacing, origin, direction), Repairs(**taken)


def _geometry(shape: tuple[int, ...], spacing: np.ndarray, origin: np.ndarray, direction: np.ndarray) -> Geometry:
    x, y, z = (*shape, 1, 1)[:3]
    return Geometry(
        shape_zyx=(z, y, x),
        spacing_xyz_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        origin_xyz_mm=(float(origin[0]), float(origin[1]), float(origin[2])),
        direction=tuple(float(v) for v in direction.ravel()),
    )


def _chosen_form(
    path: Path, header: Any, forms: dict[str, np.ndarray], lengths: np.ndarray, policy: ReadPolicy
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the placement to believe; refuse two that contradict each other unless the policy names one."""
    if "sform" not in forms:
        return forms["qform"], {}
    sform = forms["sform"]
    sizes = np.array([v if v > 0 else 1.0 for v in np.asarray(header["pixdim"][1:4], dtype=float)])
    other = forms.get("qform", sform * np.array([*(sizes / np.linalg.norm(sform[:3, :3], axis=0)), 1.0]))
    difference = _corner_distance(sform, other, lengths)
    if difference <= FORM_TOLERANCE_MM and np.allclose(
        np.linalg.norm(sform[:3, :3], axis=0), sizes, rtol=_SIZE_TOLERANCE, atol=0
    ):
        return (other if "qform" in forms and _shear(sform) > SHEAR_TOLERANCE else sform), {}
    if policy.form is None:
        what = (
            f"a qform and an sform that lie {difference:.3g} mm apart"
            if "qform" in forms
            else f"voxel size {_listed(sizes)} in pixdim and {_listed(np.linalg.norm(sform[:3, :3], axis=0))} in sform"
        )
        raise InputError(
            f"{path} has {what}, so that programs place it differently; say which one is right with --form sform or "
            "--form qform (pixdim goes with qform), or write it anew"
        )
    return forms.get(policy.form, other), {"form": policy.form, "form_difference_mm": round(difference, 3)}


def _listed(sizes: np.ndarray) -> str:
    return " x ".join(f"{v:.4g}" for v in sizes)


def _forms(path: Path, header: Any) -> dict[str, np.ndarray]:
    """Return the header's placements that are set, checked: sform first, as it is believed where only it is there."""
    forms = {}
    for name, code in (("sform", "sform_code"), ("qform", "qform_code")):
        if int(header[code]) <= 0:
            continue
        try:
            affine = np.asarray(header.get_sform() if name == "sform" else header.get_qform(), dtype=float)
            sound = bool(np.isfinite(affine).all()) and abs(np.linalg.det(affine[:3, :3])) > 1e-12
        except Exception:  # a quaternion that is none
            sound = False
        if not sound:
            raise InputError(f"{path} has an {name} that is no placement in space; correct the header, or unset it")
        forms[name] = affine
    return forms


def _unit(header: Any) -> float:
    return _UNIT_MM[int(header["xyzt_units"]) & 7]


def _shear(affine: np.ndarray) -> float:
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(cosines.T @ cosines - np.eye(3)).max())


def _corner_distance(one: np.ndarray, other: np.ndarray, lengths: np.ndarray) -> float:
    """Measure how far apart two affines put the corners of a volume."""
    corners = np.array([[i, j, k, 1.0] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    corners[:, :3] *= lengths - 1
    return float(np.linalg.norm((corners @ (one - other).T)[:, :3], axis=1).max())
