"""Write a run's report: gather, encode pictures within the file's budget, render, and put the file in its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.errors import NnunetSam2Error
from nnunet_sam2.files.checks import PICTURE_ENDINGS
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.progress import say, track
from nnunet_sam2.report.account import CaseAccount, RunAccount
from nnunet_sam2.report.gather import gather
from nnunet_sam2.report.page import Pictures, render
from nnunet_sam2.report.pictures import CasePictures, encode, unpack
from nnunet_sam2.report.run_files import RunFiles
from nnunet_sam2.report.story import Stories
from nnunet_sam2.storage import write_text
from nnunet_sam2.volumes import read_label, read_map, read_volume

REPORT_FILE = "report.html"

LIMIT_BYTES = 60_000_000
"""Most bytes of a report: browsers open that much in a few seconds."""

_SPARE_BYTES = 2_500_000
_ROW_BYTES = 1_500
"""What the page takes without pictures, and each case in its table: 0.7 MB and 250 bytes a class were measured."""

_LEAST_BLOCK, _MOST_BLOCK = 24_000, 600_000
"""Bytes of one case's pictures: below the least they show too little, above the most nobody sees a difference."""

PICTURES_BETWEEN_ROUNDS = 40
"""Cases with pictures in the reports that a run writes before its end: the ones to look at first."""


def write_report(
    folders: DatasetFolders, run: Path, *, output: Path | None = None, most_pictures: int | None = None
) -> Path:
    """Write the report of the run in the folder ``run`` and return its path.

    ``most_pictures`` bounds the cases whose images are read. Raises `InputError` where there is no run; a case whose
    files cannot be read is shown without pictures, with the reason.
    """
    files = RunFiles.open(folders, run)
    account = gather(files)
    path = output or run / REPORT_FILE
    write_text(path, render(account, pictures_of(files, account, most_pictures)))
    return path


def try_to_report(folders: DatasetFolders, run: Path, *, most_pictures: int | None = None) -> Path | None:
    """Write the report as a run goes on; whatever goes wrong is said in one line and stops nothing."""
    try:
        return write_report(folders, run, most_pictures=most_pictures)
    except Exception as error:
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say(f"no report could be written ({what}); later: nnunet_sam2 report -d {folders.dataset_id}")
        return None


def block_budget(cases: int, shown: int) -> int:
    """Return how many bytes of pictures each of the ``shown`` cases may take."""
    room = LIMIT_BYTES - _SPARE_BYTES - _ROW_BYTES * cases
    # Base64 makes four bytes of three, and each block has a tag around it.
    each = int(room / max(1, shown) * 0.75) - 64
    return min(_MOST_BLOCK, each)


def pictures_of(files: RunFiles, account: RunAccount, most: int | None = None) -> Pictures:
    """Read and encode the pictures of a run's cases; those that cannot be read are named with the reason."""
    wanted = _wanted(account, most)
    budget = block_budget(len(account.cases), len(wanted))
    stories = Stories(files)
    blocks, problems = {}, {}
    thinned = shrunk = 0
    for known in track(wanted, what="pictures of the report", total=len(wanted)):
        try:
            blocks[known.case_id] = encode(_read(files, stories, files.cohort.case(known.case_id)), budget)
        except (NnunetSam2Error, OSError) as error:
            problems[known.case_id] = str(error)
            continue
        header, _ = unpack(blocks[known.case_id])
        thinned += header["step"] > 1
        shrunk += header["shrunk"]
    return Pictures(
        blocks=blocks, problems=problems, note=_note(len(account.cases), len(wanted), thinned=thinned, shrunk=shrunk)
    )


def _wanted(account: RunAccount, most: int | None) -> list[CaseAccount]:
    """Choose the cases that get pictures: those to look at first, and as many labelled ones at most."""
    fitting = max(1, int((LIMIT_BYTES - _SPARE_BYTES - _ROW_BYTES * len(account.cases)) * 0.75 / _LEAST_BLOCK))
    count = min(fitting, len(account.cases) if most is None else most)
    first = account.by_urgency()[:count]
    labelled = [case for case in account.cases if case.case_id not in {c.case_id for c in account.unlabelled}]
    room = fitting - len(first)
    return [*first, *labelled[: room if most is None else min(most, room)]]


def _note(cases: int, shown: int, *, thinned: int, shrunk: int) -> str:
    parts = []
    if shown < cases:
        parts.append(f"{shown} of {cases} cases have pictures, those to look at first")
    if thinned:
        parts.append(f"in {thinned} not every slice is shown")
    if shrunk:
        parts.append(f"in {shrunk} slices are shrunk")
    return f"To keep this file small, {'; '.join(parts)}." if parts else ""


def _read(files: RunFiles, stories: Stories, case: Case) -> CasePictures:
    cohort = files.cohort
    maps: dict[str, np.ndarray] = {}
    for name, path in files.label_files(case).items():
        array, geometry = read_map(path) if name == "confidence" else read_label(path)
        if geometry.shape_zyx == case.geometry.shape_zyx:
            maps[name] = array
    colour = _is_colour(cohort)
    paths: Sequence[Path] = cohort.image_paths(case)
    return CasePictures(
        image_czyx=read_volume(paths if colour else paths[:1]).array_czyx,
        maps=maps,
        geometry=case.geometry,
        class_values=cohort.class_values,
        channel="" if len(cohort.channels) < 2 or colour else cohort.channels[0],
        ignore_value=cohort.ignore_value,
        picture=cohort.file_ending in PICTURE_ENDINGS,
        story=stories.of(case),
    )


def _is_colour(cohort: Cohort) -> bool:
    return cohort.file_ending in PICTURE_ENDINGS and len(cohort.channels) == 3
