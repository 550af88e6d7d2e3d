"""One labelling job: what a case's label depends on, and how one case is read, labelled and written."""

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
from nnunet_sam2.labelling.class_groups import GroupLabeller, GroupProbe
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import FusionOptions
from nnunet_sam2.labelling.leave_one_out import dice_by_class, of_other_patients
from nnunet_sam2.labelling.member import PseudoLabel
from nnunet_sam2.labelling.quality.calibration import Calibration
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.quality.record import quality_record, read_features
from nnunet_sam2.labelling.records import record_path
from nnunet_sam2.labelling.registry import options_json
from nnunet_sam2.labelling.strategy import PreparesCohort, Strategy
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.storage import file_hash, read_json, value_hash, write_json
from nnunet_sam2.support.cases import Query, Support
from nnunet_sam2.support.library import PROBABILITIES, load_query, load_supports, write_probabilities
from nnunet_sam2.support.showing import Showing
from nnunet_sam2.volumes import read_label, write_label, write_map

CONFIDENCE = "confidence"
"""Folder of the confidence maps beside the labels."""

_VERSION = 3
"""Raised when the same inputs give other labels than before, so that old ones are not taken for current."""


def label_files(out: Path, case_id: str, file_ending: str, *, probabilities: bool = False) -> tuple[Path, ...]:
    """Name the files of one labelled case: label, confidence, record and, where kept, probabilities."""
    files = [
        out / f"{case_id}{file_ending}",
        out / CONFIDENCE / f"{case_id}{file_ending}",
        record_path(out, case_id),
    ]
    return (*files, out / PROBABILITIES / f"{case_id}.npz") if probabilities else tuple(files)


@dataclass(frozen=True, kw_only=True)
class Job:
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
    showing: Showing
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
                "case": [case.case_id, case.patient, case.voxel_hash, case.geometry.to_json()],
                "supports": [self._support_identity(cohort.case(case_id)) for case_id in self.support_ids],
                "human_label": self._label_hash(case) if case.role is Role.LABELLED else None,
                **({"annotated": case.known_classes} if case.known_classes else {}),
                "class_values": cohort.class_values,
                "ignore_value": cohort.ignore_value,
                "slice_axis": self.slice_axis,
                "shown": self.showing.identity(case),
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

    def prepare(self) -> tuple[list[Support], GroupLabeller, dict[str, Any] | None]:
        """Load the supports and let the strategy check on them what it wants to know."""
        supports = load_supports(
            self.cohort,
            self.support_ids,
            self.backend,
            slice_axis=self.slice_axis,
            student_probabilities=self._student_folder,
            showing=self.showing,
        )
        labeller = GroupLabeller(self.strategy, supports, self.cohort.class_values)
        return supports, labeller, labeller.prepare(self.backend, _CohortCases(job=self))

    def load(self, case: Case) -> Query:
        """Read and encode one case without looking at its label."""
        return load_query(
            self.cohort,
            case,
            self.backend,
            slice_axis=self.slice_axis,
            student_probabilities=self._student_folder,
            showing=self.showing,
        )

    def label(self, case: Case, ready: Ready, key: str) -> dict[str, Any]:
        """Label one case, write its files, the record last, and return the record."""
        values = self.cohort.class_values
        query, supports = self.load(case), ready.supports
        judges = of_other_patients(query, supports)
        # A labelled case shows what labels of new patients are worth. Any other takes what help there is.
        shows = case.role is Role.LABELLED and bool(judges)
        others = judges if shows else [support for support in supports if support.case_id != case.case_id]
        single = single_component_classes([support.label_zyx for support in others], values)
        fusion = dataclasses.replace(self.fusion, single_component_classes=single)
        rng = np.random.default_rng([self.seed, _number(case.case_id)])
        pseudo = ready.labeller.label(query, others, self.backend, rng, fusion)
        hashes = self._write(case, pseudo)
        # As the labelled cases that calibrate: by other patients alone, for a patient's own scans agree with any label.
        features = ready.probe.measure(query, pseudo, judges or others) if ready.probe is not None else None
        record: dict[str, Any] = {
            "case": case.case_id,
            "patient": case.patient,
            "input_key": key,
            "strategy": self.strategy.name,
            "options": options_json(self.strategy.options),
            "fusion": options_json(fusion),
            "sam2": dataclasses.asdict(self.backend.spec),
            "seed": self.seed,
            "supports": [support.case_id for support in others],
            "shown": self.showing.record(query.frames, self.showing.turn(case)),
            "supports_of_the_patient": [s.case_id for s in others if s.patient_id == query.patient_id],
            "prepared": ready.prepared,
            "dice_with_human_label": self._dice(case, supports, pseudo) if shows or not others else None,
            "quality": None if features is None else quality_record(features, self.calibration),
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
        turn = self.showing.turn(case)
        write_label(label, turn.undo(pseudo.label_zyx), case.geometry)
        write_map(confidence, turn.undo(pseudo.confidence_zyx), case.geometry)
        for path in more:
            write_probabilities(path, turn.undo(pseudo.prob_czyx))
        return {path.relative_to(self.out).as_posix(): file_hash(path) for path in (label, confidence, *more)}

    def _dice(self, case: Case, supports: Sequence[Support], pseudo: PseudoLabel) -> dict[str, float | None] | None:
        """Compare with the human label where the case has one to learn from; test and hidden labels are not read."""
        if case.role is not Role.LABELLED:
            return None
        known = next((s.label_zyx for s in supports if s.case_id == case.case_id), None)
        if known is None:
            stored, _ = read_label(self.cohort.label_path(case))
            known = self.showing.turn(case).apply(stored)
        table = dice_by_class(pseudo.label_zyx, known, self.cohort.class_values, ignore_value=self.cohort.ignore_value)
        asked = {v for v in table if case.answers_for(v)} - set(pseudo.record.get("unanswered", ()))
        return {str(value): dice if value in asked else None for value, dice in table.items()}

    @property
    def _student_folder(self) -> Path | None:
        return self.student_probabilities if getattr(self.strategy, "uses_student", False) else None

    def _support_identity(self, case: Case) -> list[Any]:
        hashes = [case.voxel_hash, self._label_hash(case), self._student_hash(case.case_id)]
        identity = [case.case_id, case.patient, *hashes]
        return identity if case.known_classes is None else [*identity, case.known_classes]

    def _label_hash(self, case: Case) -> str:
        return file_hash(self.cohort.label_path(case))

    def _student_hash(self, case_id: str) -> str | None:
        if self._student_folder is None:
            return None
        path = self._student_folder / f"{case_id}.npz"
        return file_hash(path) if path.is_file() else None


class Ready:
    """Hold what is prepared once for all cases of a call, when the first of them is labelled."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._labeller: GroupLabeller | None = None
        self.supports: list[Support] = []
        self.prepared: dict[str, Any] | None = None
        self.probe = GroupProbe(job.cohort.class_values, job.quality) if job.quality is not None else None

    def prepare(self) -> None:
        """Load the supports and let the strategy check them, the first time that it is called."""
        if self._labeller is None:
            self.supports, self._labeller, self.prepared = self._job.prepare()

    @property
    def labeller(self) -> GroupLabeller:
        """Return what labels queries; `prepare` comes before."""
        if self._labeller is None:
            raise ValueError("nothing is prepared yet")
        return self._labeller


@dataclass(frozen=True, kw_only=True)
class _CohortCases(Sequence[Query]):
    """Offer the cohort's cases one by one, read when asked for, so that they never lie in memory together."""

    job: Job

    def __len__(self) -> int:
        return len(_seen_cases(self.job.cohort))

    def __getitem__(self, index: Any) -> Any:
        return self.job.load(_seen_cases(self.job.cohort)[index])


def _seen_cases(cohort: Cohort) -> list[Case]:
    return [case for case in cohort.cases if case.role in (Role.LABELLED, Role.UNLABELLED)]


def _sam2_identity(backend: Sam2Backend) -> dict[str, Any]:
    """Return what changes SAM 2's answers; the checkpoint may be moved and renamed."""
    return {k: v for k, v in dataclasses.asdict(backend.spec).items() if k not in ("name", "origin")}


def _number(text: str) -> int:
    """Turn a case id into a number that does not change between processes, unlike Python's own hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
