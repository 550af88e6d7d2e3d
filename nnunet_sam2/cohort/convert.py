"""Make an nnU-Net raw dataset of a source folder: check everything, then write, then rename into place."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from nnunet_sam2.cohort.annotated import AnnotatedList, annotated_values, find_lists, suspect_gaps
from nnunet_sam2.cohort.checks import CheckedCase, check_cases, check_duplicates
from nnunet_sam2.cohort.cohort import ADDED_LABELS, COHORT_FILE, CT, Cohort, Role
from nnunet_sam2.cohort.declared import DATASET_FILE
from nnunet_sam2.cohort.labels import LabelTable, LabelValue, make_label_table, table_from_values
from nnunet_sam2.cohort.layouts import Found, Hints, SourceCase, find
from nnunet_sam2.cohort.layouts.folder import TEST
from nnunet_sam2.cohort.names import checked_case_id
from nnunet_sam2.cohort.patients import EACH_ITS_OWN, patients_of
from nnunet_sam2.cohort.roles import choose_cases
from nnunet_sam2.cohort.unpacked import in_users_words, source_folder
from nnunet_sam2.cohort.write import choose_ending, write_dataset
from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.files.checks import readable, strip_ending
from nnunet_sam2.files.label_tables import Segment, read_label_table, tables_agree
from nnunet_sam2.files.repairs import STRICT, ReadPolicy
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.orientation import common_direction, orientation_note
from nnunet_sam2.progress import say
from nnunet_sam2.storage import TEMPORARY_MARK, atomic_folder, file_hash

_AIR = -900.0
"""Hounsfield units below which there is nothing but air."""

_TEST_DRAW, _LABELLED_DRAW, _UNLABELLED_DRAW = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Say how a source folder becomes a cohort."""

    layout: str = "auto"
    test: Path | None = None
    """Folder of test cases; a sub-folder ``test`` of the source is taken without being named."""
    labelled: int | None = None
    """Keep this many labels and hide the rest."""
    unlabelled: int | None = None
    """Keep at most this many unlabelled cases."""
    test_cases: int | None = None
    """Hold out this many labelled cases of the source for testing."""
    seed: int = 0
    channels: tuple[str, ...] | None = None
    labels: dict[str, LabelValue] | None = None
    annotated: Path | None = None
    """List of the classes that are annotated in each case; ``labels.json`` beside the labels needs no naming."""
    regions_class_order: tuple[int, ...] | None = None
    suffix: str = "auto"
    """What four digits at the end of an image's name mean: ``channel``, ``case``, or ``auto``."""
    patient_pattern: str | None = None
    test_as_unlabelled: bool = False
    """Use test cases that have no label as unlabelled ones."""
    allow_empty: bool = False
    """Accept labelled cases without any foreground."""
    overwrite: bool = False
    policy: ReadPolicy = STRICT
    """What is mended while reading; nothing unless asked for."""
    unpack_to: Path | None = None
    """New folder in which an archive's files stay; None removes them again."""

    def __post_init__(self) -> None:
        for name, least in (("labelled", 1), ("unlabelled", 1), ("test_cases", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} {value} is too small; it is at least {least}")
        if self.channels is not None and (not all(self.channels) or len(set(self.channels)) < len(self.channels)):
            raise InputError(f"--channels {','.join(self.channels)} has an empty or repeated name")

    def to_json(self) -> dict[str, Any]:
        """Return the options as a JSON value."""
        value = dataclasses.asdict(self)
        for name in ("test", "unpack_to", "annotated"):
            value[name] = str(value[name]) if value[name] else None
        return {key: list(entry) if isinstance(entry, tuple) else entry for key, entry in value.items()}


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Hold each case's role and patient."""

    role_of: dict[str, Role]
    patient_of: dict[str, str]
    note: str | None = None
    """How patients were found, where that is worth a line."""


def convert(source: Path, folders: DatasetFolders, options: ConvertOptions) -> Cohort:
    """Write ``source``, a folder or an archive of one, as the raw dataset ``folders.raw`` and return its cohort.

    Nothing is written before every file has been read and checked, and the dataset takes its name when it is whole.
    Raises `InputError` for whatever would make nnU-Net or the rounds fail later, `StageError` where writing fails.
    """
    check_target(folders, overwrite=options.overwrite)
    with readable(source):
        resolved = source.resolve()
    with _only_conversion(folders), source_folder(source, folders, options.unpack_to) as folder:
        check_target(folders, overwrite=options.overwrite)  # another one may have ended in between
        archive = None if folder == source else file_hash(source)
        provenance: dict[str, Any] = {"source": str(resolved)} | ({"archive_sha256": archive} if archive else {})
        return _convert_folder(
            folder, folders, options, provenance, tell=lambda text: say(in_users_words(text, source, folders))
        )


@contextlib.contextmanager
def _only_conversion(folders: DatasetFolders) -> Iterator[None]:
    """Hold the dataset id during the block; the operating system frees it when its holder dies."""
    path = folders.raw.parent / f".Dataset{folders.dataset_id:03d}.lock"
    lock = FileLock(path)
    locked = False
    try:
        folders.raw.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        # The one before may have taken its file away between our opening and our locking it.
        locked = path.is_file()
        if not locked:
            lock.release()
            lock.acquire(timeout=0)
            locked = path.is_file()
    except Timeout:
        raise InputError(
            f"another convert is making dataset {folders.dataset_id} in {folders.raw.parent}; wait for it, or choose "
            "another id with -d"
        ) from None
    except (NotImplementedError, OSError) as error:
        say(f"note: {folders.raw.parent} cannot be locked ({error}): start no other convert of this id meanwhile")
    try:
        yield
    finally:
        if locked:
            path.unlink(missing_ok=True)  # while it is held: whoever opened it meanwhile sees that it is gone
        lock.release()


def _convert_folder(
    source: Path,
    folders: DatasetFolders,
    options: ConvertOptions,
    provenance: dict[str, Any],
    *,
    tell: Callable[[str], None],
) -> Cohort:
    found, cases = collect(source, options)
    lists = find_lists(options.annotated, cases, tell)
    assignment = assign_roles(cases, options)
    cases = {case_id: cases[case_id] for case_id in sorted(assignment.role_of)}
    table = _declared_table(found, options) or _table_of_files(cases, tell)
    checked = check_cases(
        cases, assignment.role_of, table, allow_empty=options.allow_empty, policy=options.policy, tell=tell
    )
    if table is None:
        table = table_from_values({value: case.label_file for case in checked for value in case.label_values})
    patient_of = check_duplicates(checked, assignment.role_of, assignment.patient_of)
    channels = _channel_names(found, checked, options)
    annotated = annotated_values(checked, table, lists)
    for text in _advice(found, cases, checked, assignment, table, channels, options, lists):
        tell(f"note: {text}")
    cohort = Cohort(
        name=folders.name,
        root=folders.raw,
        channels=channels,
        labels=dict(table.labels),
        regions_class_order=table.regions_class_order,
        file_ending=choose_ending(checked),
        cases=(),
        provenance={
            **provenance,
            "layout": found.layout,
            "options": options.to_json(),
            "source_label_values": {str(a): b for a, b in table.source_values.items()}
            if table.changes_values
            else None,
        },
    )
    try:
        _remove_leftovers(folders)
        with atomic_folder(folders.raw) as temporary:
            entries = write_dataset(
                temporary,
                checked,
                role_of=assignment.role_of,
                patient_of=patient_of,
                table=table,
                cohort=cohort,
                policy=options.policy,
                annotated=annotated,
            )
            cohort = dataclasses.replace(cohort, cases=entries, dataset_hash=file_hash(temporary / DATASET_FILE))
            dataclasses.replace(cohort, root=temporary).save()
    except OSError as error:
        raise StageError(f"{folders.raw} could not be written ({error}); nothing was left behind") from None
    return cohort


def check_target(folders: DatasetFolders, *, overwrite: bool) -> None:
    """Refuse an id that is taken, and a dataset that would be replaced under what was made from it."""
    for root in (folders.raw.parent, folders.preprocessed.parent, folders.results.parent):
        prefix = f"Dataset{folders.dataset_id:03d}_"
        others = sorted(p.name for p in root.glob(f"{prefix}*") if p.name != folders.name) if root.is_dir() else []
        if others:
            raise InputError(f"id {folders.dataset_id} is taken by {root / others[0]}; choose another with -d")
    if not folders.raw.exists():
        return
    if not overwrite:
        raise InputError(f"{folders.raw} exists; choose another id with -d, or replace it with --overwrite")
    if not (folders.raw / COHORT_FILE).is_file():
        raise InputError(f"{folders.raw} was not made by this command (no {COHORT_FILE}); it is not overwritten")
    drawn = [path for path in sorted((folders.raw / ADDED_LABELS).glob("*")) if not path.name.startswith(".")]
    if drawn:
        raise InputError(
            f"{folders.raw} holds human labels that were taken in since it was made ({ADDED_LABELS}/{drawn[0].name}, "
            f"{len(drawn)} in all), which would be lost; convert to another id with -d, or move {folders.raw} away"
        )
    for made in (folders.preprocessed, folders.results):
        if made.exists():
            raise InputError(
                f"{made} was made from the dataset to be overwritten; remove it first, or choose another id"
            )


def collect(source: Path, options: ConvertOptions) -> tuple[Found, dict[str, SourceCase]]:
    """List the cases of the source and of its test folder, each id once."""
    found = find(source, options.layout, channels=options.channels, hints=Hints(suffix=options.suffix))
    listed = list(found.cases)
    test = options.test
    if test is None and found.layout != "msd" and (source / TEST).is_dir():
        test = source / TEST
    if test is not None:
        with readable(test):
            itself = test.resolve() == source.resolve()
        if itself:
            raise InputError(f"--test {test} is the source itself; name a folder of other cases")
        layout = "folder" if found.layout == "msd" else found.layout
        listed = [case for case in listed if not case.test]
        hints = Hints(
            suffix=options.suffix,
            counts=tuple({len(case.images) for case in listed}) or None,
            others=tuple((case.case_id, strip_ending(case.images[0])) for case in listed),
        )
        tested = find(test, layout, channels=options.channels or found.channels, test=True, hints=hints)
        if options.channels is None and found.channels and tested.channels:
            here, there = (", ".join(names) for names in (tested.channels, found.channels))
            if here.lower() != there.lower():
                raise InputError(f"{test} has the channels {here}, {source} has {there}; name their files alike")
        listed += tested.cases
    cases: dict[str, SourceCase] = {}
    folded: dict[str, SourceCase] = {}
    for case in listed:
        checked_case_id(case.case_id, where=case.images[0])
        twin = folded.get(case.case_id.lower())
        if twin is not None:
            raise InputError(f"{twin.images[0]} and {case.images[0]} are both case {case.case_id}; rename one of them")
        if options.test_as_unlabelled and case.test and case.label is None:
            case = dataclasses.replace(case, test=False)
        folded[case.case_id.lower()] = cases[case.case_id] = case
    return found, cases


def assign_roles(cases: dict[str, SourceCase], options: ConvertOptions) -> Assignment:
    """Give each case its role, drawing by patient; cases that are left out have none.

    Each draw has its own random stream, so that the test cases stay the same when the number of labels changes.
    """
    patients = patients_of(sorted(cases), options.patient_pattern)
    patient_of, told = patients.of, f" ({EACH_ITS_OWN})" if patients.grouped else ""
    test = {case_id for case_id, case in cases.items() if case.test}
    labelled = {case_id for case_id, case in cases.items() if case.label is not None and not case.test}
    if not labelled:
        some = next(iter(cases.values())).images[0]
        raise InputError(f"no labelled case: {some} and all others have no label file; put at least one into labels/")
    if options.test_cases:
        partly = {patient_of[c] for c, case in cases.items() if not case.test and case.label is None}
        pool = {c: patient_of[c] for c in labelled if patient_of[c] not in partly}
        drawn = choose_cases(pool, options.test_cases, _rng(options.seed, _TEST_DRAW), what="--test-cases", told=told)
        test |= drawn
        labelled -= drawn
        if not labelled:
            raise InputError(f"--test-cases {options.test_cases} takes all labelled cases; leave some to learn from")
    if options.labelled is not None:
        pool = {c: patient_of[c] for c in labelled}
        rng = _rng(options.seed, _LABELLED_DRAW)
        labelled = choose_cases(pool, options.labelled, rng, what="--labelled", told=told)
    unlabelled = set(cases) - test - labelled
    if not unlabelled:
        raise InputError(
            "no unlabelled case: every image has a label; add images without one, hide labels with --labelled N, "
            "or use unlabelled test images with --test-as-unlabelled"
        )
    if options.unlabelled is not None and options.unlabelled < len(unlabelled):
        order = _rng(options.seed, _UNLABELLED_DRAW).permutation(sorted(unlabelled))
        unlabelled = {str(c) for c in order[: options.unlabelled]}
    leaked = sorted({patient_of[c] for c in test} & {patient_of[c] for c in labelled | unlabelled})
    if leaked:
        raise InputError(
            f"patient {leaked[0]} has cases both in test and in training; keep each patient on one side{told}"
        )
    role_of = dict.fromkeys(test, Role.TEST) | dict.fromkeys(labelled, Role.LABELLED)
    role_of |= dict.fromkeys(unlabelled, Role.UNLABELLED)
    return Assignment(role_of=role_of, patient_of={c: patient_of[c] for c in role_of}, note=patients.note)


def _rng(seed: int, draw: int) -> np.random.Generator:
    return np.random.default_rng([seed, draw])


def _declared_table(found: Found, options: ConvertOptions) -> LabelTable | None:
    declared = options.labels or found.labels
    if declared is None:
        if options.regions_class_order:
            raise InputError("--regions-class-order needs --labels with regions, for example --labels whole=1+2,core=2")
        return None
    order = options.regions_class_order or (found.regions_class_order if options.labels is None else None)
    return make_label_table(declared, order)


def _table_of_files(cases: dict[str, SourceCase], tell: Callable[[str], None]) -> LabelTable | None:
    """Take the names that the label files carry where none are declared; None where no file carries any."""
    tables: dict[Path, tuple[Segment, ...]] = {}
    for case in cases.values():
        path = case.label or case.hidden_label
        if path is not None and path.is_file() and (segments := read_label_table(path)):
            tables[path] = segments
    if not tables:
        return None
    declared = tables_agree(tables)
    shown = ",".join(f"{name}={value}" for name, value in declared.items())
    tell(f"note: {len(tables)} label files name their values, which are taken as declared; else give --labels {shown}")
    return make_label_table(declared)


def _channel_names(found: Found, checked: list[CheckedCase], options: ConvertOptions) -> tuple[str, ...]:
    count = checked[0].channel_count
    names = options.channels or found.channels
    if names is None:
        names = ("R", "G", "B") if checked[0].picture and count == 3 else tuple(f"image{i}" for i in range(count))
        names = ("image",) if count == 1 else names
    if len(names) != count:
        raise InputError(
            f"{checked[0].source.images[0]} has {count} channel{'s' if count > 1 else ''}, named are {len(names)} "
            f"({', '.join(names)}); correct --channels or the dataset.json of the source"
        )
    return tuple(names)


def _advice(
    found: Found,
    cases: dict[str, SourceCase],
    checked: list[CheckedCase],
    assignment: Assignment,
    table: LabelTable,
    channels: Sequence[str],
    options: ConvertOptions,
    lists: Mapping[Path, AnnotatedList],
) -> list[str]:
    """Collect what deserves a line but is no reason to refuse."""
    notes = [note for case in checked for note in case.notes]
    if stacks := [case for case in checked if case.stack]:
        size = " x ".join(f"{v:g}" for v in stacks[0].geometry.spacing_xyz_mm)
        notes.append(f"{len(stacks)} TIFF stacks are read with ImageJ's voxel size ({stacks[0].case_id}: {size} mm)")
    geometries = {case.case_id: case.geometry for case in checked}
    labelled = [geometries[c] for c in geometries if assignment.role_of[c] is Role.LABELLED]
    if stored := orientation_note(geometries, common_direction(labelled)):
        notes.append(stored)
    air = sorted(case.case_id for case in checked if case.lowest <= _AIR)
    if len(air) == len(checked) and CT not in map(str.casefold, channels):
        notes.append(
            f"every image goes down to {_AIR:g} or below, as CT does, and no channel is called CT; if it is CT, say so "
            "with --channels CT, and it is windowed around the labelled classes"
        )
    if options.channels and found.channels:
        here, there = (", ".join(names) for names in (found.channels, options.channels))
        if here.lower() != there.lower():
            notes.append(f"the source's channels {here} are called {there}, in this order")
    if assignment.note:
        notes.append(assignment.note)
    seen = {v for c in checked if assignment.role_of[c.case_id] is Role.LABELLED for v in c.label_values}
    for name, value in table.labels.items():
        wanted = set(value) if isinstance(value, list) else {value}
        values = {s for s, t in table.source_values.items() if t in wanted}
        if name not in ("background", "ignore") and not values & seen:
            notes.append(f"class {name} is in no labelled case and cannot be learned; choose others or another --seed")
    learnt = {case_id for case_id, role in assignment.role_of.items() if role is Role.LABELLED}
    if not lists and (gaps := suspect_gaps(checked, learnt, table)):
        notes.append(gaps)
    if table.changes_values:
        changed = ", ".join(f"{a} -> {b}" for a, b in table.source_values.items() if a != b)
        highest = list(table.source_values)[-1] < max(table.source_values)
        top = "; the ignore label is moved above the classes" if highest else ""
        notes.append(f"label values are renumbered for nnU-Net: {changed}{top}")
    return notes


def _remove_leftovers(folders: DatasetFolders) -> None:
    """Remove what a killed conversion of this very dataset left behind."""
    for path in folders.raw.parent.glob(f"{TEMPORARY_MARK}*_{folders.name}"):
        shutil.rmtree(path)
