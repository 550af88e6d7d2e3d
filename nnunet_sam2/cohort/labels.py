"""The label table: names and values as a user declares them, and as nnU-Net wants them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.cohort.cohort import IGNORE
from nnunet_sam2.cohort.declared import read_declared
from nnunet_sam2.errors import InputError

BACKGROUND = "background"
LabelValue = int | list[int]
_MOST_DIGITS, _MOST_SHOWN = 9, 60


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """Hold nnU-Net's label table and how the values in the source's files become its values."""

    labels: dict[str, LabelValue]
    """Name to value, or to the values of a region; consecutive from 0, the ignore label highest."""
    regions_class_order: tuple[int, ...] | None = None
    source_values: dict[int, int]
    """Value in the source's files to value in the dataset; the identity unless the source has gaps."""

    @property
    def changes_values(self) -> bool:
        """Say whether label files have to be rewritten."""
        return any(a != b for a, b in self.source_values.items())

    @property
    def names(self) -> dict[str, int]:
        """Return the value in the source's files of each label that has one value, by name."""
        stored = {target: source for source, target in self.source_values.items()}
        return {name: stored[value] for name, value in self.labels.items() if isinstance(value, int)}

    def translate(self, label_zyx: np.ndarray) -> np.ndarray:
        """Replace the source's values by the dataset's; all values must have been checked before."""
        if not self.changes_values:
            return label_zyx
        lookup = np.zeros(max(self.source_values) + 1, np.uint16)
        for source, target in self.source_values.items():
            lookup[source] = target
        translated = lookup[label_zyx]
        return translated.astype(np.uint8) if translated.max() <= np.iinfo(np.uint8).max else translated


def single_values(labels: Mapping[str, LabelValue]) -> dict[str, int]:
    """Return the value of each label that has one value, by name; what a file's own label table is held against."""
    values = {name: value if isinstance(value, list) else [value] for name, value in labels.items()}
    return {name: value[0] for name, value in values.items() if len(value) == 1}


def make_label_table(
    declared: Mapping[str, LabelValue], regions_class_order: Iterable[int] | None = None
) -> LabelTable:
    """Check a declared table and make it one that nnU-Net takes.

    A missing background is added. Values with gaps (0 and 255; regions on 1, 2 and 4) are renumbered in ascending
    order, ``regions_class_order`` with them; the ignore label comes last, wherever it was. Raises `InputError` for
    anything that nnU-Net would refuse.
    """
    table: dict[str, LabelValue] = {BACKGROUND: 0}
    for name, value in declared.items():
        if name.lower() == BACKGROUND:
            if value != 0:
                raise InputError(f"label background has value {value}; nnU-Net's background is 0")
            continue
        _check_name(name)
        values = value if isinstance(value, list) else [value]
        if not values or any(isinstance(v, bool) or not isinstance(v, int) or not 0 < v <= 65535 for v in values):
            raise InputError(f"label {name} has value {_shown(value)}; values are whole numbers from 1 to 65535")
        table[name] = sorted(set(values)) if isinstance(value, list) and len(set(values)) > 1 else values[0]
    if len(table) == 1:
        raise InputError("the label table has no class beside the background; declare one with --labels NAME=1")
    if isinstance(table.get(IGNORE), list):
        raise InputError("the ignore label is a single value, the highest, not a region")
    regions = any(isinstance(value, list) for value in table.values())
    return _with_regions(table, regions_class_order) if regions else _plain(table, regions_class_order)


def _check_name(name: str) -> None:
    """Refuse a name that no file, page or terminal shows as it is: empty, control letters, half letters, markup."""
    if not name.strip():
        raise InputError("a label has an empty name; give it one")
    if any(unicodedata.category(letter) in ("Cc", "Cs") or letter in "<>&" for letter in name):
        raise InputError(
            f"label {_shown(ascii(name))}: a name is text on one line, without control letters, halves of letters, "
            "'<', '>' and '&'; rename it"
        )


def _shown(value: object) -> str:
    """Write a value so that its message stays a line."""
    text = str(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def parse_labels(text: str) -> tuple[dict[str, LabelValue], list[int] | None]:
    """Parse ``--labels``: ``NAME=VALUE,...`` (a region is ``NAME=1+2``), JSON, or a JSON file.

    JSON is a label table or a whole nnU-Net ``dataset.json``; returns the table and its ``regions_class_order``.
    """
    text = text.strip()
    if text.startswith("{"):
        try:
            return table_from_json(json.loads(text), "--labels")
        except (ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"--labels is not valid JSON ({_shown(error)})") from None
    if text.lower().endswith(".json"):
        declared = read_declared(Path(text).expanduser())
        if declared is None:
            raise InputError(f"--labels {text} does not exist")
        return table_from_json(declared, text)
    table: dict[str, LabelValue] = {}
    for part in text.split(","):
        name, separator, value = (piece.strip() for piece in part.rpartition("="))
        numbers = [number.strip() for number in value.split("+")]
        if not separator or not name or not all(_is_number(number) for number in numbers):
            raise InputError(
                f"--labels: {_shown(ascii(part.strip()))} is not NAME=VALUE; example: --labels liver=1,spleen=2"
            )
        if name in table:
            raise InputError(f"--labels names {name} twice")
        table[name] = int(numbers[0]) if len(numbers) == 1 else [int(number) for number in numbers]
    return table, None


def table_from_json(value: Any, where: str) -> tuple[dict[str, LabelValue], list[int] | None]:
    """Read a label table from JSON: name to value (nnU-Net), or value to name (Medical Segmentation Decathlon)."""
    order = None
    if isinstance(value, dict) and isinstance(value.get("labels"), dict):
        order = value.get("regions_class_order")
        value = value["labels"]
    if not isinstance(value, dict) or not value:
        raise InputError(f'{where} holds no label table; it looks like {{"background": 0, "liver": 1}}')
    table: dict[str, LabelValue] = {}
    try:
        for key, entry in value.items():
            name, number = (entry, key) if isinstance(entry, str) and _is_number(str(key)) else (key, entry)
            if name in table:
                raise InputError(f"{where} names {name} twice")
            table[name] = [_whole(n) for n in number] if isinstance(number, (list, tuple)) else _whole(number)
        return table, (None if order is None else [_whole(n) for n in order])
    except InputError:
        raise
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{where}: the label table must hold whole numbers, got {_shown(ascii(key))}: {_shown(ascii(entry))}"
        ) from None


def _is_number(text: str) -> bool:
    """Say whether a text is a value as it may be typed: a few digits, no other script's and no superscripts."""
    return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError(value)
    number = int(value)
    if isinstance(value, float) and number != value:
        raise ValueError(value)
    return number


def table_from_values(file_of: Mapping[int, Path]) -> LabelTable:
    """Make a table for files without a declared one: ``class_1`` and so on; values must be consecutive from 1.

    ``file_of`` maps each value that was found to a file that holds it.
    """
    found = sorted(set(file_of) - {0})
    if not found:
        raise InputError("no label file holds any foreground; declare the classes with --labels NAME=VALUE,...")
    if found != list(range(1, len(found) + 1)):
        shown = ", ".join(str(v) for v in found[:8]) + (", ..." if len(found) > 8 else "")
        example = ",".join(f"name{i + 1}={v}" for i, v in enumerate(found[:3]))
        raise InputError(
            f"the label files hold the values {shown} (the last in {file_of[found[-1]]}), not 1 to {len(found)}, and "
            f"no table declares them; declare what they mean, and they will be renumbered: --labels {example}"
        )
    return make_label_table({f"class_{value}": value for value in found})


def _plain(table: dict[str, LabelValue], order: Iterable[int] | None) -> LabelTable:
    if order is not None:
        raise InputError("regions_class_order is given, but no label is a region; leave it out")
    values = [value for value in table.values() if isinstance(value, int)]
    if len(set(values)) != len(values):
        twice = next(v for v in values if values.count(v) > 1)
        names = [name for name, value in table.items() if value == twice]
        raise InputError(f"labels {' and '.join(names)} share the value {twice}; give each its own")
    source_values = _ranks(values, table)
    labels: dict[str, LabelValue] = {
        name: source_values[value] for name, value in table.items() if isinstance(value, int)
    }
    return LabelTable(labels=labels, source_values=source_values)


def _with_regions(table: dict[str, LabelValue], order: Iterable[int] | None) -> LabelTable:
    values: set[int] = set()
    for value in table.values():
        values.update(value if isinstance(value, list) else [value])
    ranks = _ranks(values, table)
    regions = [name for name in table if name not in (BACKGROUND, IGNORE)]
    class_order = tuple(order) if order is not None else ()
    if len(class_order) != len(regions):
        raise InputError(
            f"the labels {', '.join(regions)} have regions and need --regions-class-order with {len(regions)} values: "
            "the label that each region leaves when the regions are painted over each other in this order"
        )
    stray = set(class_order) - values
    if stray:
        raise InputError(f"regions_class_order names {sorted(stray)}, which no region holds")
    others = [v for name, v in table.items() if name != IGNORE]
    if (ignore := table.get(IGNORE)) is not None and any(ignore in (v if isinstance(v, list) else [v]) for v in others):
        raise InputError(f"the ignore label has the value {ignore} of another label; give it its own")
    labels: dict[str, LabelValue] = {
        name: sorted(ranks[v] for v in value) if isinstance(value, list) else ranks[value]
        for name, value in table.items()
    }
    return LabelTable(labels=labels, regions_class_order=tuple(ranks[v] for v in class_order), source_values=ranks)


def _ranks(values: Iterable[int], table: Mapping[str, LabelValue]) -> dict[int, int]:
    """Number values from 0 in ascending order, the ignore label's after all others, as nnU-Net wants it."""
    ignore = table.get(IGNORE)
    return {value: rank for rank, value in enumerate(sorted(set(values), key=lambda v: (v == ignore, v)))}
