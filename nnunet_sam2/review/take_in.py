"""Labels that a person corrected, taken in as human labels of the cohort."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as with_values
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.cohort.cohort import ADDED_LABELS, Addition, Case, Cohort, Role
from nnunet_sam2.errors import InputError, refuse_all
from nnunet_sam2.files.checks import strip_ending
from nnunet_sam2.files.repairs import STRICT, Repairs
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.progress import say
from nnunet_sam2.review.hand_over import EXPORT_FILE, colours_of
from nnunet_sam2.rounds.lock import acquired
from nnunet_sam2.storage import TEMPORARY_MARK, file_hash, read_json
from nnunet_sam2.volumes import read_label, read_label_as, write_label
from nnunet_sam2.voxel_hashes import voxel_hash

LOCK_FILE = ".nnunet_sam2_import.lock"
HISTORY_KEY = "added_labels"
"""Key in the cohort's provenance of all that was ever taken in, the replaced ones as well."""


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """Hold a file that may be taken in; its voxels are read again then, for those of many files may be too many."""

    case: Case
    path: Path
    voxels: str
    """Hash of its voxels; empty where it shows nothing."""


def take_in(
    raw: Path,
    files: Sequence[Path],
    *,
    case_id: str | None = None,
    classes: Sequence[str] | None = None,
    replace: bool = False,
    allow_empty: bool = False,
) -> list[tuple[str, Path]]:
    """Take in label files as human labels of unlabelled cases; return each case with the file that now holds its label.

    A case is found by ``case_id``, by the file's name, or by the folder it was handed over in. With ``classes`` (names
    or values) a file answers for these alone and the case goes on being labelled; without, for every voxel, and the
    case becomes a labelled one that is trained on and never validated on. All files are checked before one is taken.
    Raises `InputError` for another grid, values that are not declared, a case that is none, has a human label already
    (but with ``replace``) or is held out for tests, and for a label that is as it was handed over.
    """
    from filelock import FileLock

    if case_id is not None and len(files) != 1:
        raise InputError("--case names the case of one file; import the others by their names")
    lock = FileLock(raw / LOCK_FILE)
    acquired(lock)
    try:
        cohort = Cohort.load(raw)
        values = None if classes is None else class_values_of(cohort, classes)
        checked: list[_Checked] = []
        refusals: list[str] = []
        for path in files:
            try:
                checked.append(_check(cohort, path, case_id, values, replaced=replace, allow_empty=allow_empty))
            except InputError as refusal:
                refusals.append(str(refusal))
        refuse_all(refusals, of=len(files), what="files", tell=say)
        names = [one.case.case_id for one in checked]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"two of the files are for case {twice}; give one a case")
        _refuse_twins(cohort, checked)
        taken = []
        for one in checked:
            cohort, kept = _enter(cohort, one, values)
            taken.append((one.case.case_id, kept))
        # Once for all of them: a large cohort is not written file by file, and a kill before leaves files unused.
        cohort.save()
        return taken
    finally:
        lock.release()


def class_values_of(cohort: Cohort, classes: Sequence[str]) -> tuple[int, ...]:
    """Return the label values of classes that are given by name or by value."""
    found: set[int] = set()
    for text in classes:
        value = cohort.labels.get(text, int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else None)
        values = set(value if isinstance(value, list) else [value]) if value is not None else set()
        if not values or not values <= set(cohort.class_values):
            known = ", ".join(name for name in cohort.labels if name not in ("background", "ignore"))
            raise InputError(f"--classes: there is no class {text!r}; there are {known}")
        found |= values
    if not found:
        raise InputError("--classes names no class; leave it out where the file answers for every voxel")
    return tuple(sorted(found))


def find_case(cohort: Cohort, path: Path) -> Case:
    """Find the case that a label file belongs to: by its name, or by the folder that it was handed over in.

    ``CASE.nii.gz`` is the case's; so is ``CASE_corrected.nii.gz``, if no other case has a longer name that fits.
    """
    stem = strip_ending(path)
    ids = {case.case_id: case for case in cohort.cases}
    if stem in ids:
        return ids[stem]
    fitting = [name for name in ids if stem.startswith(name) and re.match(r"[^A-Za-z0-9]", stem[len(name) :])]
    if fitting:
        return ids[max(fitting, key=len)]
    exported = _exported(cohort, path)
    if exported.get("case") in ids:
        return ids[exported["case"]]
    raise InputError(f"{path}: no case of {cohort.name} begins this name; say whose label it is with --case CASE")


def _check(
    cohort: Cohort,
    path: Path,
    case_id: str | None,
    values: tuple[int, ...] | None,
    *,
    replaced: bool,
    allow_empty: bool,
) -> _Checked:
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    case = cohort.case(case_id) if case_id is not None else find_case(cohort, path)
    name = case.case_id
    if case.role is Role.TEST:
        raise InputError(f"{path}: case {name} is held out for tests; nothing may learn from its label")
    if case.as_planned.role is Role.LABELLED:
        raise InputError(
            f"{path}: case {name} has had a human label from the start, and plans and folds follow it; to change it, "
            "convert the source with the new label to another dataset id"
        )
    label_zyx, geometry, repairs = _read_drawn(cohort, path)
    for note in repairs.notes(path):
        say(f"note: {note}")
    if difference := case.geometry.mismatch(geometry):
        raise InputError(
            f"the image of case {name} and {path} differ in {difference}; save the label on the image's grid"
        )
    if case.added is not None and not replaced:
        raise InputError(
            f"{path}: case {name} has a human label since {case.added.time} ({case.added.source}); give --replace to "
            "take this one instead"
        )
    if not np.isin(label_zyx, values or cohort.class_values).any() and not allow_empty:
        raise InputError(f"{path} shows none of the classes; if case {name} has none of them, give --allow-empty")
    # The machine's own label would come back as a human one.
    if _exported(cohort, path).get("voxels") == voxel_hash(label_zyx):
        raise InputError(
            f"{path} is as it was handed over, no voxel was corrected; if it is right, accept it in the page of "
            "nnunet_sam2 review"
        )
    return _Checked(case=case, path=path, voxels=voxel_hash(label_zyx) if label_zyx.any() else "")


def _read_drawn(cohort: Cohort, path: Path) -> tuple[np.ndarray, Geometry, Repairs]:
    """Read a person's label, its values by the names in its own label table where it has one."""
    allowed = [*cohort.class_values, *([cohort.ignore_value] if cohort.ignore_value is not None else [])]
    names = {name: value for value, (name, _) in colours_of(cohort).items()}
    names |= {name: value for name, value in cohort.labels.items() if isinstance(value, int)}
    return read_label_as(path, STRICT, allowed=allowed, names=names)


def _refuse_twins(cohort: Cohort, checked: Sequence[_Checked]) -> None:
    """Refuse a label that another case has, voxel for voxel: it was given to the wrong one."""
    ours = {one.case.case_id for one in checked}
    others = {
        voxel_hash(read_label(cohort.root / label)[0]): case.case_id
        for case in cohort.cases
        if case.case_id not in ours and case.role is not Role.TEST
        if (label := case.added.label if case.added else case.label)
    }
    for one in checked:
        twin = others.setdefault(one.voxels, one.case.case_id) if one.voxels else one.case.case_id
        if twin != one.case.case_id:
            raise InputError(
                f"{one.path}: case {one.case.case_id} would get the label of case {twin}, voxel for voxel; give its own"
            )


def _exported(cohort: Cohort, path: Path) -> dict[str, Any]:
    """Return what stands in the folder of ``path`` of the case that was handed over in it; nothing elsewhere."""
    try:
        value = read_json(path.parent / EXPORT_FILE)
    except InputError:
        return {}  # none, or another program's
    return value if isinstance(value, dict) and value.get("dataset") == cohort.name else {}


def _enter(cohort: Cohort, checked: _Checked, values: tuple[int, ...] | None) -> tuple[Cohort, Path]:
    """Write the label under a name of its own, and return the cohort that knows it."""
    case, ending = checked.case, cohort.file_ending
    folder = cohort.root / ADDED_LABELS
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_MARK, dir=folder) as temporary:
        written = Path(temporary) / f"{case.case_id}{ending}"
        write_label(written, _read_drawn(cohort, checked.path)[0], case.geometry)
        sha256 = file_hash(written)
        target = folder / f"{case.case_id}-{sha256[:16]}{ending}"
        written.chmod(0o444)
        os.replace(written, target)
    added = Addition(
        label=str(target.relative_to(cohort.root)),
        sha256=sha256,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        source=checked.path.name,
        classes=values,
    )
    whole = values is None
    planned = case.as_planned
    entered = with_values(
        planned,
        role=Role.LABELLED if whole else Role.UNLABELLED,
        label=added.label if whole else None,
        added=added,
    )
    history = [
        *cohort.provenance.get(HISTORY_KEY, []),
        {"case": case.case_id, "from": planned.role.value, "to": entered.role.value, **added.to_json()},
    ]
    known = with_values(
        cohort,
        cases=tuple(entered if c.case_id == case.case_id else c for c in cohort.cases),
        provenance={**cohort.provenance, HISTORY_KEY: history},
    )
    return known, target
