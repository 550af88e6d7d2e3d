"""A picture whose reader complains is refused: the pixels that it gives all the same are not to be trusted."""

from __future__ import annotations

import logging
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from nnunet_sam2.errors import InputError
from nnunet_sam2.files.pictures import read_picture


def test_a_picture_whose_reader_complains_is_refused_and_no_log_line_reaches_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, np.arange(64, dtype=np.uint8).reshape(8, 8), metadata=None)
    assert read_picture(path).shape == (1, 8, 8)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        tag = file.pages[0].tags["StripByteCounts"]
    data[tag.offset : tag.offset + 2] = (60000).to_bytes(2, "little")  # the tag is lost
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.tif is damaged: .* 0 byte counts"):
        read_picture(path)
    assert not caplog.records
    assert logging.getLogger("tifffile").propagate


def _with_tag(path: Path, code: int, value: int) -> None:
    """Give a one-page little-endian file another value for a tag; 0 for the code is the next directory."""
    data = bytearray(path.read_bytes())
    start = struct.unpack_from("<I", data, 4)[0]
    number = struct.unpack_from("<H", data, start)[0]
    for entry in range(start + 2, start + 2 + 12 * number, 12):
        if struct.unpack_from("<H", data, entry)[0] == code:
            kind = struct.unpack_from("<H", data, entry + 2)[0]
            struct.pack_into("<H" if kind == 3 else "<I", data, entry + 8, value)
    if not code:
        struct.pack_into("<I", data, start + 2 + 12 * number, value)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("code", "value", "told"),
    [
        (279, 0, "strip 0 has no bytes"),
        (279, 63, "strip 0 has 63 bytes, 64 are wanted"),
        (279, 9999, "strip 0 ends at byte"),
        (273, 0, "strip 0 has no bytes"),
        (257, 2**31, "pixels want|cannot be in"),
        (256, 0, "tag 256 is 0"),
        (0, 8, "points back"),
        (0, 2**31, "beyond its end"),
    ],
)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_tiff_whose_directories_cannot_be_true_is_refused_before_it_is_decoded(
    tmp_path: Path, code: int, value: int, told: str, compression: str | None
) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, np.arange(64, dtype=np.uint8).reshape(8, 8), metadata=None, compression=compression)
    assert read_picture(path).shape == (1, 8, 8)
    _with_tag(path, code, value)
    begin = time.process_time()
    if compression and value == 63:
        told = r"ends at byte|damaged|cannot be read"
    if value == 2**31 and code:
        _with_tag(path, 278, value)
        told = "cannot be in|bytes, .* are wanted"
    with pytest.raises(InputError, match=told):
        read_picture(path)
    assert time.process_time() - begin < 2


def test_a_tiff_in_which_two_readers_find_other_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, np.arange(64, dtype=np.uint16).reshape(8, 8), photometric="miniswhite", metadata=None)
    with pytest.raises(InputError, match="counts its greys from white"):
        read_picture(path)
