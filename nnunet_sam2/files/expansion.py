"""What a compressed image may open to: no more than its header says, than images shrink by, and than there is room for.

A file of 4 MB can honestly hold 4 GB of zeros. It is refused by its header, before a byte is inflated.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from nnunet_sam2.errors import InputError
from nnunet_sam2.machine import read_memory

LARGE_BYTES = 3_000_000_000
"""Below this many bytes of voxels it does not matter how well they are compressed."""
RATIO = 500
"""Most bytes of voxels for each stored one beyond that: images shrink by 10 at most, label maps by some 100."""
_DEFLATE = 1040
"""Most bytes that deflate can make of one, and a little."""
_COPIES = 3
"""How many copies of a volume reading and looking at it holds."""
_ROOM_FROM_BYTES = 1 << 30
_CHUNK = 1 << 22


def check_expansion(path: Path, voxel_bytes: int) -> None:
    """Refuse a file whose header promises more voxels than can be meant, or than this machine has memory for."""
    stored = path.stat().st_size
    if voxel_bytes > LARGE_BYTES and voxel_bytes > _DEFLATE * stored:
        raise InputError(
            f"{path} is cut off: its header promises {voxel_bytes} bytes, {stored} compressed ones cannot hold "
            "them; copy or download it again"
        )
    if voxel_bytes > LARGE_BYTES and voxel_bytes > RATIO * stored:
        raise InputError(
            f"{path} opens to {voxel_bytes / 1e9:.1f} GB from {stored / 1e6:.1f} MB, more than {RATIO} times its size, "
            "which no image does; crop it, or save it as whole numbers of 8 bits or uncompressed if it is meant"
        )
    if voxel_bytes > _ROOM_FROM_BYTES and _COPIES * voxel_bytes > (free := read_memory().available):
        raise InputError(
            f"{path} opens to {voxel_bytes / 1e9:.1f} GB of voxels, {_COPIES} times that is wanted and "
            f"{free / 1e9:.1f} GB of memory are free; crop or resample it, or use a machine with more memory"
        )


def inflated_size(path: Path, position: int, promised: int, *, gzipped: bool = False) -> int:
    """Inflate what a file holds from ``position`` on to its checksum, in bounded memory, and return its size.

    Raises `InputError` for what is damaged, cut off, or holds more than ``promised`` bytes.
    """
    inflater = zlib.decompressobj(31 if gzipped else 15)
    size = 0
    try:
        with path.open("rb") as handle:
            handle.seek(position)
            while chunk := inflater.unconsumed_tail or handle.read(1 << 20):
                size += len(inflater.decompress(chunk, _CHUNK))
                if inflater.eof or size > promised:
                    break
    except zlib.error as error:
        raise InputError(f"{path} is damaged or cut off ({error}); copy or download it again") from None
    if not inflater.eof or size > promised:
        raise InputError(
            f"{path} is damaged or cut off: {size} bytes of voxels, promised are {promised}; copy or download it again"
        )
    return size
