"""What is really in an image file: the checks that image readers leave out.

SimpleITK reads a truncated ``.nii.gz`` without an error and turns NaN of a float NIfTI into 0; a flipped byte passes
every reader that stops before the checksum. So files are checked here, byte for byte, before a reader sees them.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from nnunet_sam2.errors import InputError
from nnunet_sam2.files.expansion import check_expansion, inflated_size
from nnunet_sam2.files.label_tables import SEGMENT_ENDING, header_end, header_lines
from nnunet_sam2.files.nifti import NiftiFacts, check_nifti
from nnunet_sam2.files.repairs import STRICT, ReadPolicy

VOLUME_ENDINGS = (".nii.gz", ".nii", ".mha", SEGMENT_ENDING, ".nrrd")
"""Endings of files with a grid in space."""

PICTURE_ENDINGS = (".png", ".bmp", ".tif", ".tiff", ".pgm", ".ppm", ".pnm", ".jpg", ".jpeg")
"""Endings of two-dimensional pictures without a grid in space."""

LOSSY_ENDINGS = (".jpg", ".jpeg")
"""Endings of pictures that cannot hold a label map."""

_HEADER_BYTES = 1 << 16
_NRRD_BYTES = {
    name: size
    for size, names in {
        1: "signed char,int8,int8_t,uchar,unsigned char,uint8,uint8_t",
        2: "short,short int,signed short,signed short int,int16,int16_t,ushort,unsigned short,unsigned short int,"
        "uint16,uint16_t",
        4: "int,signed int,int32,int32_t,uint,unsigned int,uint32,uint32_t,float",
        8: "longlong,long long,long long int,signed long long,signed long long int,int64,int64_t,ulonglong,"
        "unsigned long long,unsigned long long int,uint64,uint64_t,double",
    }.items()
    for name in names.split(",")
}
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


def check_path(path: Path) -> None:
    """Refuse a path that is no text: SimpleITK ends the whole process for one, without a word."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path} holds letters that are not UTF-8; rename the file or the folder") from None


@contextlib.contextmanager
def readable(source: Path) -> Iterator[None]:
    """Make a refusal of what the operating system does not let be read of ``source`` during the block."""
    try:
        if os.path.lexists(source):
            source.stat()  # a link to itself
        yield
    except FileNotFoundError:
        raise InputError(f"{source} is a link to nothing, or vanished while it was read; restore it") from None
    except OSError as error:
        where = error.filename or source
        raise InputError(
            f"{where} cannot be read ({error.strerror or error}); mend the link, give yourself read permission "
            "(chmod u+r, for folders u+rx), or name another folder"
        ) from None


def check_file(path: Path) -> None:
    """Refuse what cannot be an image: nothing there, a folder, no permission, empty, a pointer, a web page."""
    check_path(path)
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


def check_content(path: Path, policy: ReadPolicy = STRICT) -> NiftiFacts | None:
    """Read a volume's file from end to end and refuse one that is damaged or holds NaN or infinite voxels.

    NIfTI: `files.nifti.check_nifti`, whose facts are returned. MetaImage: zlib checksum, length, and that the
    voxels are in the file itself. NRRD: that the voxels are in the file itself. What other readers check (PNG, TIFF) is
    left to them.
    """
    check_file(path)
    ending = file_ending(path)
    if ending in (".nii.gz", ".nii"):
        twin = path.with_name(path.name[: -len(".gz")])
        if ending == ".nii.gz" and twin.exists():
            # The NIfTI library behind SimpleITK takes the header from one and the voxels from the other.
            raise InputError(f"{twin} lies beside {path.name} and would be read in its place; remove or rename one")
        return check_nifti(path, policy)
    if ending == ".mha":
        _check_meta_image(path)
    elif ending in (SEGMENT_ENDING, ".nrrd"):
        _check_nrrd(path)
    return None


def _check_nrrd(path: Path) -> None:
    """Refuse a header that names other files: what is read must be what was given; and voxels that are not whole."""
    fields: dict[str, str] = {}
    for line in header_lines(path):
        if line.lower().replace(" ", "").startswith("datafile:"):
            raise InputError(f"{path} keeps its voxels in another file; save header and voxels in one .nrrd")
        name, colon, value = line.partition(":")
        if colon and not value.startswith("="):
            fields[name.strip().lower()] = value.strip().lower()
    try:
        promised = _NRRD_BYTES[fields["type"]] * math.prod(int(n) for n in fields["sizes"].split())
    except (KeyError, ValueError):
        return  # whoever reads it says what is wrong
    check_expansion(path, promised)
    if fields.get("encoding") in ("gzip", "gz") and not {"line skip", "lineskip", "byte skip", "byteskip"} & set(
        fields
    ):
        found = inflated_size(path, header_end(path), promised, gzipped=True)
        if found < promised:
            raise InputError(
                f"{path} is cut off: its header promises {promised} bytes of voxels, it holds {found}; copy or "
                "download it again"
            )


def _check_meta_image(path: Path) -> None:
    with path.open("rb") as handle:
        head = handle.read(_HEADER_BYTES)
    fields: dict[str, str] = {}
    position = 0
    while "ElementDataFile" not in fields:
        end = head.find(b"\n", position)
        # As MetaIO does: a colon ends a name as well.
        name, *value = re.split("[=:]", head[position:end].decode("latin-1"), maxsplit=1)
        if end < 0 or not value:
            raise InputError(f"{path} is named like MetaImage but has no such header; get the file again")
        fields[name.strip()] = value[0].strip()
        position = end + 1
    if fields["ElementDataFile"] != "LOCAL":
        # What is read must be what was given: the header could name any file of this machine.
        raise InputError(f"{path} keeps its voxels in another file; save header and voxels in one .mha")
    element = _META_IMAGE_BYTES.get(fields.get("ElementType", ""))
    if element is None:
        raise InputError(f"{path} holds voxels of type {fields.get('ElementType')}; save plain numbers, one a voxel")
    try:
        channels = int(fields.get("ElementNumberOfChannels", "1"))
        lengths = [int(n) for n in fields["DimSize"].split()]
        dimension = int(fields["NDims"])
        extra = int(fields.get("HeaderSize", "0"))
    except (KeyError, ValueError):
        raise InputError(f"{path} has a damaged MetaImage header; copy or download it again") from None
    if extra or dimension != len(lengths) or not lengths or min(lengths) < 1 or channels < 1:
        raise InputError(
            f"{path} has a damaged MetaImage header (size {lengths}, {dimension} axes, {channels} channels); copy or "
            "download it again"
        )
    promised = element * channels * math.prod(lengths)
    check_expansion(path, promised)
    found = path.stat().st_size - position
    if fields.get("CompressedData", "False").lower() == "true":
        found = inflated_size(path, position, promised)
    if found < promised:
        raise InputError(
            f"{path} is cut off: its header promises {promised} bytes of voxels, it holds {found}; "
            "copy or download it again"
        )
