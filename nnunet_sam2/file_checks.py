"""What is really in an image file: the checks that image readers leave out.

SimpleITK reads a truncated ``.nii.gz`` without an error and turns NaN of a float NIfTI into 0; a flipped byte passes
every reader that stops before the checksum. So files are checked here, byte for byte, before a reader sees them.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from nnunet_sam2.errors import InputError

VOLUME_ENDINGS = (".nii.gz", ".nii", ".mha", ".nrrd")
"""Endings of files with a grid in space."""

PICTURE_ENDINGS = (".png", ".bmp", ".tif", ".tiff", ".pgm", ".ppm", ".pnm", ".jpg", ".jpeg")
"""Endings of two-dimensional pictures without a grid in space."""

LOSSY_ENDINGS = (".jpg", ".jpeg")
"""Endings of pictures that cannot hold a label map."""

_META_IMAGE_BYTES = {
    "MET_CHAR": 1,
    "MET_UCHAR": 1,
    "MET_SHORT": 2,
    "MET_USHORT": 2,
    "MET_INT": 4,
    "MET_UINT": 4,
    "MET_LONG": 8,
    "MET_ULONG": 8,
    "MET_LONG_LONG": 8,
    "MET_ULONG_LONG": 8,
    "MET_FLOAT": 4,
    "MET_DOUBLE": 8,
}


def file_ending(path: Path) -> str:
    """Return the known ending of an image file in lower case; raise `InputError` where it is none."""
    name = path.name.lower()
    for ending in (*VOLUME_ENDINGS, *PICTURE_ENDINGS):
        if name.endswith(ending) and len(name) > len(ending):
            return ending
    known = " ".join((*VOLUME_ENDINGS, *PICTURE_ENDINGS))
    raise InputError(f"{path} is no image file that can be read; known endings: {known}")


def is_image_file(path: Path) -> bool:
    """Say whether a directory entry is named like an image; hidden files (``._x`` of macOS among them) are not."""
    return not path.name.startswith(".") and path.name.lower().endswith((*VOLUME_ENDINGS, *PICTURE_ENDINGS))


def strip_ending(path: Path) -> str:
    """Return a file's name without its image ending."""
    return path.name[: -len(file_ending(path))]


def check_file(path: Path) -> None:
    """Refuse what cannot be an image: nothing there, a folder, no permission, empty, a pointer, a web page."""
    try:
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path} is a link to {path.readlink()}, which does not exist; restore the file")
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if not path.is_file():
            raise InputError(f"{path} is not a regular file; name the image file itself")
        with path.open("rb") as handle:
            head = handle.read(256)
    except PermissionError:
        raise InputError(f"{path} may not be read; give yourself read permission (chmod u+r)") from None
    if not head:
        raise InputError(f"{path} is empty (0 bytes); copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the image; fetch it with: git lfs pull")
    if head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html")):
        raise InputError(f"{path} is a web page, not an image; the download went wrong, get it again")


def check_content(path: Path) -> None:
    """Read a volume's file from end to end and refuse one that is damaged or holds NaN or infinite voxels.

    NIfTI: gzip checksum, length against the header, pixdim, NaN and Inf in the stored values. MetaImage: zlib checksum
    and length. What other readers check themselves (NRRD, PNG, TIFF) is left to them.
    """
    check_file(path)
    ending = file_ending(path)
    if ending in (".nii.gz", ".nii"):
        twin = path.with_name(path.name[: -len(".gz")])
        if ending == ".nii.gz" and twin.exists():
            # The NIfTI library behind SimpleITK takes the header from one and the voxels from the other.
            raise InputError(f"{twin} lies beside {path.name} and would be read in its place; remove or rename one")
        _check_nifti(path)
    elif ending == ".mha":
        _check_meta_image(path)


def check_finite(path: Path, values: np.ndarray) -> None:
    """Refuse NaN and infinite values, naming the file and how many there are."""
    if not np.issubdtype(values.dtype, np.floating) or np.isfinite(values).all():
        return
    nan, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    raise InputError(
        f"{path} holds {nan} NaN and {infinite} infinite voxels; replace them, for example by the background's value"
    )


def is_plain_nifti_gz(path: Path) -> bool:
    """Say whether a file is a gzipped three-dimensional NIfTI, which nnU-Net can take as it is."""
    if file_ending(path) != ".nii.gz":
        return False
    with path.open("rb") as handle:
        if handle.read(2) != b"\x1f\x8b":
            return False
    with gzip.open(path) as stream:
        header = _nifti_header(path, stream.read(600))
    return int(header["dim"][0]) == 3


def nifti_form_difference_mm(path: Path) -> float:
    """Measure how far apart qform and sform put the volume's corners, in mm; 0 where one of them is not set."""
    with path.open("rb") as handle:
        zipped = handle.read(2) == b"\x1f\x8b"
    with gzip.open(path) if zipped else path.open("rb") as stream:
        header = _nifti_header(path, stream.read(600))
    if not int(header["qform_code"]) or not int(header["sform_code"]):
        return 0.0
    lengths = np.array([max(1, int(n)) for n in header["dim"][1:4]])
    corners = np.array([[i, j, k, 1.0] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    corners[:, :3] *= lengths - 1
    difference = corners @ (header.get_sform() - header.get_qform()).T
    return float(np.linalg.norm(difference[:, :3], axis=1).max())


def _nifti_header(path: Path, start: bytes):  # type: ignore[no-untyped-def]  # nibabel has no types
    import nibabel

    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        try:
            header = kind(start[: kind.sizeof_hdr], check=False)
        except Exception:  # nibabel raises many kinds for bytes that are no header
            continue
        if int(header["sizeof_hdr"]) == kind.sizeof_hdr and 1 <= int(header["dim"][0]) <= 7:
            return header
    raise InputError(f"{path} is named like NIfTI but has no NIfTI header; get the file again or name it by its format")


def _check_nifti(path: Path) -> None:
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(f"{path} is damaged or cut off ({error}); copy or download it again") from None
    header = _nifti_header(path, raw[:600])
    shape = tuple(int(n) for n in header.get_data_shape())
    if min(shape) < 1:
        raise InputError(f"{path} has an axis without voxels, shape {shape}; get the file again")
    try:
        dtype = header.get_data_dtype()
    except Exception:
        raise InputError(f"{path} has an unknown NIfTI data type {int(header['datatype'])}") from None
    if dtype.kind not in "iufb":
        raise InputError(f"{path} holds {dtype} voxels (complex or colour); export one real-valued file a channel")
    pixdim = np.asarray(header["pixdim"][1 : 1 + min(3, len(shape))], dtype=float)
    if not np.isfinite(pixdim).all() or (pixdim == 0).any():
        raise InputError(f"{path} has voxel size {pixdim.tolist()} mm in its header; set the true one")
    count, offset = int(np.prod(shape, dtype=np.int64)), int(header.get_data_offset())
    if len(raw) < offset + count * dtype.itemsize:
        raise InputError(
            f"{path} is cut off: its header promises {offset + count * dtype.itemsize} bytes, it holds {len(raw)}; "
            "copy or download it again"
        )
    if dtype.kind == "f":
        check_finite(path, np.frombuffer(raw, dtype=dtype, count=count, offset=offset))


def _check_meta_image(path: Path) -> None:
    raw = path.read_bytes()
    fields: dict[str, str] = {}
    position = 0
    while "ElementDataFile" not in fields:
        end = raw.find(b"\n", position)
        name, separator, value = raw[position:end].decode("latin-1").partition("=")
        if end < 0 or not separator:
            raise InputError(f"{path} is named like MetaImage but has no such header; get the file again")
        fields[name.strip()] = value.strip()
        position = end + 1
    element = _META_IMAGE_BYTES.get(fields.get("ElementType", ""))
    if fields["ElementDataFile"] != "LOCAL" or element is None:
        return
    channels = int(fields.get("ElementNumberOfChannels", "1"))
    promised = int(np.prod([int(n) for n in fields["DimSize"].split()], dtype=np.int64)) * element * channels
    body = raw[position:]
    if fields.get("CompressedData", "False").lower() == "true":
        try:
            body = zlib.decompress(body)
        except zlib.error as error:
            raise InputError(f"{path} is damaged or cut off ({error}); copy or download it again") from None
    if len(body) < promised:
        raise InputError(
            f"{path} is cut off: its header promises {promised} bytes of voxels, it holds {len(body)}; "
            "copy or download it again"
        )
