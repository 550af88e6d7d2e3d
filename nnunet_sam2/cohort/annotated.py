"""Partly labelled cohorts: which classes were annotated in which case, read from a list and held against the labels.

The list is JSON, case id to class names or values; ``*`` stands for the cases that it does not name. What a case's
label was not annotated for is unknown there, not background.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.checks import CheckedCase
from nnunet_sam2.cohort.cohort import IGNORE
from nnunet_sam2.cohort.labels import BACKGROUND, LabelTable, LabelValue
from nnunet_sam2.cohort.layouts import SourceCase
from nnunet_sam2.errors import InputError
from nnunet_sam2.storage import read_json

LIST_NAME = "labels.json"
"""Name of the list where it lies beside the label files."""

OTHERS = "*"
"""Key of the list for the cases that it does not name; without it these are annotated with all classes."""

OPTION = "--annotated FILE"


@dataclass(frozen=True, kw_only=True)
class AnnotatedList:
    """Hold one list as it was read."""

    path: Path
    entries: Mapping[str, Sequence[str | int]]

    def of(self, case_id: str) -> Sequence[str | int] | None:
        """Return what was annotated in a case, as the list says it; None for all classes."""
        return self.entries.get(case_id, self.entries.get(OTHERS))


def read_list(path: Path, case_ids: Collection[str] | None = None) -> AnnotatedList:
    """Read a list; raise `InputError` where it is none, or names a case that is not among ``case_ids``, if given."""
    value = read_json(path)
    example = f'{path} is no list of annotated classes; it looks like {{"case_01": ["liver"], "case_02": ["spleen"]}}'
    if not isinstance(value, dict) or not value:
        raise InputError(example)
    for case_id, names in value.items():
        if not isinstance(names, list) or any(isinstance(n, bool) or not isinstance(n, (str, int)) for n in names):
            raise InputError(f"{example}, got {case_id!r}: {names!r}")
        if not names:
            raise InputError(f"{path}: no class of {case_id} is annotated; remove its label file to make it unlabelled")
        if case_ids is not None and case_id not in {OTHERS, *case_ids}:
            raise InputError(f"{path} names case {case_id}, which the source does not have; {_near(case_id, case_ids)}")
    return AnnotatedList(path=path, entries=value)


def find_lists(
    given: Path | None, cases: Mapping[str, SourceCase], tell: Callable[[str], None]
) -> dict[Path, AnnotatedList]:
    """Return the list for each folder of label files: ``given`` for all of them, or the `LIST_NAME` that lies there."""
    found: dict[Path, AnnotatedList] = {}
    folders = sorted({path.parent for case in cases.values() for path in _label_files(case)})
    if given is not None:
        found = dict.fromkeys(folders, read_list(given, cases))
    for folder in folders if given is None else ():
        if (folder / LIST_NAME).is_file():
            found[folder] = read_list(folder / LIST_NAME, cases)
            tell(f"{folder / LIST_NAME} says which classes are annotated in which case")
    for path, entries in {one.path: one.entries for one in found.values()}.items():
        bare = [case_id for case_id in entries if case_id in cases and not _label_files(cases[case_id])]
        if bare:
            tell(f"note: {path} names {bare[0]}{_more(bare)}, which have no label file")
    return found


def annotated_values(
    checked: Sequence[CheckedCase], table: LabelTable, lists: Mapping[Path, AnnotatedList]
) -> dict[str, tuple[int, ...]]:
    """Return the dataset's values of the annotated classes, for the cases that are not annotated with all.

    Raises `InputError` for an unknown class, and for a label map that holds a class which its list leaves out.
    """
    every = {v for name, value in table.labels.items() if name not in (BACKGROUND, IGNORE) for v in _values(value)}
    found: dict[str, tuple[int, ...]] = {}
    for case in checked:
        files = _label_files(case.source)
        listed = lists[files[0].parent] if files and files[0].parent in lists else None
        names = listed.of(case.case_id) if listed else None
        if listed is None or names is None:
            continue
        annotated = known_values(names, table.labels, where=str(listed.path), source_values=table.source_values)
        if annotated >= every:
            continue
        held = {table.source_values[v] for v in case.label_values if v in table.source_values} & every
        if stray := sorted(held - annotated):
            raise InputError(
                f"{case.label_file} holds {_named(stray, table.labels)}, which {listed.path} leaves out for case "
                f"{case.case_id}; add it to the list, or take it out of the label"
            )
        found[case.case_id] = tuple(sorted(annotated))
    return found


def known_values(
    names: Iterable[str | int],
    labels: Mapping[str, LabelValue],
    *,
    where: str,
    source_values: Mapping[int, int] | None = None,
) -> set[int]:
    """Return the label values that class names or values stand for.

    Values are those of the files (``source_values`` maps them to the dataset's). Raises `InputError` for a name or
    value that is no class, and where a region that is left out follows from those that are named.
    """
    classes = {name: set(_values(value)) for name, value in labels.items() if name not in (BACKGROUND, IGNORE)}
    every = set().union(*classes.values())
    chosen: set[int] = set()
    whole: set[str] = set()
    for name in names:
        if name in (BACKGROUND, IGNORE, 0):
            continue
        if isinstance(name, str) and name in classes:
            chosen |= classes[name]
            whole.add(name)
            continue
        value = int(name) if isinstance(name, int) or name.isdecimal() else None
        value = value if source_values is None or value is None else source_values.get(value)
        if value is None or value not in every:
            raise InputError(f"{where} names class {name}, which the label table does not have; {_near(name, classes)}")
        chosen.add(value)
    for name, values in classes.items():
        # Of a region alone nobody knows which of its voxels belong to the region inside.
        if whole and name not in whole and values <= chosen and any(values < classes[other] for other in whole):
            raise InputError(
                f"{where} names {', '.join(sorted(whole))} without {name}, whose voxels lie inside; a label map cannot "
                f"say one and leave the other open: name both, or mark what is unknown with nnU-Net's ignore label"
            )
    return chosen


def suspect_gaps(checked: Sequence[CheckedCase], labelled: Collection[str], table: LabelTable) -> str | None:
    """Say in a line that labelled cases show no voxel of a class that others show; None where all show all."""
    shown = {
        case.case_id: {table.source_values[v] for v in case.label_values if v in table.source_values}
        for case in checked
        if case.case_id in labelled
    }
    seen = set().union(*shown.values())
    lacking: dict[str, list[str]] = {}
    for name, value in table.labels.items():
        values = set(_values(value))
        without = [case_id for case_id, own in shown.items() if not values & own]
        if name not in (BACKGROUND, IGNORE) and values & seen and without:
            lacking[name] = without
    if not lacking:
        return None
    name, without = next(iter(lacking.items()))
    others = f" (other cases lack {', '.join(list(lacking)[1:4])})" if len(lacking) > 1 else ""
    return (
        f"labelled case {without[0]}{_more(without)} shows no {name}, others do{others}: it counts as absent "
        f"there; if it was not annotated, name what was with {OPTION}"
    )


def _label_files(case: SourceCase) -> list[Path]:
    return [path for path in (case.label, case.hidden_label) if path is not None]


def _values(value: LabelValue) -> list[int]:
    return value if isinstance(value, list) else [value]


def _named(values: Collection[int], labels: Mapping[str, LabelValue]) -> str:
    names = [name for name, value in labels.items() if set(_values(value)) & set(values)]
    return ", ".join(names)


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _near(name: Any, known: Iterable[str]) -> str:
    listed = sorted(known)
    near = get_close_matches(str(name), listed, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(listed[:10])}"
