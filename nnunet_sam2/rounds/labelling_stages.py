"""The stages that make labels: SAM 2's, judged, fused with the student's; each recorded in the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Addition, Cohort
from nnunet_sam2.labelling.job import label_files
from nnunet_sam2.labelling.labeller import label_cases
from nnunet_sam2.labelling.leave_one_out import DiceTable, estimated_quality
from nnunet_sam2.labelling.quality.calibration import Calibration
from nnunet_sam2.labelling.quality.folder import measure_folder, read_folder
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.quality.record import calibration_of, read_estimates
from nnunet_sam2.labelling.records import record_path
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.decisions.holds import Holds, holds_to_json
from nnunet_sam2.rounds.device_memory import on_cpu_if_full
from nnunet_sam2.rounds.ledger import StageResult
from nnunet_sam2.rounds.pseudo_labels import Fused, fuse_cases
from nnunet_sam2.rounds.training_stages import Student
from nnunet_sam2.storage import read_json
from nnunet_sam2.support.library import PROBABILITIES


@dataclass(frozen=True, kw_only=True)
class SupportLabels:
    """Hold what SAM 2 made of the unlabelled cases from the supports alone."""

    folder: Path
    quality: dict[int, float]
    """Dice of each class on labelled cases, each labelled from the others; empty where there is just one."""
    estimates: dict[str, DiceTable]
    """Estimated Dice of each unlabelled case and class."""
    calibration: Calibration
    digest: str


class LabellingStages:
    """Make the labels of one run; every method may be called again and then returns what is there."""

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self._support_labels: SupportLabels | None = None
        self._drawn: Mapping[str, Addition] = {}  # what people drew during the run and SAM 2 was prompted with

    def label_from_supports(self, number: int = 0, holds: Holds | None = None) -> SupportLabels:
        """Label the unlabelled cases by SAM 2 from the supports, and the labelled ones to see how good that is.

        Whole labels that people drew while the run went on are supports as well, from the round on in which they hold:
        in that round all is labelled anew, otherwise what there is stays.
        """
        known = self.run.added_before
        drawn = {
            case_id: hold.human
            for case_id, hold in sorted((holds or {}).items())
            if hold.human is not None and hold.whole_human and not hold.taken_out and hold.human != known.get(case_id)
        }
        if self._support_labels is None or drawn != self._drawn:
            self._drawn, self._support_labels = drawn, self._label_from(drawn, f"r{number:02d}" if drawn else "setup")
        return self._support_labels

    def _label_from(self, drawn: Mapping[str, Addition], phase: str) -> SupportLabels:
        out = self.run.folder / (f"{phase}/sam2" if drawn else "sam2")
        cohort, before = self.run.support_cohort(drawn), self.run.added_before
        supports = [*self.run.support_ids, *(case_id for case_id in drawn if case_id not in before)]
        inputs = {
            "setup": self.run.digest("setup/plan"),
            "supports": supports,
            **_to_json("added", before),
            **_to_json("drawn", drawn),
            "strategy": self.run.options.strategy,
            "strategy_options": self.run.options.strategy_options,
            "sam2": self.run.sam2_identity,
            "image_size": self.run.options.image_size,
            "seed": self.run.options.seed,
        }
        unlabelled = [c.case_id for c in self.run.cohort.unlabelled]
        checkable = [c.case_id for c in self.run.cohort.labelled if set(supports) - {c.case_id}]

        def check() -> StageResult:
            records, files = self._label(
                cohort,
                checkable,
                supports,
                self.run.options.strategy,
                out / "labelled",
                calibrate_on=checkable,
            )
            quality = estimated_quality(records, self.run.cohort.class_values)
            return StageResult(files=files, info={"dice": {str(v): d for v, d in quality.items() if d is not None}})

        checked = self.run.ledger.run_stage(
            f"{phase}/sam2_quality",
            {**inputs, "quality": QualityOptions().looked_at},
            check,
            what="SAM 2 labels the labelled cases, each from the others: the estimates of all others follow them",
        )
        calibration = calibration_of(
            [read_json(record_path(out / "labelled", case_id)) for case_id in checkable], self.run.cohort.class_values
        )

        def label() -> StageResult:
            _, files = self._label(
                cohort, unlabelled, supports, self.run.options.strategy, out / "unlabelled", calibration=calibration
            )
            return StageResult(files=files, info={"sam2": self.run.backend.spec.origin, "cases": len(unlabelled)})

        # Labels that came before the run are supports as well, so that counts alone would not tell.
        spared = len({c.case_id for c in self.run.cohort.labelled} - set(supports))
        held_out = f", with {spared} held out for validation" if spared else ""
        by_hand = f", {len(drawn)} of them drawn since the run began" if drawn else ""
        labelled = self.run.ledger.run_stage(
            f"{phase}/sam2",
            {**inputs, "quality": checked["digest"]},
            label,
            what=f"SAM 2 labels {len(unlabelled)} cases from {len(supports)} supports{by_hand}{held_out}",
        )
        return SupportLabels(
            folder=out / "unlabelled",
            quality={int(value): dice for value, dice in checked["info"]["dice"].items()},
            estimates={c: read_estimates(read_json(record_path(out / "unlabelled", c))) for c in unlabelled},
            calibration=calibration,
            digest=labelled["digest"],
        )

    def refine(self, number: int, student: Student) -> Path | None:
        """Prompt SAM 2 with the student's predictions; return the refined probabilities, None where it cannot help.

        By the run's own strategy where that takes a student, else by ``prompted``. Whether a class gains by it is
        checked on the fold's validation cases, which the student has not seen.
        """
        own = self.run.options.strategy
        takes_student = getattr(make_strategy(own, self.run.options.strategy_options), "uses_student", False)
        strategy = own if takes_student else "prompted"
        if not self.run.validation_ids:
            return None
        out = self.run.round_folder(number) / "prompted"
        predicted = self.run.round_folder(student.number) / "student" / PROBABILITIES
        inputs = {"student": student.digest, "sam2": self.run.sam2_identity, "image_size": self.run.options.image_size}
        if strategy != "prompted":
            inputs["strategy"] = strategy

        def work() -> StageResult:
            _, files = self._label(
                self.run.support_cohort(),
                [c.case_id for c in self.run.cohort.unlabelled],
                self.run.validation_ids,
                strategy,
                out,
                student_probabilities=predicted,
            )
            return StageResult(files=files)

        self.run.ledger.run_stage(
            f"r{number:02d}/refine", inputs, work, what=f"SAM 2, prompted by the student ({strategy})"
        )
        return out / PROBABILITIES

    def fuse(
        self,
        number: int,
        supports: SupportLabels,
        student: Student | None,
        refined: Path | None,
        *,
        previous: Fused | None,
        holds: Holds | None = None,
    ) -> Fused:
        """Fuse SAM 2's labels with the student's by their quality on human labels, and apply people's word."""
        return self._fuse(
            f"r{number:02d}/fuse",
            self.run.round_folder(number) / "labels",
            supports,
            student,
            refined,
            previous,
            holds or {},
            info={"round": number},
            what=f"labels of round {number}",
        )

    def finish(self, best: Student, supports: SupportLabels, *, holds: Holds | None = None) -> Fused:
        """Write the run's own labels: SAM 2's, fused with what the best round's model says (predicted before)."""
        return self._fuse(
            "finish/labels",
            self.run.folder / "labels",
            supports,
            best,
            None,
            None,
            holds or {},
            info={"best_round": best.number},
            what=f"final labels, with the model of round {best.number}",
        )

    def judge(self, student: Student) -> str:
        """Look at the student's labels as at SAM 2's, from the supports; return the stage's digest."""
        cases = [c.case_id for c in self.run.cohort.unlabelled]

        def work() -> StageResult:
            files = on_cpu_if_full(
                self.run,
                lambda backend: measure_folder(
                    self.run.support_cohort(),
                    cases,
                    support_ids=self.run.support_ids,
                    backend=backend,
                    labels=self.run.round_folder(student.number) / "student",
                    out=self._judged(student),
                ),
            )
            return StageResult(files=files)

        predicted = self.run.digest(f"r{student.number:02d}/predict")
        inputs = {
            "predicted": predicted,
            "supports": self.run.support_ids,
            "sam2": self.run.sam2_identity,
            "image_size": self.run.options.image_size,
            "quality": QualityOptions().looked_at,
        }
        done = self.run.ledger.run_stage(
            f"r{student.number:02d}/quality",
            inputs,
            work,
            what=f"the student's labels of {len(cases)} cases are judged",
        )
        return str(done["digest"])

    def _fuse(
        self,
        stage: str,
        out: Path,
        supports: SupportLabels,
        student: Student | None,
        refined: Path | None,
        previous: Fused | None,
        holds: Holds,
        *,
        info: Mapping[str, Any],
        what: str,
    ) -> Fused:
        validation = student.validation_by_value if student else {}
        judged = self.judge(student) if student else None
        unlabelled = [c.case_id for c in self.run.cohort.unlabelled]
        # Estimates that nobody calibrated weigh and scale, but are no ground to leave anything out.
        least = self.run.options.least_quality if supports.calibration.calibrated else 0.0
        inputs = {
            "supports": supports.digest,
            "student": student.digest if student else None,
            "judged": judged,
            "least_quality": least,
            "refined": refined is not None,
            "sam2_quality": {str(v): q for v, q in supports.quality.items()},
            "validation": {str(v): q for v, q in validation.items()},
            "previous": previous.digest if previous else None,
            **({"review": holds_to_json(holds)} if holds else {}),
        }

        def work() -> StageResult:
            predicted = self.run.round_folder(student.number) / "student" if student else None
            fused = fuse_cases(
                self.run.cohort,
                sam2=supports.folder,
                student=predicted,
                student_probabilities=refined or (predicted and predicted / PROBABILITIES),
                sam2_quality=supports.quality,
                validation=validation,
                validation_cases=len(self.run.validation_ids),
                out=out,
                previous=previous.folder if previous else None,
                sam2_estimates=supports.estimates,
                student_seen=read_folder(self._judged(student), unlabelled) if student else None,
                calibration=supports.calibration,
                least_quality=least,
                holds=holds,
                run=self.run.folder,
            )
            return StageResult(files=fused.files(self.run.cohort.file_ending), info={**info, **fused.to_json()})

        event = self.run.ledger.run_stage(stage, inputs, work, what=what)
        return Fused.from_json(out, event["info"], digest=event["digest"])

    def _label(
        self,
        cohort: Cohort,
        case_ids: Sequence[str],
        support_ids: Sequence[str],
        strategy: str,
        out: Path,
        *,
        student_probabilities: Path | None = None,
        calibration: Calibration | None = None,
        calibrate_on: Sequence[str] = (),
    ) -> tuple[list[dict[str, Any]], tuple[Path, ...]]:
        settings = self.run.options.strategy_options if strategy == self.run.options.strategy else {}
        records = on_cpu_if_full(
            self.run,
            lambda backend: label_cases(
                cohort=cohort,
                case_ids=case_ids,
                support_ids=support_ids,
                strategy=make_strategy(strategy, settings),
                backend=backend,
                out=out,
                seed=self.run.options.seed,
                save_probabilities=True,
                student_probabilities=student_probabilities,
                quality=QualityOptions() if calibration is not None or calibrate_on else None,
                calibration=calibration,
                calibrate_on=calibrate_on,
            ),
        )
        ending = self.run.cohort.file_ending
        files = tuple(path for case_id in case_ids for path in label_files(out, case_id, ending, probabilities=True))
        return records, files

    def _judged(self, student: Student) -> Path:
        return self.run.round_folder(student.number) / "student" / "quality"


def _to_json(name: str, labels: Mapping[str, Addition]) -> dict[str, Any]:
    return {name: {case_id: addition.to_json() for case_id, addition in labels.items()}} if labels else {}
