"""Label tables that lie in or beside a label file: which value means which name there, whatever the file is called.

Read are the segments of 3D Slicer (NRRD; MetaImage where a program copied them), the label tables of Connectome
Workbench and AFNI and plain ones in NIfTI extensions, and ITK-SNAP's label descriptions in the file's folder.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Set
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from nnunet_sam2.errors import InputError
from nnunet_sam2.files.gzipped import open_stream
from nnunet_sam2.files.table_text import BrokenTableError, Segment, itksnap_segments, text_segments

SEGMENT_ENDING = ".seg.nrrd"
LONGEST_HEADER = 1 << 22
"""Bytes of a text header or of NIfTI extensions; a hundred segments with their terminology take 64 kB."""

_SEGMENT = re.compile(r"(Segment\d+)_(Name|LabelValue|Layer)\s*(?::=|=)\s*(.*?)\s*")
_SEGMENT_OTHER = re.compile(r"Segment\d+")
_BACKGROUND = {"background", "clearlabel", "unknown", "???"}


def read_label_table(path: Path) -> tuple[Segment, ...]:
    """Return the table that a checked label file carries, or else the one beside it; nothing where there is none.

    Raises `InputError` for a table that gives one value two names, and for two descriptions that differ.
    """
    name = path.name.lower()
    found: tuple[Segment, ...] = ()
    try:
        if name.endswith((".nrrd", ".mha")):
            found = _segments(path)
        elif name.endswith((".nii", ".nii.gz")):
            found = _from_extensions(path)
    except BrokenTableError as error:
        raise InputError(f"{path} has a damaged label table: {error}; save it again, or without a table") from None
    except (EOFError, OSError, zlib.error):
        return ()  # damaged: whoever reads the voxels says so
    found = found or _beside(path)
    named: dict[tuple[int, int], str] = {}
    for segment in found:
        other = named.setdefault((segment.layer, segment.value), segment.name)
        if key_of(other) != key_of(segment.name):
            raise InputError(
                f"{path}: its label table calls the value {segment.value} both {other} and {segment.name}; correct it"
            )
    return found


def key_of(name: str) -> str:
    """Return a name without what programs change in it: case, blanks, and what they put in the place of blanks."""
    return re.sub(r"[\s_\-\"']+", "", name).casefold()


def by_names(
    path: Path, layers_czyx: np.ndarray, segments: Iterable[Segment], declared: Mapping[str, int]
) -> tuple[np.ndarray, str | None, int]:
    """Give each segment of a label file the value that is declared for its name.

    Returns the label map (1, Z, Y, X), what was changed in words (None where every voxel keeps its value), and how many
    voxels were. Raises `InputError` for segments with voxels whose names are not declared, values that no segment
    names, and layers that overlap in two values.
    """
    if layers_czyx.dtype.kind not in "iu":
        layers_czyx = _whole(path, layers_czyx)
    values = _values_by_key(path, declared)
    merged = np.zeros(layers_czyx.shape[1:], np.int64)
    strangers: list[str] = []
    changes: list[str] = []
    moved = 0
    segments = tuple(segments)
    for layer, layer_zyx in enumerate(layers_czyx):
        name_of = {segment.value: segment.name for segment in segments if segment.layer == layer}
        for value in np.unique(layer_zyx[layer_zyx != 0]).tolist():
            if value not in name_of:
                raise InputError(
                    f"{path} holds the value {value}, which its label table does not name (it names "
                    f"{_listed(segments)}); name it there, or save a label map without a table"
                )
            name = name_of[value]
            target = values.get(key_of(name))
            if target is None:
                strangers.append(name)
                continue
            inside = layer_zyx == value
            taken = inside & (merged != 0) & (merged != target)
            if target and taken.any():
                raise InputError(
                    f"{path}: segment {name} overlaps another one in {int(np.count_nonzero(taken))} voxels, a label "
                    "map has one value a voxel; make them apart (3D Slicer: Masking, Modify other segments: overwrite "
                    "all)"
                )
            if target:
                merged[inside] = target
            if target != value:
                changes.append(f"{name} {value} -> {target}")
                moved += int(np.count_nonzero(inside))
    if strangers:
        raise InputError(
            f"{path} holds {', '.join(sorted(set(strangers)))} by its label table, declared are "
            f"{', '.join(declared)}; declare these names (convert: --labels NAME=VALUE,...) or rename the segments"
        )
    if len(layers_czyx) > 1:
        changes.insert(0, f"{len(layers_czyx)} layers merged")
        moved = moved or int(np.count_nonzero(merged))
    return merged[None], ", ".join(changes) or None, moved


def tables_agree(tables: Mapping[Path, tuple[Segment, ...]]) -> dict[str, int]:
    """Make one declared table of the tables of many files; raise `InputError` where they contradict each other."""
    found: dict[str, tuple[str, int, Path]] = {}
    of_value: dict[int, tuple[str, Path]] = {}
    for path, segments in tables.items():
        for segment in segments:
            key = key_of(segment.name)
            if not segment.value or key in _BACKGROUND:
                continue
            name, value, first = found.setdefault(key, (segment.name, segment.value, path))
            other, second = of_value.setdefault(segment.value, (segment.name, path))
            if value != segment.value or key_of(other) != key:
                there = f"{name}={value}" if value != segment.value else f"{other}={segment.value}"
                raise InputError(
                    f"{path} names {segment.name}={segment.value}, {first if value != segment.value else second} names "
                    f"{there}; say which values are meant, and every file is mapped to them by its names: "
                    f"--labels {_example(tables)}"
                )
    return {name: value for name, value, _ in sorted(found.values(), key=lambda entry: entry[1])}


def _example(tables: Mapping[Path, tuple[Segment, ...]]) -> str:
    names = dict.fromkeys(s.name for segments in tables.values() for s in segments if key_of(s.name) not in _BACKGROUND)
    return ",".join(f"{name}={rank}" for rank, name in enumerate(names, 1))


def _values_by_key(path: Path, declared: Mapping[str, int]) -> dict[str, int]:
    values = dict.fromkeys(_BACKGROUND, 0)
    names: dict[str, str] = {}
    for name, value in declared.items():
        if (other := names.setdefault(key_of(name), name)) != name and declared[other] != value:
            raise InputError(f"{path} names its labels, and the declared {other} and {name} are one name there")
        values[key_of(name)] = value
    return values


def _listed(segments: Iterable[Segment]) -> str:
    return ", ".join(f"{segment.name}={segment.value}" for segment in segments)


def _whole(path: Path, array: np.ndarray) -> np.ndarray:
    rounded = np.rint(array)
    if not np.isfinite(array).all() or np.abs(array - rounded).max() > 1e-3:
        raise InputError(f"{path} names its labels, but holds values that are not whole numbers; export whole numbers")
    return rounded.astype(np.int64)


def _segments(path: Path) -> tuple[Segment, ...]:
    fields: dict[str, dict[str, str]] = {}
    for line in header_lines(path):
        if match := _SEGMENT.fullmatch(line):
            told = fields.setdefault(match[1], {})
            if match[2] in told:
                raise BrokenTableError(f"{match[1]}_{match[2]} is there twice")
            told[match[2]] = match[3].replace("\\n", " ")
        elif match := _SEGMENT_OTHER.match(line):
            fields.setdefault(match[0], {})
    # Slicer before 4.11 wrote one binary layer a segment and no values.
    old = not any("LabelValue" in told for told in fields.values())
    layered = any("Layer" in told for told in fields.values())
    segments = []
    for rank, (segment, told) in enumerate(fields.items(), 1):
        if "Name" not in told:
            raise BrokenTableError(f"{segment} has no name")
        if (not old and "LabelValue" not in told) or (layered and "Layer" not in told):
            raise BrokenTableError(f"{segment} lacks the value or the layer that others have")
        try:
            value = 1 if old else int(told["LabelValue"])
            layer = rank - 1 if old and "Layer" not in told else int(told.get("Layer", "0"))
        except ValueError:
            raise InputError(f"{path}: {segment} has a value or layer that is no number; save it again") from None
        segments.append(Segment(name=told["Name"], value=value, layer=layer))
    return tuple(segments)


def header_lines(path: Path) -> list[str]:
    """Return the lines of a text header, that of an NRRD or MetaImage file; raise `InputError` where it has no end."""
    return _text_header(path)[0]


def header_end(path: Path) -> int:
    """Return the byte that follows a text header."""
    return _text_header(path)[1]


def _text_header(path: Path) -> tuple[list[str], int]:
    lines: list[str] = []
    seen = 0
    with path.open("rb") as handle:
        while seen < LONGEST_HEADER:
            raw = handle.readline(LONGEST_HEADER)
            seen += len(raw)
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            if not raw or not line:
                return lines, seen
            lines += line.split("\r")
            if line.replace(" ", "").startswith("ElementDataFile="):
                return lines, seen
    raise InputError(f"{path} is named like an image but its header has no end; get the file again")


def _from_extensions(path: Path) -> tuple[Segment, ...]:
    """Read the NIfTI extensions: between header and voxels, each with its length and code before it."""
    with open_stream(path) as stream:
        head = stream.read(352)
        if len(head) < 352 or not head[348]:
            return ()
        order: Literal["little", "big"] = "little" if int.from_bytes(head[:4], "little") == 348 else "big"
        begin = int(np.frombuffer(head[108:112], "<f4" if order == "little" else ">f4")[0])
        raw = stream.read(max(0, min(begin, LONGEST_HEADER) - 352))
    found: list[Segment] = []
    position = 0
    while position + 8 <= len(raw):
        size = int.from_bytes(raw[position : position + 4], order)
        if size < 8 or position + size > len(raw):
            raise BrokenTableError(f"a header extension of {size} bytes does not end before the voxels")
        found += text_segments(raw[position + 8 : position + size].rstrip(b"\0").decode("utf-8", "replace"))
        position += size
    return tuple(found)


def _beside(path: Path) -> tuple[Segment, ...]:
    """Read ITK-SNAP's descriptions in the file's folder: one with the file's own name, else the folder's."""
    stem = path.name.split(".")[0]
    tables, others = _descriptions(path.parent, path.parent.stat().st_mtime_ns)
    own = {p: t for p, t in tables.items() if p.name.split(".")[0] == stem}
    # A description that carries another label file's name is that file's.
    chosen = own or {p: t for p, t in tables.items() if p.name.split(".")[0] not in others}
    if len({frozenset((key_of(s.name), s.value) for s in t) for t in chosen.values()}) > 1:
        raise InputError(
            f"{path}: the label descriptions {' and '.join(p.name for p in chosen)} beside it differ; keep one, or "
            "name each as its label file"
        )
    return next(iter(chosen.values()), ())


@lru_cache(maxsize=8)
def _descriptions(folder: Path, stamp_ns: int) -> tuple[Mapping[Path, tuple[Segment, ...]], Set[str]]:
    """Return a folder's label descriptions and the names that its other files begin with; once for all its labels."""
    tables: dict[Path, tuple[Segment, ...]] = {}
    for path in sorted((*folder.glob("*.txt"), *folder.glob("*.label"))):
        if not path.is_file() or path.stat().st_size > LONGEST_HEADER:
            continue
        try:
            found = itksnap_segments(path.read_bytes().decode("utf-8", "replace"))
        except BrokenTableError as error:
            raise InputError(f"{path} is a label description, but {error}; correct it, or move it away") from None
        if found:
            tables[path] = tuple(found)
    others = {p.name.split(".")[0] for p in folder.iterdir() if p.suffix.lower() not in (".txt", ".label")}
    return tables, others
