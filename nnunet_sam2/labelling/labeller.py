"""Label cases of a cohort: read, embed, ask the strategy, fuse, write; go on where a killed run stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Case, Cohort, Role
from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.fusion import FusionOptions
from nnunet_sam2.labelling.job import Job, Ready
from nnunet_sam2.labelling.quality.calibration import Calibration
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.quality.record import calibration_of
from nnunet_sam2.labelling.records import CALIBRATION
from nnunet_sam2.labelling.strategy import BringsFusion, Limits, Strategy
from nnunet_sam2.progress import track
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.showing import Showing, cohort_direction, cohort_slice_axis, shown_geometry


def label_cases(
    *,
    cohort: Cohort,
    case_ids: Sequence[str],
    support_ids: Sequence[str],
    strategy: Strategy,
    backend: Sam2Backend,
    out: Path,
    seed: int,
    save_probabilities: bool = False,
    student_probabilities: Path | None = None,
    fusion: FusionOptions | None = None,
    quality: QualityOptions | None = None,
    calibration: Calibration | None = None,
    calibrate_on: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Label the cases and return their records, in the order of ``case_ids``.

    Writes ``OUT/CASE<ending>`` (labels), ``OUT/confidence/CASE<ending>`` (0 to 1 in steps of 1/255),
    ``OUT/members/CASE.json`` (the record) and, where asked for, ``OUT/probabilities/CASE.npz`` (``prob_czyx``, uint8 0
    to 255, background first). ``student_probabilities`` is a folder of such ``CASE.npz``.

    A labelled case is labelled from the supports of other patients (leave-one-out), and its record then has
    ``dice_with_human_label``; any other from all supports, other scans of its patient among them. A case whose record
    carries the same inputs and whose files are unchanged is not done again. Raises `InputError` before anything is
    written where something cannot work.

    With ``quality`` the records also say how good each class is taken to be. The estimates follow ``calibration``;
    ``calibrate_on`` names labelled cases to be labelled first, for the calibration of the others (in
    ``OUT/calibration`` where they are not among ``case_ids``; those that the strategy cannot label are passed by). With
    neither they are not calibrated, and say so. The labelled cases that calibrate have no estimates of their own.
    """
    _check(cohort, case_ids, support_ids, strategy, backend, student_probabilities)
    calibrating = [
        case_id
        for case_id in calibrate_on
        if case_id in set(case_ids)
        or _can_label(cohort, case_id, support_ids, strategy, backend, student_probabilities)
    ]
    job = Job(
        cohort=cohort,
        support_ids=tuple(support_ids),
        strategy=strategy,
        backend=backend,
        out=out,
        seed=seed,
        save_probabilities=save_probabilities,
        student_probabilities=student_probabilities,
        fusion=_fusion(strategy, fusion or FusionOptions()),
        slice_axis=cohort_slice_axis(cohort),
        showing=Showing(cohort=cohort, support_ids=tuple(support_ids)),
        quality=quality,
        calibration=None,
    )
    ready = Ready(job)
    records = {}
    if quality is not None and calibrating:
        aside = dataclasses.replace(job, out=out / CALIBRATION, save_probabilities=False)
        records = _label_all(job, [case_id for case_id in case_ids if case_id in set(calibrating)], ready)
        others = _label_all(aside, [case_id for case_id in calibrating if case_id not in records], ready)
        calibration = calibration_of([*records.values(), *others.values()], cohort.class_values, quality)
    if quality is not None and calibration is None:
        calibration = Calibration(class_values=cohort.class_values, options=quality)
    job = dataclasses.replace(job, calibration=calibration)
    records |= _label_all(job, [case_id for case_id in case_ids if case_id not in records], ready)
    return [records[case_id] for case_id in case_ids]


def require_memory(strategy: Strategy, backend: Sam2Backend) -> None:
    """Raise `InputError` where the strategy needs SAM 2's video memory and the checkpoint holds none."""
    if strategy.needs_memory and not backend.spec.has_memory:
        way_out = getattr(strategy, "without_memory", "--strategy transfer")
        raise InputError(
            f"strategy {strategy.name} carries masks through the volume and needs SAM 2's video memory, which "
            f"checkpoint {backend.spec.name} does not hold; use {way_out} or a whole checkpoint"
        )


def _label_all(job: Job, case_ids: Sequence[str], ready: Ready) -> dict[str, dict[str, Any]]:
    """Label the cases that are not done and return all records, by case."""
    keys = {case_id: job.input_key(job.cohort.case(case_id)) for case_id in case_ids}
    found = {case_id: record for case_id, key in keys.items() if (record := job.finished(case_id, key)) is not None}
    records = {case_id: job.current(record) for case_id, record in found.items()}
    pending = [case_id for case_id in case_ids if case_id not in records]
    if pending:
        ready.prepare()
        for case_id in track(pending, what=f"labelling ({job.strategy.name})", total=len(pending)):
            records[case_id] = job.label(job.cohort.case(case_id), ready, keys[case_id])
    return records


def _fusion(strategy: Strategy, asked: FusionOptions) -> FusionOptions:
    return strategy.fusion(asked) if isinstance(strategy, BringsFusion) else asked


def _check(
    cohort: Cohort,
    case_ids: Sequence[str],
    support_ids: Sequence[str],
    strategy: Strategy,
    backend: Sam2Backend,
    student_probabilities: Path | None,
) -> None:
    if len(set(case_ids)) != len(case_ids) or len(set(support_ids)) != len(support_ids):
        raise InputError("a case is named twice")
    for case_id in support_ids:
        if cohort.case(case_id).role is not Role.LABELLED:
            raise InputError(f"support {case_id} of {cohort.name} has no human label to learn from")
    uses_student = getattr(strategy, "uses_student", False)
    if getattr(strategy, "student_optional", False) and student_probabilities is None:
        uses_student = False
    for case_id in case_ids:
        case = cohort.case(case_id)
        if not uses_student:
            _require_other_patient(cohort, case, support_ids)
    require_memory(strategy, backend)
    if isinstance(strategy, Limits):
        slice_axis, direction = cohort_slice_axis(cohort), cohort_direction(cohort)
        for case_id in case_ids:
            shown = shown_geometry(cohort.case(case_id).geometry, direction)
            strategy.check(case_id, shown.shape_zyx[slice_axis])
    if uses_student:
        if student_probabilities is None:
            raise InputError(f"strategy {strategy.name} needs the student's probabilities (--student FOLDER)")
        missing = [c for c in case_ids if not (student_probabilities / f"{c}.npz").is_file()]
        if missing:
            raise InputError(
                f"{student_probabilities / missing[0]}.npz is missing: the student has not predicted it yet"
            )


def _require_other_patient(cohort: Cohort, case: Case, support_ids: Sequence[str]) -> None:
    """Raise `InputError` where no support is left for a case: one of another patient, for a labelled case."""
    if not [s for s in support_ids if s != case.case_id]:
        raise InputError(f"case {case.case_id} has no support left: a case cannot support itself; label another case")
    # A label that came later is of use to the other cases; the case itself is labelled as it was planned.
    if case.as_planned.role is Role.LABELLED and all(cohort.case(s).patient == case.patient for s in support_ids):
        raise InputError(
            f"case {case.case_id} has no support left: all {len(support_ids)} show its own patient, {case.patient}; "
            "label another case or give more --supports (were they several patients: convert with --patient-pattern)"
        )


def _can_label(cohort: Cohort, case_id: str, *more: Any) -> bool:
    """Say whether a case that nobody asked for can be labelled."""
    try:
        _check(cohort, [case_id], *more)
    except InputError:
        return False
    return True
