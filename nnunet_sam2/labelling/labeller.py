"""Label cases of a cohort: read, embed, ask the strategy, fuse, write; go on where a killed run stopped."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.cohort.cohort import Case, Cohort, Role
from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import FusionOptions, fuse
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.member import PseudoLabel
from nnunet_sam2.labelling.quality.calibration import Calibration
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.quality.probe import QualityProbe
from nnunet_sam2.labelling.quality.record import calibration_of, quality_record, read_features
from nnunet_sam2.labelling.records import CALIBRATION, record_path
from nnunet_sam2.labelling.registry import options_json
from nnunet_sam2.labelling.strategy import BringsFusion, Limits, Prepares, PreparesCohort, Strategy
from nnunet_sam2.progress import track
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.storage import atomic_path, file_hash, read_json, value_hash, write_json
from nnunet_sam2.support.cases import Query, Support
from nnunet_sam2.support.library import (
    PROBABILITIES,
    cohort_slice_axis,
    load_query,
    load_supports,
)
from nnunet_sam2.volumes import write_label, write_map

CONFIDENCE = "confidence"

_VERSION = 1
"""Raised when the same inputs give other labels than before, so that old ones are not taken for current."""


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

    A case never supports itself: a labelled case is labelled from the other supports (leave-one-out), and its record
    then has ``dice_with_human_label``. A case whose record carries the same inputs and whose files are unchanged is not
    done again. Raises `InputError` before anything is written where something cannot work.

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
    job = _Job(
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
        quality=quality,
        calibration=None,
    )
    ready = _Ready(job)
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


def label_files(out: Path, case_id: str, file_ending: str, *, probabilities: bool = False) -> tuple[Path, ...]:
    """Name the files of one labelled case: label, confidence, record and, where kept, probabilities."""
    files = [
        out / f"{case_id}{file_ending}",
        out / CONFIDENCE / f"{case_id}{file_ending}",
        record_path(out, case_id),
    ]
    return (*files, out / PROBABILITIES / f"{case_id}.npz") if probabilities else tuple(files)


def write_probabilities(path: Path, prob_czyx: np.ndarray) -> None:
    """Write probabilities as uint8 steps of 1/255, compressed, atomically; the same values give the same bytes."""
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, prob_czyx=np.rint(prob_czyx * 255.0).astype(np.uint8))


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Hold what all cases of one call share."""

    cohort: Cohort
    support_ids: tuple[str, ...]
    strategy: Strategy
    backend: Sam2Backend
    out: Path
    seed: int
    save_probabilities: bool
    student_probabilities: Path | None
    fusion: FusionOptions
    slice_axis: int
    quality: QualityOptions | None
    calibration: Calibration | None
    """None for the labelled cases that calibrate."""

    def input_key(self, case: Case) -> str:
        """Compute a hash of everything that the case's label depends on."""
        cohort = self.cohort
        # A strategy that looks at the whole cohort labels a case otherwise when another image changes.
        others: dict[str, Any] = {}
        if isinstance(self.strategy, PreparesCohort):
            others["cohort"] = [[c.case_id, c.voxel_hash] for c in _seen_cases(cohort)]
        if self.quality is not None:
            others["quality"] = self.quality.looked_at
        return value_hash(
            {
                **others,
                "version": _VERSION,
                "case": [case.case_id, case.voxel_hash, case.geometry.to_json()],
                "supports": [self._support_identity(cohort.case(case_id)) for case_id in self.support_ids],
                "human_label": self._label_hash(case) if case.role is Role.LABELLED else None,
                "class_values": cohort.class_values,
                "ignore_value": cohort.ignore_value,
                "slice_axis": self.slice_axis,
                "strategy": [self.strategy.name, options_json(self.strategy.options)],
                "fusion": options_json(self.fusion),
                "sam2": _sam2_identity(self.backend),
                "student": self._student_hash(case.case_id),
                "seed": self.seed,
                "save_probabilities": self.save_probabilities,
            }
        )

    def finished(self, case_id: str, key: str) -> dict[str, Any] | None:
        """Return the record of a case that is done with these inputs and whose files are whole, else None."""
        path = record_path(self.out, case_id)
        if not path.is_file():
            return None
        try:
            record = read_json(path)
        except InputError:
            return None
        if not isinstance(record, dict) or record.get("input_key") != key:
            return None
        for name, expected in record["files"].items():
            if not (self.out / name).is_file() or file_hash(self.out / name) != expected:
                return None
        return record

    def current(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the record with the estimates of this calibration, written anew where others stood in it."""
        if self.quality is None:
            return record
        quality = quality_record(read_features(record), self.calibration)
        if record["quality"] != quality:
            record = {**record, "quality": quality}
            write_json(record_path(self.out, record["case"]), record)
        return record

    def prepare(self) -> tuple[list[Support], dict[str, Any] | None]:
        """Load the supports and let the strategy check on them what it wants to know."""
        supports = load_supports(
            self.cohort,
            self.support_ids,
            self.backend,
            slice_axis=self.slice_axis,
            student_probabilities=self._student_folder,
        )
        if isinstance(self.strategy, PreparesCohort):
            cases = _CohortCases(job=self)
            return supports, self.strategy.prepare_cohort(cases, supports, self.cohort.class_values, self.backend)
        if isinstance(self.strategy, Prepares):
            return supports, self.strategy.prepare(supports, self.cohort.class_values, self.backend)
        return supports, None

    def load(self, case: Case) -> Query:
        """Read and encode one case without looking at its label."""
        return load_query(
            self.cohort,
            case,
            self.backend,
            slice_axis=self.slice_axis,
            student_probabilities=self._student_folder,
        )

    def label(self, case: Case, ready: _Ready, key: str) -> dict[str, Any]:
        """Label one case, write its files, the record last, and return the record."""
        values = self.cohort.class_values
        query, supports = self.load(case), ready.supports
        others = [support for support in supports if support.case_id != case.case_id]
        single = single_component_classes([support.label_zyx for support in others], values)
        fusion = dataclasses.replace(self.fusion, single_component_classes=single)
        rng = np.random.default_rng([self.seed, _number(case.case_id)])
        pseudo = fuse(self.strategy.members(query, others, values, self.backend, rng), values, fusion)
        hashes = self._write(case, pseudo)
        record: dict[str, Any] = {
            "case": case.case_id,
            "input_key": key,
            "strategy": self.strategy.name,
            "options": options_json(self.strategy.options),
            "fusion": options_json(fusion),
            "sam2": dataclasses.asdict(self.backend.spec),
            "seed": self.seed,
            "supports": [support.case_id for support in others],
            "prepared": ready.prepared,
            "dice_with_human_label": self._dice(case, supports, pseudo),
            "quality": ready.probe and quality_record(ready.probe.measure(query, pseudo, others), self.calibration),
            **pseudo.record,
            "files": hashes,
        }
        write_json(record_path(self.out, case.case_id), record)
        return record

    def _write(self, case: Case, pseudo: PseudoLabel) -> dict[str, str]:
        label, confidence, record, *more = label_files(
            self.out, case.case_id, self.cohort.file_ending, probabilities=self.save_probabilities
        )
        # A record of other inputs must not stand beside the new files if the process dies between them.
        record.unlink(missing_ok=True)
        write_label(label, pseudo.label_zyx, case.geometry)
        write_map(confidence, pseudo.confidence_zyx, case.geometry)
        for path in more:
            write_probabilities(path, pseudo.prob_czyx)
        return {path.relative_to(self.out).as_posix(): file_hash(path) for path in (label, confidence, *more)}

    def _dice(self, case: Case, supports: Sequence[Support], pseudo: PseudoLabel) -> dict[str, float | None] | None:
        """Compare with the human label where the case has one to learn from; test and hidden labels are not read."""
        if case.role is not Role.LABELLED:
            return None
        known = next((s.label_zyx for s in supports if s.case_id == case.case_id), None)
        if known is None:
            from nnunet_sam2.volumes import read_label

            known, _ = read_label(self.cohort.label_path(case))
        table = dice_by_class(pseudo.label_zyx, known, self.cohort.class_values, ignore_value=self.cohort.ignore_value)
        return {str(value): dice for value, dice in table.items()}

    @property
    def _student_folder(self) -> Path | None:
        return self.student_probabilities if getattr(self.strategy, "uses_student", False) else None

    def _support_identity(self, case: Case) -> list[str | None]:
        return [case.case_id, case.voxel_hash, self._label_hash(case), self._student_hash(case.case_id)]

    def _label_hash(self, case: Case) -> str:
        return file_hash(self.cohort.label_path(case))

    def _student_hash(self, case_id: str) -> str | None:
        if self._student_folder is None:
            return None
        path = self._student_folder / f"{case_id}.npz"
        return file_hash(path) if path.is_file() else None


class _Ready:
    """Hold what is prepared once for all cases of a call, when the first of them is labelled."""

    def __init__(self, job: _Job) -> None:
        self._job = job

        self._prepared = False
        self.supports: list[Support] = []
        self.prepared: dict[str, Any] | None = None
        self.probe = QualityProbe(job.cohort.class_values, job.quality) if job.quality is not None else None

    def prepare(self) -> None:
        """Load the supports and let the strategy check them, the first time that it is called."""
        if not self._prepared:
            self.supports, self.prepared = self._job.prepare()
            self._prepared = True


def _label_all(job: _Job, case_ids: Sequence[str], ready: _Ready) -> dict[str, dict[str, Any]]:
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


@dataclass(frozen=True, kw_only=True)
class _CohortCases(Sequence[Query]):
    """Offer the cohort's cases one by one, read when asked for, so that they never lie in memory together."""

    job: _Job

    def __len__(self) -> int:
        return len(_seen_cases(self.job.cohort))

    def __getitem__(self, index: Any) -> Any:
        return self.job.load(_seen_cases(self.job.cohort)[index])


def _fusion(strategy: Strategy, asked: FusionOptions) -> FusionOptions:
    return strategy.fusion(asked) if isinstance(strategy, BringsFusion) else asked


def _seen_cases(cohort: Cohort) -> list[Case]:
    return [case for case in cohort.cases if case.role in (Role.LABELLED, Role.UNLABELLED)]


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
        cohort.case(case_id)
        if not uses_student and not [s for s in support_ids if s != case_id]:
            raise InputError(f"case {case_id} has no support left: a case cannot support itself; label another case")
    require_memory(strategy, backend)
    if isinstance(strategy, Limits):
        slice_axis = cohort_slice_axis(cohort)
        for case_id in case_ids:
            strategy.check(case_id, cohort.case(case_id).geometry.shape_zyx[slice_axis])
    if uses_student:
        if student_probabilities is None:
            raise InputError(f"strategy {strategy.name} needs the student's probabilities (--student FOLDER)")
        missing = [c for c in case_ids if not (student_probabilities / f"{c}.npz").is_file()]
        if missing:
            raise InputError(
                f"{student_probabilities / missing[0]}.npz is missing: the student has not predicted it yet"
            )


def _can_label(cohort: Cohort, case_id: str, *more: Any) -> bool:
    """Say whether a case that nobody asked for can be labelled."""
    try:
        _check(cohort, [case_id], *more)
    except InputError:
        return False
    return True


def _sam2_identity(backend: Sam2Backend) -> dict[str, Any]:
    """Return what changes SAM 2's answers; the checkpoint may be moved and renamed."""
    return {k: v for k, v in dataclasses.asdict(backend.spec).items() if k not in ("name", "origin")}


def _number(text: str) -> int:
    """Turn a case id into a number that does not change between processes, unlike Python's own hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
