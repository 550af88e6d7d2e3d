"""What a layout finds in a source folder, and the sorting of files into cases that layouts share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nnunet_sam2.cohort.labels import LabelValue
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.checks import is_image_file, readable, strip_ending


@dataclass(frozen=True, kw_only=True)
class SourceCase:
    """Name one case's files; nothing has been read yet."""

    case_id: str
    images: tuple[Path, ...]
    """One file a channel, in channel order; one RGB picture; or one 4D file with ``split_fourth_axis``."""
    label: Path | None
    hidden_label: Path | None = None
    """Truth of an unlabelled case that only evaluation may read."""
    test: bool = False
    split_fourth_axis: bool = False


@dataclass(frozen=True, kw_only=True)
class Hints:
    """Hold what is known of a folder's names before it is looked into; see `file_names.cases_of_files`."""

    suffix: str = "auto"
    """What the user says that four digits at the end of a name mean."""
    counts: tuple[int, ...] | None = None
    """Numbers of files that a case may have."""
    others: tuple[tuple[str, str], ...] = ()
    """Case and stem of images of the same set that are sorted already."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Hold what a layout found."""

    layout: str
    cases: tuple[SourceCase, ...]
    channels: tuple[str, ...] | None = None
    """Channel names that the layout knows; None leaves them to the user or the default."""
    labels: Mapping[str, LabelValue] | None = None
    regions_class_order: tuple[int, ...] | None = None


def image_files(folder: Path) -> dict[str, Path]:
    """Map each image file's stem to its path; refuse two files with one stem and stems that differ in case alone."""
    found: dict[str, Path] = {}
    folded: dict[str, Path] = {}
    with readable(folder):
        listed = sorted(folder.iterdir())
    for path in listed:
        if not is_image_file(path):
            continue
        # macOS spells an accent as a letter of its own: one name to the eye, two to a computer.
        stem = unicodedata.normalize("NFC", strip_ending(path))
        if stem.lower() in folded:
            raise InputError(
                f"{folded[stem.lower()]} and {path.name} both name case {stem}; keep one, or rename the other"
            )
        folded[stem.lower()] = path
        found[stem] = path
    return found


def match_labels(case_ids: Iterable[str], labels: Mapping[str, Path], where: Path) -> dict[str, Path]:
    """Give each case its label file; refuse a label file that belongs to no image."""
    ids = set(case_ids)
    stray = sorted(set(labels) - ids)
    if stray:
        hint = ""
        if re.fullmatch(r".+_0000", stray[0]) and stray[0][:-5] in ids:
            hint = "; label files carry no channel suffix, drop the _0000"
        other = next((i for i in sorted(ids) if re.fullmatch(re.escape(stray[0]) + r"[^_\w]?\d{4}", i)), None)
        if other is not None:
            hint = f"; there is {other}: a channel wants _0000 at the end of its name, as in {stray[0]}_0000"
        raise InputError(f"{labels[stray[0]]} has no image of the same name in {where}{hint or '; add or remove one'}")
    return {case_id: labels[case_id] for case_id in sorted(ids & set(labels))}
