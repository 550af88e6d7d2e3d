"""A case's pictures as one small block of bytes: image slices as WebP, label maps and confidence deflated.

Layout of a block, which ``assets/payload.js`` reads: length of the header (4 bytes, little endian), the header (JSON,
UTF-8), then the parts that the header names, each with its place and length.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_sam2.geometry import Geometry
from nnunet_sam2.report.surface_grid import nearest, surface_grid
from nnunet_sam2.report.view import choose_view

PLANES = ("first", "last", "human", "confidence")
"""Maps that a block may hold, in this order."""

CONFIDENCE_LEVELS = 7
IGNORED = 255
"""Value of voxels that nobody judged, in the map ``human``."""

_LADDER = (
    (320, 96, 72),
    (288, 72, 66),
    (256, 56, 60),
    (224, 44, 55),
    (192, 36, 50),
    (160, 28, 45),
    (144, 22, 42),
    (128, 16, 40),
    (112, 12, 36),
    (96, 10, 32),
    (96, 7, 28),
    (80, 5, 25),
)
"""Longest side in pixels, most slices, WebP quality: what is tried, one after the other, until a case fits."""

_BYTES_A_PIXEL = 0.2
"""What a pixel with its labels and confidence takes about (0.16 to 0.4 were measured), to start on the right rung."""

_MARGIN = 0.25
"""Margin around the labels, a share of their extent in a slice."""

_LEAST_MARGIN = 8
"""Least margin in voxels."""

_SLICE_MARGIN = 2


@dataclass(frozen=True, kw_only=True)
class CasePictures:
    """Hold what is shown of one case, on its own grid."""

    image_czyx: np.ndarray
    maps: Mapping[str, np.ndarray]
    """Of `PLANES`, those that there are: label maps, (Z, Y, X), and confidence from 0 to 1."""
    geometry: Geometry
    class_values: Sequence[int]
    channel: str = ""
    ignore_value: int | None = None
    picture: bool = False
    story: str = ""
    """How the label was made, for the page to show."""


def encode(case: CasePictures, budget: int) -> bytes:
    """Encode a case in at most ``budget`` bytes where that is possible at all; thin and shrink slices to get there."""
    labels = {name: _class_indices(case, name) for name in PLANES if name in case.maps and name != "confidence"}
    solid = {} if case.picture else {name: np.where(array == IGNORED, 0, array) for name, array in labels.items()}
    surface, surface_header = surface_grid(case.geometry, solid, budget)
    shown = _Slices.of(case, labels)
    room = budget - len(zlib.compress(surface)) - len(zlib.compress(case.story.encode()))
    first = next((i for i, rung in enumerate(_LADDER) if shown.pixels(rung) * _BYTES_A_PIXEL <= room), len(_LADDER) - 1)
    block = b""
    for rung in _LADDER[first:]:
        header, parts = shown.encode(rung)
        block = _pack({**header, "surface": surface_header}, {**parts, "volume": surface, "story": case.story.encode()})
        if len(block) <= budget:
            break
    return block


def unpack(block: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read a block as the page does: the header, and the parts by name."""
    (length,) = struct.unpack("<I", block[:4])
    header = json.loads(block[4 : 4 + length])
    parts = {}
    for name, (offset, size, deflated) in header["parts"].items():
        raw = block[4 + length + offset : 4 + length + offset + size]
        parts[name] = zlib.decompress(raw) if deflated else raw
    return header, parts


def _pack(header: Mapping[str, Any], parts: Mapping[str, bytes]) -> bytes:
    body = b""
    places = {}
    for name, raw in parts.items():
        stored = raw if name == "image" else zlib.compress(raw, 9)
        places[name] = [len(body), len(stored), name != "image"]
        body += stored
    text = json.dumps({**header, "parts": places}, separators=(",", ":")).encode()
    return struct.pack("<I", len(text)) + text + body


def _class_indices(case: CasePictures, name: str) -> np.ndarray:
    """Return a label map with 0, 1, ... in place of the cohort's values, and `IGNORED`."""
    label_zyx = case.maps[name]
    indices = np.zeros(label_zyx.shape, np.uint8)
    for index, value in enumerate(case.class_values, start=1):
        indices[label_zyx == value] = index
    if case.ignore_value is not None:
        indices[label_zyx == case.ignore_value] = IGNORED
    return indices


@dataclass(frozen=True, kw_only=True, eq=False)
class _Slices:
    """Hold a case's slices, rows and columns around its labels, ready to be shrunk."""

    image_csrk: np.ndarray
    """Channels (1 or 3), slices, rows, columns."""
    planes: dict[str, np.ndarray]
    spacing_mm: tuple[float, float, float]
    first_slice: int
    whole: bool
    header: dict[str, Any]

    @classmethod
    def of(cls, case: CasePictures, labels: Mapping[str, np.ndarray]) -> _Slices:
        view = choose_view(case.geometry, picture=case.picture)
        planes = {name: view.apply(array) for name, array in labels.items()}
        if "confidence" in case.maps:
            steps = np.rint(case.maps["confidence"] * CONFIDENCE_LEVELS).astype(np.uint8)
            planes["confidence"] = view.apply(steps)
        colour = case.picture and len(case.image_czyx) == 3
        image = np.stack([view.apply(channel) for channel in (case.image_czyx if colour else case.image_czyx[:1])])
        box = _box([planes[name] for name in labels], image.shape[1:])
        cut = tuple(slice(low, high) for low, high in box)
        return cls(
            image_csrk=image[:, cut[0], cut[1], cut[2]],
            planes={name: array[cut] for name, array in planes.items()},
            spacing_mm=view.spacing_mm,
            first_slice=box[0][0],
            whole=all(high - low == size for (low, high), size in zip(box[1:], image.shape[2:], strict=True)),
            header={
                "plane": view.plane,
                "axis": "ZYX"[view.axes[0]],
                "letters": view.letters,
                "file_slices": image.shape[1],
                "channel": "" if colour else case.channel,
                "channels": len(case.image_czyx),
            },
        )

    def pixels(self, rung: tuple[int, int, int]) -> int:
        """Return how many pixels a rung of the ladder gives."""
        rows, cols = self._size(rung[0])
        return rows * cols * min(self.image_csrk.shape[1], rung[1])

    def encode(self, rung: tuple[int, int, int]) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Encode at one rung of the ladder: header and parts."""
        longest, most, quality = rung
        count = self.image_csrk.shape[1]
        step = math.ceil(count / most)
        chosen = list(range((count - 1) % step // 2, count, step))
        rows, cols = self._size(longest)
        window = _window(self.image_csrk[:, chosen])
        row_index = nearest(self.image_csrk.shape[2], rows)
        col_index = nearest(self.image_csrk.shape[3], cols)
        maps = b"".join(
            np.ascontiguousarray(self.planes[name][chosen][:, row_index][:, :, col_index]).tobytes()
            for name in PLANES
            if name in self.planes
        )
        image, across = _mosaic(self.image_csrk[:, chosen], window, (rows, cols), quality)
        header = {
            **self.header,
            "slices": [self.first_slice + n for n in chosen],
            "step": step,
            "size": [rows, cols],
            "across": across,
            # How large a pixel is, row and column: after shrinking, so that the page need not know of it.
            "pixel_mm": [
                self.spacing_mm[1] * self.image_csrk.shape[2] / rows,
                self.spacing_mm[2] * self.image_csrk.shape[3] / cols,
            ],
            "shrunk": [rows, cols] != list(self.image_csrk.shape[2:]),
            "whole": self.whole,
            "planes": [name for name in PLANES if name in self.planes],
        }
        return header, {"image": image, "maps": maps}

    def _size(self, longest: int) -> tuple[int, int]:
        rows, cols = self.image_csrk.shape[2:]
        scale = min(1.0, longest / max(rows, cols))
        return max(1, round(rows * scale)), max(1, round(cols * scale))


def _box(labels: Sequence[np.ndarray], shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return where slices, rows and columns with labels begin and end, with a margin; all where there are none."""
    box = []
    for axis, size in enumerate(shape):
        others = tuple(a for a in range(3) if a != axis)
        seen = np.zeros(size, bool)
        for array in labels:
            seen |= ((array > 0) & (array != IGNORED)).any(axis=others)
        found = np.flatnonzero(seen)
        if not found.size:
            return [(0, n) for n in shape]
        low, high = int(found[0]), int(found[-1]) + 1
        margin = _SLICE_MARGIN if axis == 0 else max(_LEAST_MARGIN, round(_MARGIN * (high - low)))
        box.append((max(0, low - margin), min(size, high + margin)))
    return box


def _window(image_csrk: np.ndarray) -> tuple[float, float]:
    """Return the grey values that are shown as black and white; pictures of 8 bit keep theirs."""
    if image_csrk.shape[0] == 3 and image_csrk.min() >= 0 and image_csrk.max() <= 255:
        return 0.0, 255.0
    low, high = np.percentile(image_csrk, (0.5, 99.5))
    return float(low), float(high if high > low else low + 1.0)


def _mosaic(
    image_csrk: np.ndarray, window: tuple[float, float], size: tuple[int, int], quality: int
) -> tuple[bytes, int]:
    """Lay slices side by side in one WebP picture; return it with the number of slices in a row of it."""
    from PIL import Image

    rows, cols = size
    low, high = window
    count = image_csrk.shape[1]
    across = math.ceil(math.sqrt(count * rows / cols))
    across = max(1, min(across, count, 16383 // cols))
    colour = image_csrk.shape[0] == 3
    mosaic = Image.new("RGB" if colour else "L", (across * cols, math.ceil(count / across) * rows))
    for n in range(count):
        grey = np.clip((image_csrk[:, n].astype(np.float32) - low) * (255.0 / (high - low)), 0, 255)
        array = np.ascontiguousarray(np.moveaxis(np.rint(grey).astype(np.uint8), 0, -1))
        tile = Image.fromarray(array if colour else array[..., 0])
        if tile.size != (cols, rows):
            tile = tile.resize((cols, rows), Image.Resampling.BOX)
        mosaic.paste(tile, ((n % across) * cols, (n // across) * rows))
    buffer = io.BytesIO()
    mosaic.save(buffer, format="WEBP", quality=quality, method=4)
    return buffer.getvalue(), across
