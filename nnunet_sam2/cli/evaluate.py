"""``nnunet_sam2 evaluate``: predictions against reference labels."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import COHORT_FILE, IGNORE, Cohort
from nnunet_sam2.cohort.declared import DATASET_FILE, is_declared
from nnunet_sam2.cohort.labels import BACKGROUND, LabelValue, make_label_table, parse_labels, single_values
from nnunet_sam2.errors import InputError
from nnunet_sam2.progress import say
from nnunet_sam2.storage import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("-g", dest="reference", type=Path, required=True, metavar="GT", help="reference folder or file")
    parser.add_argument("-p", dest="prediction", type=Path, required=True, metavar="PRED", help="prediction, likewise")
    parser.add_argument(
        "-l", dest="values", type=int, nargs="+", metavar="V", help="label values (default: see --labels)"
    )
    parser.add_argument(
        "--labels",
        metavar="TABLE",
        help="label table as for convert (default: dataset.json beside GT or PRED, else the values found)",
    )
    parser.add_argument(
        "--annotated",
        type=Path,
        metavar="FILE",
        help="list of the classes that are annotated in each reference, as for convert; the others count nowhere in it "
        "(default: labels.json beside the references, else the cohort.json of their dataset)",
    )
    parser.add_argument("--ignore", type=int, metavar="V", help="reference value that is left out of the comparison")
    parser.add_argument(
        "--nsd-tolerance", type=float, default=1.0, metavar="MM", help="surface tolerance (default: 1 mm)"
    )
    parser.add_argument("--allow-missing", action="store_true", help="leave out references without a prediction")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the JSON to this file as well")


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Hold which classes are compared, what they are called, and what the files may hold."""

    classes: dict[str, tuple[int, ...]]
    names: dict[str, str] = field(default_factory=dict)
    ignore: int | None = None
    declared: frozenset[int] | None = None
    labels: Mapping[str, LabelValue] | None = None
    """The declared table, where there is one."""


def run(args: argparse.Namespace) -> int:
    """Compare, and print a table or JSON."""
    from nnunet_sam2.evaluation import evaluate

    for path in (args.reference, args.prediction):
        if not path.exists():
            raise InputError(f"{path} does not exist")
    table = _table(args)
    names = _names(args, table)
    annotated, said_by = _annotated(args, table)
    result = evaluate(
        args.reference,
        args.prediction,
        class_values=table.classes,
        nsd_tolerance_mm=args.nsd_tolerance,
        ignore_value=table.ignore if args.ignore is None else args.ignore,
        declared_values=table.declared,
        allow_missing=args.allow_missing,
        annotated=annotated,
        names=names,
    )
    result["class_names"] = table.names
    if annotated:
        result["annotated"] = {"file": str(said_by), "values": {name: list(v) for name, v in annotated.items()}}
    if args.output:
        write_json(args.output, result)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        if renamed := result.get("renamed"):
            first = next(iter(renamed))
            say(
                f"note: {len(renamed)} files were mapped by the names in their label tables ({first}: {renamed[first]})"
            )
        if annotated:
            say(f"{said_by} says which classes are annotated: the others count nowhere")
        _print_table(result)
    return 0


def _table(args: argparse.Namespace) -> _Table:
    """Find the classes: in a table, in a dataset.json near the folders, else in the files; ``-l`` chooses by value."""
    near = None if args.labels else _dataset_json(args.reference, args.prediction)
    if args.labels or near:
        table = _declared_table(parse_labels(args.labels or str(near))[0])
    else:
        found = args.values or _values_found(args.reference, args.prediction)
        table = _Table(classes={str(v): (v,) for v in sorted(set(found))})
    if args.values:
        table = dataclasses.replace(table, classes={str(v): (v,) for v in sorted(set(args.values))})
    return table


def _names(args: argparse.Namespace, table: _Table) -> dict[str, int] | None:
    """Return which value each name means: as declared, or as the files' own label tables agree; None without any."""
    from nnunet_sam2.evaluation import match_files
    from nnunet_sam2.files.label_tables import read_label_table, tables_agree

    if table.labels is not None:
        return single_values(table.labels)
    pairs = match_files(args.reference, args.prediction, allow_missing=True)
    tables = {path: found for pair in pairs.values() for path in pair if (found := read_label_table(path))}
    return tables_agree(tables) if tables else None


def _declared_table(declared: Mapping[str, LabelValue]) -> _Table:
    regions = any(isinstance(value, list) and len(value) > 1 for value in declared.values())
    regions_of = [value for name, value in declared.items() if name not in (BACKGROUND, IGNORE)]
    order = [value[0] if isinstance(value, list) and value else 0 for value in regions_of]
    # The table's own checks matter, its renumbering does not: the files hold the values as they are declared.
    make_label_table(declared, order if regions else None)
    classes: dict[str, tuple[int, ...]] = {}
    names: dict[str, str] = {}
    ignore = None
    values_declared: set[int] = set()
    for name, value in declared.items():
        values = tuple(sorted(set(value if isinstance(value, list) else [value])))
        values_declared.update(values)
        if name == IGNORE:
            ignore = values[0]
        elif name != BACKGROUND:
            key = "+".join(str(v) for v in values)
            classes[key], names[key] = values, name
    return _Table(classes=classes, names=names, ignore=ignore, declared=frozenset(values_declared), labels=declared)


def _annotated(args: argparse.Namespace, table: _Table) -> tuple[dict[str, tuple[int, ...]], Path | None]:
    """Return the annotated values of the references that are not annotated with all classes, and what says so."""
    from nnunet_sam2.cohort.annotated import LIST_NAME, OTHERS, known_values, read_list
    from nnunet_sam2.evaluation import match_files
    from nnunet_sam2.files.checks import strip_ending

    folder = args.reference if args.reference.is_dir() else args.reference.parent
    path, cohort = args.annotated, folder.resolve().parent / COHORT_FILE
    if path is None and not (folder / LIST_NAME).is_file() and cohort.is_file():
        cases = Cohort.load(cohort.parent).cases
        found = {case.case_id: case.annotated for case in cases if case.annotated is not None}
        return found, cohort
    path = path or folder / LIST_NAME
    if args.annotated is None and not path.is_file():
        return {}, None
    listed = read_list(path)
    labels = table.labels or {name: list(values) for name, values in table.classes.items()}
    pairs = match_files(args.reference, args.prediction, allow_missing=True)
    names = sorted(strip_ending(reference) for reference, _ in pairs.values())
    if not set(names) & set(listed.entries) and OTHERS not in listed.entries:
        raise InputError(f"{path} names none of the references ({names[0]}, ...); correct the names in it")
    found = {
        name: tuple(sorted(known_values(entry, labels, where=str(path))))
        for name in names
        if (entry := listed.of(name)) is not None
    }
    return found, path


def _dataset_json(reference: Path, prediction: Path) -> Path | None:
    folders = [path if path.is_dir() else path.parent for path in (reference, prediction)]
    for folder in (folders[0], folders[0].resolve().parent, folders[1], folders[1].resolve().parent):
        if is_declared(folder / DATASET_FILE):
            return folder / DATASET_FILE
    return None


def _values_found(reference: Path, prediction: Path) -> list[int]:
    import numpy as np

    from nnunet_sam2.evaluation import match_files
    from nnunet_sam2.volumes import read_label

    found: set[int] = set()
    for pair in match_files(reference, prediction, allow_missing=True).values():
        for path in pair:
            found.update(np.unique(read_label(path)[0]).tolist())
    found.discard(0)
    if not found:
        raise InputError(f"{reference} and {prediction} hold no foreground; name the classes with -l")
    return sorted(found)


def _print_table(result: dict[str, Any]) -> None:
    def cells(entry: dict[str, float | None]) -> str:
        shown = ("-" if entry[m] is None else f"{entry[m]:.{d}f}" for m, d in _COLUMNS)
        return "".join(f"{cell:>10}" for cell in shown)

    names = result["class_names"]
    titles = {key: f"{key} {names[key]}" if key in names else key for key in result["classes"]}
    width = max(len(text) for text in ("class / case", *titles.values(), *result["cases"]))
    say(f"{'class / case':<{width}}{'Dice':>10}{'HD95 mm':>10}{'HD mm':>10}{'NSD':>10}")
    for key, entry in result["classes"].items():
        say(f"{titles[key]:<{width}}{cells(entry)}")
    for case_id, entry in result["cases"].items():
        say(f"{case_id:<{width}}{cells(entry)}")
    say(f"{'mean':<{width}}{cells(result['mean'])}")


_COLUMNS = (("dice", 4), ("hd95", 2), ("hd", 2), ("nsd", 4))
