"""One dataset: its cohort, its files against the hashes that were recorded of them, its plans, its runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.cohort.labels import single_values
from nnunet_sam2.doctor.finding import Finding, fail, ok, warn
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.repairs import STRICT
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.orientation import common_direction, orientation_note
from nnunet_sam2.progress import track
from nnunet_sam2.rounds.ledger import LEDGER_FILE, artefact, read_events
from nnunet_sam2.rounds.nnunet import plans_path, read_plans
from nnunet_sam2.rounds.state import find_runs
from nnunet_sam2.storage import file_hash
from nnunet_sam2.volumes import read_label_as, read_volume
from nnunet_sam2.voxel_hashes import voxel_hash

_CONVERT = "restore the file, or convert the source again"
_SHOWN = 3


def check_dataset(folders: DatasetFolders) -> Iterator[Finding]:
    """Check everything that a run of a dataset reads."""
    try:
        cohort = Cohort.load(folders.raw)
    except InputError as error:
        yield fail("cohort", str(error).split("; ")[0], "convert the source again")
        return
    count = f"{len(cohort.labelled)} labelled, {len(cohort.unlabelled)} unlabelled, {len(cohort.test)} test cases"
    if cohort.labelled and cohort.unlabelled:
        yield ok("cohort", f"{cohort.name}: {count}")
    else:
        yield fail("cohort", f"{cohort.name}: {count}", "a run needs labelled and unlabelled cases: convert with both")
    labelled = [case.geometry for case in cohort.labelled]
    if stored := orientation_note({case.case_id: case.geometry for case in cohort.cases}, common_direction(labelled)):
        yield ok("orientations", stored)
    yield check_images(cohort)
    yield check_labels(cohort)
    yield check_plans(folders)
    for run in find_runs(folders):
        yield check_run(run)


def check_images(cohort: Cohort) -> Finding:
    """Read every image to its end and hold it against the voxel hash of the conversion."""

    def problem(case: Case) -> str:
        volume = read_volume(cohort.image_paths(case))
        if volume.geometry != case.geometry and (difference := case.geometry.mismatch(volume.geometry)):
            return f"what was converted and {case.images[0]} differ in {difference}"
        if voxel_hash(volume.array_czyx) != case.voxel_hash:
            return f"{case.images[0]} holds other voxels than were converted"
        return ""

    return _over(cohort, cohort.cases, problem, check="images", what="checking images", one="equal to their hashes")


def check_labels(cohort: Cohort) -> Finding:
    """Read every label to its end, hold its values against the table, and later ones against their hash."""
    ignore = cohort.ignore_value
    allowed = [*cohort.class_values, *([] if ignore is None else [ignore])]

    def problem(case: Case) -> str:
        path = cohort.label_path(case)
        if case.added is not None and file_hash(path) != case.added.sha256:
            return f"{case.label} is not the file that was taken in on {case.added.time[:10]}"
        _, geometry, repairs = read_label_as(path, STRICT, allowed=allowed, names=single_values(cohort.labels))
        if repairs.renamed is not None:
            return f"{case.label} has a label table with other names for its values than declared ({repairs.renamed})"
        if difference := case.geometry.mismatch(geometry):
            return f"the image of {case.case_id} and {case.label} differ in {difference}"
        return ""

    cases = tuple(case for case in cohort.cases if case.label is not None)
    return _over(cohort, cases, problem, check="labels", what="checking labels", one="whole and on their images' grids")


def check_plans(folders: DatasetFolders) -> Finding:
    """Check that nnU-Net's plans, where there are some, can be read."""
    path = plans_path(folders)
    if not path.is_file():
        return ok("plans", "none yet: the run makes them")
    try:
        names = sorted(read_plans(folders)["configurations"])
    except (ValueError, KeyError, TypeError):
        return fail("plans", f"{path} is damaged", f"remove {folders.preprocessed}; the run plans anew")
    return ok("plans", ", ".join(names))


def check_run(folder: Path) -> Finding:
    """Hold a run's artefacts against the hashes in its ledger; what changed is made again."""
    check = f"run {folder.name}"
    try:
        events = read_events(folder / LEDGER_FILE)
    except InputError as error:
        text = str(error)
        return fail(check, text.split("; ")[0], text.split("; ", 1)[-1])
    done = {event["stage"]: event for event in events if event["event"] == "done"}
    files = [
        (stage, artefact(folder, name), known)
        for stage, event in done.items()
        for name, known in event["files"].items()
    ]
    changed = []
    for stage, path, known in track(files, what=f"checking {check}", total=len(files)):
        if not path.is_file() or file_hash(path) != known:
            changed.append(f"{os.path.relpath(path, folder)} ({stage})")
    if changed:
        mend = "restore them, or let the run command make them again"
        return warn(check, f"missing or changed since they were written: {_some(changed)}", mend)
    return ok(check, f"{len(done)} stages done, {len(files)} files as they were written")


def _over(
    cohort: Cohort,
    cases: tuple[Case, ...],
    problem: Callable[[Case], str],
    *,
    check: str,
    what: str,
    one: str,
) -> Finding:
    found = []
    for case in track(cases, what=what, total=len(cases)):
        try:
            text = problem(case)
        except InputError as error:
            text = str(error).split("; ")[0]
        except OSError as error:
            text = f"{case.case_id}: {error.strerror or error}"
        if text:
            found.append(text)
    if found:
        return fail(check, f"{len(found)} of {len(cases)}: {_some(found)}", f"{_CONVERT} ({cohort.root})")
    return ok(check, f"{len(cases)} {one}")


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more
