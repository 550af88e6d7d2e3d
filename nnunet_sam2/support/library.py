"""The support library: labelled cases, read and encoded, and queries beside them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_sam2.cohort.cohort import Case, Cohort, Role
from nnunet_sam2.errors import InputError
from nnunet_sam2.orientation import Turn
from nnunet_sam2.progress import track
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.storage import write_stream
from nnunet_sam2.support.cases import Query, Support
from nnunet_sam2.support.showing import Showing
from nnunet_sam2.volumes import Volume, read_label, read_volume

PROBABILITIES = "probabilities"
PROBABILITY_KEY = "prob_czyx"


def choose_supports(cohort: Cohort, wanted: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """Return support ids: all labelled cases, the first N of them (``wanted`` a number), or those named.

    Raises `InputError` where a named case is unknown or has no human label, or where nothing is left.
    """
    labelled = [case.case_id for case in cohort.labelled]
    if not labelled:
        raise InputError(f"{cohort.name} has no labelled case; SAM 2 needs at least one to learn the classes from")
    if wanted is None:
        return tuple(labelled)
    if isinstance(wanted, str):
        if wanted.isascii() and wanted.isdecimal():
            if not 1 <= int(wanted) <= len(labelled):
                raise InputError(f"--supports {wanted}: {cohort.name} has {len(labelled)} labelled cases")
            return tuple(labelled[: int(wanted)])
        wanted = [item for item in wanted.split(",") if item]
    for case_id in wanted:
        if cohort.case(case_id).role is not Role.LABELLED:
            raise InputError(f"support {case_id} is not a labelled case of {cohort.name}: {', '.join(labelled[:10])}")
    if not wanted:
        raise InputError("the list of supports is empty")
    return tuple(dict.fromkeys(wanted))


def load_supports(
    cohort: Cohort,
    case_ids: Sequence[str],
    backend: Sam2Backend,
    *,
    slice_axis: int,
    student_probabilities: Path | None = None,
    showing: Showing | None = None,
) -> list[Support]:
    """Read and encode the labelled cases, behind a progress bar; each must show at least one class."""
    showing = showing or Showing(cohort=cohort, support_ids=tuple(case_ids))
    supports = []
    for case_id in track(case_ids, what="encoding supports", total=len(case_ids)):
        support = load_support(
            cohort,
            cohort.case(case_id),
            backend,
            slice_axis=slice_axis,
            student_probabilities=student_probabilities,
            showing=showing,
        )
        supports.append(support)
    if not any(np.isin(support.label_zyx, cohort.class_values).any() for support in supports):
        raise InputError(f"the labels of the supports ({', '.join(case_ids)}) are all empty; give others")
    return supports


def load_support(
    cohort: Cohort,
    case: Case,
    backend: Sam2Backend,
    *,
    slice_axis: int,
    student_probabilities: Path | None = None,
    showing: Showing | None = None,
) -> Support:
    """Read and encode one labelled case, in the shown order of axes; see `load_query`."""
    showing = showing or Showing(cohort=cohort, support_ids=(case.case_id,))
    query = load_query(
        cohort, case, backend, slice_axis=slice_axis, student_probabilities=student_probabilities, showing=showing
    )
    turn = showing.turn(case)
    path = cohort.label_path(case)
    ignore = cohort.ignore_value
    allowed = [*cohort.class_values, *([] if ignore is None else [ignore])]
    stored_zyx, geometry = read_label(path, allowed=allowed)
    if difference := query.geometry.mismatch(turn.geometry(geometry)):
        raise InputError(f"{path} and its image differ in {difference}; resample one of them")
    return Support(
        case_id=case.case_id,
        frames=query.frames,
        embeddings=query.embeddings,
        label_zyx=turn.apply(stored_zyx),
        geometry=query.geometry,
        ignore_value=ignore,
        student_prob_czyx=query.student_prob_czyx,
        annotated=case.known_classes,
        patient=case.patient,
    )


def load_query(
    cohort: Cohort,
    case: Case,
    backend: Sam2Backend,
    *,
    slice_axis: int,
    student_probabilities: Path | None = None,
    showing: Showing | None = None,
) -> Query:
    """Read and encode one case without looking at any label.

    All arrays come in the order of axes in which the cohort is shown (``showing.turn(case)``, of the file's own where
    nothing is turned), and ``slice_axis`` counts in it.
    """
    showing = showing or Showing(cohort=cohort, support_ids=())
    turn = showing.turn(case)
    volume = read_turned(cohort, case, turn)
    frames = showing.frames(volume, size=backend.spec.image_size, slice_axis=slice_axis)
    student = None
    if student_probabilities is not None:
        path = student_probabilities / f"{case.case_id}.npz"
        if path.is_file():
            student = turn.apply(read_probabilities(path))
            expected = (len(cohort.class_values) + 1, *volume.geometry.shape_zyx)
            if student.shape != expected:
                raise InputError(
                    f"{path} holds an array of shape {student.shape}, expected {expected}; predict it anew"
                )
    return Query(
        case_id=case.case_id,
        frames=frames,
        embeddings=backend.embed(frames),
        geometry=volume.geometry,
        student_prob_czyx=student,
        patient=case.patient,
    )


def read_turned(cohort: Cohort, case: Case, turn: Turn) -> Volume:
    """Read a case's image with its axes turned."""
    stored = read_volume(cohort.image_paths(case))
    return Volume(array_czyx=turn.apply(stored.array_czyx), geometry=turn.geometry(stored.geometry))


def read_probabilities(path: Path) -> np.ndarray:
    """Read a probability map (C, Z, Y, X), uint8 in steps of 1/255 as it is stored, background first."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return np.asarray(stored[PROBABILITY_KEY])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} holds no probabilities under {PROBABILITY_KEY!r} ({error}); make it anew") from None


def write_probabilities(path: Path, prob_czyx: np.ndarray) -> None:
    """Write probabilities as uint8 steps of 1/255, compressed, atomically; the same values give the same bytes."""
    steps_czyx = np.rint(prob_czyx * 255.0).astype(np.uint8)
    write_stream(path, lambda stream: np.savez_compressed(stream, prob_czyx=steps_czyx))
