"""A picture whose reader complains is refused: the pixels that it gives all the same are not to be trusted."""

from __future__ import annotations

import logging
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
    with pytest.raises(InputError, match=r"x\.tif (is damaged: its reader complains|cannot be read)"):
        read_picture(path)
    assert not caplog.records
    assert logging.getLogger("tifffile").propagate
