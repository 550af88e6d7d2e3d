"""What a TIFF file's directories say, held against its bytes before a reader decodes it.

Readers make up what is missing: a strip without bytes becomes zeros in one and the true pixels in the next, a directory
that points back to itself never ends, and a length that cannot be true is allocated first.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nnunet_sam2.errors import InputError

MOST_PAGES = 10_000
_MOST_TAGS = 4096
_MOST_VALUES = 1 << 20

WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIP_OFFSETS, _SAMPLES, _ROWS, _STRIP_COUNTS, _PLANAR = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_COUNTS = 322, 323, 324, 325
_DEFAULTS: dict[int, tuple[int, ...]] = {COMPRESSION: (1,), _SAMPLES: (1,), _PLANAR: (1,)}
"""What a tag that is left out means. How colours and bits are meant is left to no default: readers' differ."""
_WANTED = {
    *(WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, _STRIP_OFFSETS, _SAMPLES, _ROWS, _STRIP_COUNTS, _PLANAR),
    *(_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_COUNTS),
}
_LETTER = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
"""Letter of the whole-number types: BYTE, SHORT, LONG, IFD, LONG8, IFD8."""
_YCBCR = 6

_EXPANSION = 2000
"""Most bytes of pixels for each stored one: deflate reaches 1032, LZW 1365."""
_EXPANSION_FROM_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class _Format:
    order: str
    big: bool
    size: int

    def unpack(self, letters: str, data: bytes) -> tuple[int, ...]:
        return struct.unpack(self.order + letters, data)


def check_tiff(path: Path) -> int:
    """Refuse a TIFF file whose directories cannot be true, and return how many pages it has.

    Every directory of the chain has its strips or tiles within the file, none without bytes, as many as its shape
    wants, and as many bytes as its shape wants where nothing is compressed. Sparse files are refused for that: no tag
    says that zeros are meant.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        try:
            layout, position = _begin(path, handle, size)
            seen: set[int] = set()
            while position:
                if position in seen:
                    raise _DamageError(f"its directory {len(seen)} points back to an earlier one")
                if len(seen) >= MOST_PAGES:
                    raise _DamageError(f"it has more than {MOST_PAGES} pages")
                seen.add(position)
                tags, position = _directory(handle, layout, position)
                _check_page(tags, size)
        except _DamageError as damage:
            raise InputError(f"{path} is damaged: {damage}; get the file again, or save it anew") from None
    if not seen:
        raise InputError(f"{path} is a TIFF file without a page; get the file again")
    return len(seen)


class _DamageError(Exception):
    """Say in words what cannot be true."""


def _begin(path: Path, handle: IO[bytes], size: int) -> tuple[_Format, int]:
    head = handle.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    version = struct.unpack(order + "H", head[2:4])[0] if order and len(head) >= 8 else 0
    if order is None or version not in (42, 43):
        raise InputError(f"{path} cannot be read as a picture: it does not begin as TIFF does; get the file again")
    layout = _Format(order=order, big=version == 43, size=size)
    if not layout.big:
        return layout, layout.unpack("I", head[4:8])[0]
    if len(head) < 16 or layout.unpack("HH", head[4:8]) != (8, 0):
        raise _DamageError("its BigTIFF header is none")
    return layout, layout.unpack("Q", head[8:16])[0]


def _read(handle: IO[bytes], layout: _Format, position: int, count: int) -> bytes:
    if position + count > layout.size:
        raise _DamageError(f"bytes {position} to {position + count} are beyond its end ({layout.size})")
    handle.seek(position)
    return handle.read(count)


def _directory(handle: IO[bytes], layout: _Format, position: int) -> tuple[dict[int, tuple[int, ...]], int]:
    """Return a directory's tags that say where pixels are, and where the next directory is."""
    width, entry, letter = (8, 20, "Q") if layout.big else (2, 12, "H")
    count = layout.unpack(letter, _read(handle, layout, position, width))[0]
    if not 0 < count <= _MOST_TAGS:
        raise _DamageError(f"a directory has {count} tags")
    address = "Q" if layout.big else "I"
    span = struct.calcsize(layout.order + address)
    raw = _read(handle, layout, position + width, count * entry + span)
    tags: dict[int, tuple[int, ...]] = {}
    for begin in range(0, count * entry, entry):
        code, kind, number = layout.unpack("HH" + address, raw[begin : begin + 4 + span])
        if code not in _WANTED:
            continue
        if code in tags:
            raise _DamageError(f"a directory has tag {code} twice")
        if kind not in _LETTER or not 0 < number <= _MOST_VALUES:
            raise _DamageError(f"tag {code} holds {number} values of type {kind}")
        letters = f"{number}{_LETTER[kind]}"
        length = struct.calcsize(layout.order + letters)
        value = raw[begin + 4 + span : begin + entry]
        if length > span:
            value = _read(handle, layout, layout.unpack(address, value)[0], length)
        tags[code] = layout.unpack(letters, value[:length])
    return tags, layout.unpack(address, raw[-span:])[0]


def _check_page(tags: dict[int, tuple[int, ...]], size: int) -> None:
    def one(code: int) -> int:
        values = tags.get(code) or _DEFAULTS.get(code, ())
        if len(values) != 1 or values[0] < 1:
            raise _DamageError(f"tag {code} is {', '.join(map(str, values[:4])) or 'missing'}")
        return values[0]

    width, length, samples = one(WIDTH), one(LENGTH), one(_SAMPLES)
    bits = tags.get(BITS, ())
    if len(tags.get(PHOTOMETRIC, ())) != 1:
        raise _DamageError(f"it does not say which colours its numbers are (tag {PHOTOMETRIC})")
    if not bits or len(bits) not in (1, samples) or len(set(bits)) > 1 or not 0 < bits[0] <= 64:
        raise _DamageError(f"it has {', '.join(map(str, bits[:8])) or 'unknown'} bits for {samples} values a pixel")
    planes, deep = (samples, 1) if one(_PLANAR) == 2 else (1, samples)
    tiled = _TILE_OFFSETS in tags or _TILE_WIDTH in tags
    if tiled and _STRIP_OFFSETS in tags:
        raise _DamageError("a page has both strips and tiles")
    what = "tile" if tiled else "strip"
    if tiled:
        across, down = one(_TILE_WIDTH), one(_TILE_LENGTH)
        number, rows = math.ceil(width / across) * math.ceil(length / down), [down]
    else:
        across = width
        down = min(length, one(_ROWS) if _ROWS in tags else length)
        number = math.ceil(length / down)
        rows = [down, length - (number - 1) * down]
    offsets, counts = (
        tags.get(code, ()) for code in ((_TILE_OFFSETS, _TILE_COUNTS) if tiled else (_STRIP_OFFSETS, _STRIP_COUNTS))
    )
    if not len(offsets) == len(counts) == number * planes:
        raise _DamageError(
            f"its {width} x {length} pixels want {number * planes} {what}s, it has {len(offsets)} offsets and "
            f"{len(counts)} byte counts"
        )
    row_bytes = math.ceil(across * bits[0] * deep / 8)
    plain = one(COMPRESSION) == 1 and tags.get(PHOTOMETRIC) != (_YCBCR,)
    for index, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        if not offset or not count:
            raise _DamageError(f"{what} {index} has no bytes")
        if offset + count > size:
            raise _DamageError(f"{what} {index} ends at byte {offset + count} of {size}")
        wanted = row_bytes * rows[-1 if index % number == number - 1 else 0]
        if plain and count < wanted:
            raise _DamageError(f"{what} {index} has {count} bytes, {wanted} are wanted")
    promised = row_bytes * (down if tiled else 1) * (number if tiled else length) * planes
    if promised > _EXPANSION_FROM_BYTES and promised > _EXPANSION * sum(counts):
        raise _DamageError(f"its {width} x {length} pixels cannot be in {sum(counts)} bytes")
