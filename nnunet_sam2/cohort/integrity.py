"""Is a dataset still what was converted? Asked before every run: what is learned from must be what was checked."""

from __future__ import annotations

import json
from pathlib import Path

from nnunet_sam2.cohort.cohort import LABELLED_IMAGES, LABELS, Case, Cohort, Role
from nnunet_sam2.cohort.declared import DATASET_FILE
from nnunet_sam2.cohort.write import dataset_json
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.checks import is_image_file
from nnunet_sam2.storage import file_hash, read_json

_MEANT_BY_NNUNET = ("regions_class_order", "overwrite_image_reader_writer", "dataset")
"""Fields that change what nnU-Net reads, also where this package did not write them."""

_WAY_OUT = "put the files back as they were, or convert the source again"


def check_unchanged(cohort: Cohort) -> None:
    """Refuse a dataset whose files are gone, were changed since it was made, or have others among them.

    A cohort of an earlier version knows no hashes of its files: there only the names are held against what is there.
    Raises `InputError`.
    """
    _check_dataset_file(cohort)
    for case in cohort.cases:
        for name in (*case.images, *filter(None, (case.label, case.hidden_label))):
            _check_file(cohort, case, name)
    wanted = {name for case in cohort.cases for name in (*case.images, case.label)}
    for folder in (LABELLED_IMAGES, LABELS):
        for path in sorted((cohort.root / folder).glob("*")):
            if is_image_file(path) and f"{folder}/{path.name}" not in wanted:
                raise InputError(
                    f"{path} is not in {cohort.name}'s cohort.json{_whose(cohort, path)}, but nnU-Net would learn from "
                    "it; remove it, or convert the source with it"
                )


def _check_dataset_file(cohort: Cohort) -> None:
    """Hold ``dataset.json``, which nnU-Net plans and trains by, against the cohort: by meaning, then by its bytes."""
    path = cohort.root / DATASET_FILE
    if not path.is_file():
        raise InputError(f"{path} is missing; {_WAY_OUT}")
    found = read_json(path)
    wanted = dataset_json(cohort, len(cohort.as_planned().labelled))
    if not isinstance(found, dict):
        raise InputError(f"{path} is no JSON object; {_WAY_OUT}")
    for name in (*wanted, *_MEANT_BY_NNUNET):
        # the order of a label table tells which region wins
        if json.dumps(found.get(name)) != json.dumps(wanted.get(name)):
            raise InputError(
                f"{path}: {name} is {json.dumps(found.get(name)):.200}, cohort.json says "
                f"{json.dumps(wanted.get(name)):.200}; {_WAY_OUT}"
            )
    if cohort.dataset_hash is not None and file_hash(path) != cohort.dataset_hash:
        raise InputError(f"{path} was changed since the dataset was made; {_WAY_OUT}")


def _check_file(cohort: Cohort, case: Case, name: str) -> None:
    path = cohort.root / name
    if not path.is_file():
        raise InputError(f"{path}, of case {case.case_id}, is missing; {_WAY_OUT}")
    expected = case.file_hashes.get(name)
    if expected is None:
        return
    found = file_hash(path)
    if found == expected:
        return
    twin = _case_of(cohort, found)
    if twin is not None and twin.role is not case.role:
        raise InputError(
            f"{path} ({case.role.value}) holds the {twin.role.value} case {twin.case_id} now; what is tested must not "
            f"be learned from: {_WAY_OUT}"
        )
    raise InputError(f"{path}, of case {case.case_id}, was changed since the dataset was made; {_WAY_OUT}")


def _whose(cohort: Cohort, path: Path) -> str:
    twin = _case_of(cohort, file_hash(path))
    if twin is None:
        return ""
    kind = "the test case" if twin.role is Role.TEST else "case"
    return f" and holds {kind} {twin.case_id}"


def _case_of(cohort: Cohort, digest: str) -> Case | None:
    return next((case for case in cohort.cases if digest in case.file_hashes.values()), None)
