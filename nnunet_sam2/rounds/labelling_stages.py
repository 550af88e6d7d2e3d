"""The stages that make labels: SAM 2's, judged, fused with the student's; each recorded in the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_sam2.labelling.quality.folder import measure_folder, read_folder
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.decisions.holds import Holds, holds_to_json
from nnunet_sam2.rounds.device_memory import on_cpu_if_full
from nnunet_sam2.rounds.ledger import StageResult
from nnunet_sam2.rounds.pseudo_labels import FUSION_VERSION, Fused, fuse_cases
from nnunet_sam2.rounds.sources import StudentLabels, weigh_sources
from nnunet_sam2.rounds.support_labels import SupportLabelling, SupportLabels, label_stage
from nnunet_sam2.rounds.training_stages import Student
from nnunet_sam2.support.library import PROBABILITIES


class LabellingStages:
    """Make the labels of one run; every method may be called again and then returns what is there."""

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self._supports = SupportLabelling(run)

    def label_from_supports(self, number: int = 0, holds: Holds | None = None) -> SupportLabels:
        """Label the unlabelled cases by SAM 2 from the supports, and the labelled ones to see how good that is."""
        return self._supports.of_round(number, holds or {})

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
        inputs = {
            "student": student.digest,
            **self.run.several_scans,
            "sam2": self.run.sam2_identity,
            "image_size": self.run.options.image_size,
        }
        if strategy != "prompted":
            inputs["strategy"] = strategy

        def work() -> StageResult:
            _, files = label_stage(
                self.run,
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
            **self.run.several_scans,
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
        judged = self.judge(student) if student else None
        # Estimates that nobody calibrated weigh and scale, but are no ground to leave anything out.
        least = self.run.options.least_quality if supports.calibration.calibrated else 0.0
        inputs = {
            "fusion": FUSION_VERSION,
            "supports": supports.digest,
            "student": student.digest if student else None,
            "held_out": self.run.validation_ids,
            "judged": judged,
            "least_quality": least,
            "refined": refined is not None,
            "previous": previous.digest if previous else None,
            **({"review": holds_to_json(holds)} if holds else {}),
            **({"probabilities": True} if self.run.options.soft_targets else {}),
        }

        def work() -> StageResult:
            fused = fuse_cases(
                self.run.cohort,
                weigh_sources(self.run.cohort, supports, self._predicted(student, refined) if student else None),
                out=out,
                previous=previous.folder if previous else None,
                least_quality=least,
                holds=holds,
                run=self.run.folder,
                keep_probabilities=self.run.options.soft_targets,
            )
            return StageResult(files=fused.files(self.run.cohort.file_ending), info={**info, **fused.to_json()})

        event = self.run.ledger.run_stage(stage, inputs, work, what=what)
        return Fused.from_json(out, event["info"], digest=event["digest"])

    def _predicted(self, student: Student, refined: Path | None) -> StudentLabels:
        folder = self.run.round_folder(student.number) / "student"
        return StudentLabels(
            folder=folder,
            probabilities=refined or folder / PROBABILITIES,
            held_out=self.run.validation_ids,
            seen=read_folder(self._judged(student), [c.case_id for c in self.run.cohort.unlabelled]),
        )

    def _judged(self, student: Student) -> Path:
        return self.run.round_folder(student.number) / "student" / "quality"
