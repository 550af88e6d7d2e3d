"""Whatever a picture file holds, it is refused, or its pixels are those that a second reader finds; nothing hangs."""

from __future__ import annotations

import io
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import tifffile
from PIL import Image

from nnunet_sam2.errors import InputError
from nnunet_sam2.files.pictures import read_picture

SECONDS_A_FILE = 5.0
ODD = (0, 1, 2, 3, 7, 255, 4096, 65535)
# Tags that say where the pixels are, and how they are kept.
TAGS = (254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 339)


def _tiff(array: np.ndarray, **options: object) -> bytes:
    held = io.BytesIO()
    tifffile.imwrite(held, array, metadata=None, **options)
    return held.getvalue()


def _pillow(array: np.ndarray, kind: str, **options: object) -> bytes:
    held = io.BytesIO()
    Image.fromarray(array).save(held, format=kind, **options)
    return held.getvalue()


def _sound() -> dict[str, list[bytes]]:
    rng = np.random.default_rng(0)
    grey, deep = rng.integers(0, 255, (19, 16), np.uint8), rng.integers(0, 60000, (19, 16), np.uint16)
    colour = rng.integers(0, 255, (19, 16, 3), np.uint8)
    return {
        ".tif": [
            _tiff(grey),
            _tiff(grey, rowsperstrip=4),
            _tiff(deep, rowsperstrip=5, compression="zlib", predictor=True),
            _tiff(deep, byteorder=">", rowsperstrip=7),
            _tiff(colour, photometric="rgb", rowsperstrip=4, compression="lzw"),
            _tiff(colour, photometric="rgb", tile=(16, 16)),
            _tiff(np.moveaxis(colour, -1, 0), photometric="rgb", planarconfig="separate", compression="packbits"),
            _tiff(deep.astype(np.float32), bigtiff=True, rowsperstrip=6),
        ],
        ".png": [_pillow(grey, "PNG"), _pillow(deep, "PNG"), _pillow(colour, "PNG")],
        ".bmp": [_pillow(grey, "BMP"), _pillow(colour, "BMP")],
        ".jpg": [_pillow(grey, "JPEG"), _pillow(colour, "JPEG", subsampling=0)],
    }


def _mutated(data: bytes, ending: str, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    kind = rng.integers(4)
    if kind == 0 and ending == ".tif":
        return _other_tag(changed, rng)
    if kind == 1:
        return data[: rng.integers(1, len(data))]
    # The first bytes say most of what there is to say.
    reach = len(data) if kind == 2 else min(64, len(data))
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(reach)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _directory(data: bytes) -> tuple[str, int, int, int, int]:
    """Byte order, first entry, number of entries, bytes an entry, and where its value begins."""
    order = "<" if data[:2] == b"II" else ">"
    if struct.unpack_from(order + "H", data, 2)[0] == 43:
        start = struct.unpack_from(order + "Q", data, 8)[0]
        return order, start + 8, struct.unpack_from(order + "Q", data, start)[0], 20, 12
    start = struct.unpack_from(order + "I", data, 4)[0]
    return order, start + 2, struct.unpack_from(order + "H", data, start)[0], 12, 8


def _other_tag(data: bytearray, rng: np.random.Generator) -> bytes:
    """Give one tag another code, type, count or value, or have the directory point somewhere else."""
    order, first, number, size, value = _directory(bytes(data))
    entries = [first + i * size for i in range(number)]
    entries = [e for e in entries if struct.unpack_from(order + "H", data, e)[0] in TAGS]
    entry = int(rng.choice(entries))
    what = int(rng.integers(5))
    odd = int(rng.choice(ODD))
    if what == 0:
        struct.pack_into(order + "H", data, entry, int(rng.choice(TAGS)) if odd % 2 else odd)
    elif what == 1:
        struct.pack_into(order + "H", data, entry + 2, odd % 20)
    elif what == 2:
        struct.pack_into(order + "I", data, entry + 4, odd)
    elif what == 3:
        struct.pack_into(order + "I", data, entry + value, odd * int(rng.choice([1, 1, 60000])))
    else:
        start = first - (8 if size == 20 else 2)
        struct.pack_into(order + "I", data, first + number * size, int(rng.choice([start, 8, len(data), 0, odd])))
    return bytes(data)


def _as_simpleitk(path: Path) -> np.ndarray | None:
    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError:
        return None
    array = SimpleITK.GetArrayFromImage(image)
    return np.moveaxis(array, -1, 0) if image.GetNumberOfComponentsPerPixel() > 1 else array[None]


def _files(ending: str, count: int) -> Iterator[bytes]:
    rng = np.random.default_rng([7, count, *ending.encode()])
    sound = _sound()[ending]
    yield from sound
    for number in range(count):
        yield _mutated(sound[number % len(sound)], ending, rng)


@pytest.mark.parametrize(("ending", "count"), [(".tif", 800), (".png", 200), (".bmp", 150), (".jpg", 150)])
def test_any_picture_is_refused_or_has_the_pixels_of_a_second_reader(tmp_path: Path, ending: str, count: int) -> None:
    seen: Counter[str] = Counter()
    path = tmp_path / f"x{ending}"
    for number, data in enumerate(_files(ending, count)):
        path.write_bytes(data)
        begin = time.process_time()
        try:
            array = read_picture(path)
        except InputError as refusal:
            told = str(refusal)
            array = None
        assert time.process_time() - begin < SECONDS_A_FILE, number
        if array is None:
            assert str(path) in told, number
            assert "\n" not in told, number
            seen["refused"] += 1
            continue
        seen["read"] += 1
        other = _as_simpleitk(path)
        if other is None:
            seen["read, the second reader refuses"] += 1
            continue
        if len(array) == 3 and len(other) == 4 and (other[3] == np.iinfo(other.dtype).max).all():
            other = other[:3]  # it adds an alpha channel to tiles
        if len(array) == 1 and len(other) == 3 and (other == other[:1]).all():
            other = other[:1]  # a palette of greys
        assert other.shape == array.shape, number
        if np.array_equal(other, array):
            continue
        # JPEG has no checksum, and decoders differ where a quantisation table overflows.
        assert ending == ".jpg", number
        seen["read otherwise"] += 1
    print(ending, dict(seen))
    assert seen["read otherwise"] <= count // 100, seen
    assert seen["read"] >= len(_sound()[ending]) + (0 if ending == ".png" else 5), seen
    assert seen["refused"] > count // 8, seen
