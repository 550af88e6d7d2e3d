"""The stages of a run, each recorded in the ledger with what went in and what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_sam2.labelling.job import CONFIDENCE, label_files
from nnunet_sam2.labelling.labeller import label_cases
from nnunet_sam2.labelling.leave_one_out import DiceTable, estimated_quality
from nnunet_sam2.labelling.quality.calibration import Calibration
from nnunet_sam2.labelling.quality.folder import measure_folder, read_folder
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.quality.record import calibration_of, read_estimates
from nnunet_sam2.labelling.records import record_path
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.rounds import nnunet
from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.ledger import StageResult
from nnunet_sam2.rounds.pseudo_labels import Fused, fuse_cases
from nnunet_sam2.storage import read_json
from nnunet_sam2.support.library import PROBABILITIES


@dataclass(frozen=True, kw_only=True)
class Student:
    """Hold the nnU-Net of one round."""

    number: int
    configuration: str
    checkpoint: Path
    validation_dice: float | None
    """Mean Dice on the fold's held-out human labels; None where there are none."""
    validation_by_class: dict[str, float]
    digest: str


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


class Stages:
    """Run the stages of one run; every method may be called again and then returns what is there."""

    def __init__(self, run: RunContext) -> None:
        self.run = run

    # -- once a run ---------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Fingerprint, plan and preprocess: plans from the labelled cases alone, images of the unlabelled ones once."""

        def work() -> StageResult:
            nnunet.plan_and_preprocess(
                self.run.folders,
                self.run.cohort,
                self.run.options.configuration,
                log=self.run.logs / "plan_and_preprocess.log",
            )
            folds = nnunet.write_splits(self.run.folders, self.run.cohort)
            nnunet.preprocess_unlabelled(
                self.run.folders,
                self.run.cohort,
                self.run.options.configuration,
                [c.case_id for c in self.run.cohort.unlabelled],
            )
            return StageResult(
                files=(self.run.folders.preprocessed / "dataset_fingerprint.json",), info={"folds": folds}
            )

        inputs = {
            "configuration": self.run.options.configuration,
            "cases": {c.case_id: [c.role.value, c.patient, c.voxel_hash] for c in self.run.cohort.cases},
            "labels": self.run.human_label_hashes,
        }
        self.run.ledger.run_stage(
            "setup/plan", inputs, work, what="nnU-Net plans and preprocesses; plans see the labelled cases alone"
        )

    def label_from_supports(self) -> SupportLabels:
        """Label the unlabelled cases by SAM 2 from the supports, and the labelled ones to see how good that is."""
        out = self.run.folder / "sam2"
        inputs = {
            "setup": self.run.digest("setup/plan"),
            "supports": self.run.support_ids,
            "strategy": self.run.options.strategy,
            "strategy_options": self.run.options.strategy_options,
            "sam2": self.run.sam2_identity,
            "image_size": self.run.options.image_size,
            "seed": self.run.options.seed,
        }
        unlabelled = [c.case_id for c in self.run.cohort.unlabelled]
        checkable = [c.case_id for c in self.run.cohort.labelled if set(self.run.support_ids) - {c.case_id}]

        def check() -> StageResult:
            records, files = self._label(
                checkable, self.run.support_ids, self.run.options.strategy, out / "labelled", calibrate_on=checkable
            )
            quality = estimated_quality(records, self.run.cohort.class_values)
            return StageResult(files=files, info={"dice": {str(v): d for v, d in quality.items() if d is not None}})

        checked = self.run.ledger.run_stage(
            "setup/sam2_quality",
            {**inputs, "quality": QualityOptions().looked_at},
            check,
            what="SAM 2 labels the labelled cases, each from the others: the estimates of all others follow them",
        )
        calibration = calibration_of(
            [read_json(record_path(out / "labelled", case_id)) for case_id in checkable], self.run.cohort.class_values
        )

        def label() -> StageResult:
            _, files = self._label(
                unlabelled,
                self.run.support_ids,
                self.run.options.strategy,
                out / "unlabelled",
                calibration=calibration,
            )
            return StageResult(files=files, info={"sam2": self.run.backend.spec.origin, "cases": len(unlabelled)})

        labelled = self.run.ledger.run_stage(
            "setup/sam2",
            {**inputs, "quality": checked["digest"]},
            label,
            what=f"SAM 2 labels {len(unlabelled)} cases from {len(self.run.support_ids)} supports",
        )
        return SupportLabels(
            folder=out / "unlabelled",
            quality={int(value): dice for value, dice in checked["info"]["dice"].items()},
            estimates={c: read_estimates(read_json(record_path(out / "unlabelled", c))) for c in unlabelled},
            calibration=calibration,
            digest=labelled["digest"],
        )

    # -- every round --------------------------------------------------------------------------------------------

    def refine(self, number: int, student: Student) -> Path | None:
        """Prompt SAM 2 with the student's predictions; return the refined probabilities, None where it cannot help.

        Whether a class gains by it is checked on the fold's validation cases, which the student has not seen.
        """
        if not self.run.validation_ids:
            return None
        out = self.run.round_folder(number) / "prompted"
        predicted = self.run.round_folder(student.number) / "student" / PROBABILITIES
        inputs = {"student": student.digest, "sam2": self.run.sam2_identity, "image_size": self.run.options.image_size}

        def work() -> StageResult:
            _, files = self._label(
                [c.case_id for c in self.run.cohort.unlabelled],
                self.run.validation_ids,
                "prompted",
                out,
                student_probabilities=predicted,
            )
            return StageResult(files=files)

        self.run.ledger.run_stage(f"r{number:02d}/refine", inputs, work, what="SAM 2, prompted by the student")
        return out / PROBABILITIES

    def fuse(
        self,
        number: int,
        supports: SupportLabels,
        student: Student | None,
        refined: Path | None,
        *,
        previous: Fused | None,
    ) -> Fused:
        """Fuse SAM 2's labels with the student's by their quality on human labels, voxel by voxel."""
        return self._fuse(
            f"r{number:02d}/fuse",
            self.run.round_folder(number) / "labels",
            supports,
            student,
            refined,
            previous,
            info={"round": number},
            what=f"labels of round {number}",
        )

    def finish(self, best: Student, supports: SupportLabels) -> Fused:
        """Write the run's own labels: SAM 2's, fused with what the best round's model says."""
        self.predict(best)
        return self._fuse(
            "finish/labels",
            self.run.folder / "labels",
            supports,
            best,
            None,
            None,
            info={"best_round": best.number},
            what=f"final labels, with the model of round {best.number}",
        )

    def make_data(self, number: int, *, labels: Fused | None, final: bool = False) -> None:
        """Build the round's immutable configuration: human labels and, from round 1 on, pseudo-labels."""
        name = self.run.options.round_configuration(number, final=final)
        settings = self.run.settings(number, final=final)
        inputs = {
            "setup": self.run.digest("setup/plan"),
            "labels": labels.digest if labels else None,
            "settings": settings.to_json(),
            "configuration": name,
        }

        def work() -> StageResult:
            made = nnunet.make_round_configuration(
                self.run.folders,
                self.run.cohort,
                base_configuration=self.run.options.configuration,
                name=name,
                settings=settings,
                pseudo_cases=labels.used_cases if labels else (),
                labels=labels.folder if labels else None,
                confidence=labels.folder / CONFIDENCE if labels else None,
                overrides=self.run.overrides,
            )
            return StageResult(
                info={
                    "round": number,
                    "configuration": name,
                    "final": final,
                    "key": made.key,
                    "pseudo_labelled": len(labels.used_cases) if labels else 0,
                }
            )

        self.run.ledger.run_stage(f"r{number:02d}/data", inputs, work, what=f"configuration {name}")

    def train(self, number: int, *, warm_start: Student | None, final: bool = False) -> Student:
        """Train the round's nnU-Net with ``nnUNetv2_train``; from round 1 on it starts with the last one's weights."""
        name = self.run.options.round_configuration(number, final=final)
        settings = self.run.settings(number, final=final)
        # the data stage hashes the configuration without the checkpoint to start from: the digest stands for it here
        inputs = {
            "data": self.run.digest(f"r{number:02d}/data"),
            "warm_start": warm_start.digest if warm_start else None,
        }

        def work() -> StageResult:
            trained = nnunet.train(
                self.run.folders,
                name,
                self.run.fold,
                device=self.run.options.device,
                log=self.run.logs / f"{name}_train.log",
                threads=self.run.options.threads,
            )
            validation = (
                nnunet.read_validation(self.run.folders, name, self.run.fold) if self.run.validation_ids else None
            )
            files = [trained.checkpoint] + ([trained.summary] if trained.summary else [])
            return StageResult(
                files=tuple(files),
                info={
                    "iterations": settings.num_epochs * settings.num_iterations_per_epoch,
                    "validation_dice": validation.mean if validation else None,
                    "validation_by_class": {k: v for k, v in validation.classes.items() if v is not None}
                    if validation
                    else {},
                    "checkpoint": str(trained.checkpoint.relative_to(self.run.folders.results)),
                },
            )

        event = self.run.ledger.run_stage(
            f"r{number:02d}/train",
            inputs,
            work,
            what=f"nnUNetv2_train {self.run.folders.dataset_id} {name} {self.run.fold}: "
            f"{settings.num_epochs} epochs of {settings.num_iterations_per_epoch} iterations",
        )
        return Student(
            number=number,
            configuration=name,
            checkpoint=self.run.folders.results / event["info"]["checkpoint"],
            validation_dice=event["info"]["validation_dice"],
            validation_by_class=event["info"]["validation_by_class"],
            digest=event["digest"],
        )

    def predict(self, student: Student) -> None:
        """Let the student segment the unlabelled cases, and the validation cases that check what prompts can do."""
        out = self.run.round_folder(student.number) / "student"
        cases = [*self.run.cohort.unlabelled, *(self.run.cohort.case(c) for c in self.run.validation_ids)]

        def work() -> StageResult:
            files = nnunet.predict_cases(
                self.run.folders,
                student.configuration,
                [self.run.fold],
                {c.case_id: self.run.cohort.image_paths(c) for c in cases},
                out,
                device=self.run.options.device,
                log=self.run.logs / f"{student.configuration}_predict.log",
                save_probabilities=True,
                threads=self.run.options.threads,
            )
            probabilities = [out / PROBABILITIES / f"{c.case_id}.npz" for c in cases]
            return StageResult(files=(*files, *probabilities))

        self.run.ledger.run_stage(
            f"r{student.number:02d}/predict",
            {"student": student.digest, "cases": [c.case_id for c in cases]},
            work,
            what=f"the student segments {len(cases)} cases",
        )

    def judge(self, student: Student) -> str:
        """Look at the student's labels as at SAM 2's, from the supports; return the stage's digest."""
        cases = [c.case_id for c in self.run.cohort.unlabelled]

        def work() -> StageResult:
            files = measure_folder(
                self.run.cohort,
                cases,
                support_ids=self.run.support_ids,
                backend=self.run.backend,
                labels=self.run.round_folder(student.number) / "student",
                out=self._judged(student),
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

    # -- what the stages share ----------------------------------------------------------------------------------

    def _fuse(
        self,
        stage: str,
        out: Path,
        supports: SupportLabels,
        student: Student | None,
        refined: Path | None,
        previous: Fused | None,
        *,
        info: Mapping[str, Any],
        what: str,
    ) -> Fused:
        validation = self._quality_by_value(student) if student else {}
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
            )
            return StageResult(files=fused.files(self.run.cohort.file_ending), info={**info, **fused.to_json()})

        event = self.run.ledger.run_stage(stage, inputs, work, what=what)
        return Fused.from_json(out, event["info"], digest=event["digest"])

    def _label(
        self,
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
        records = label_cases(
            cohort=self.run.cohort,
            case_ids=case_ids,
            support_ids=support_ids,
            strategy=make_strategy(strategy, settings),
            backend=self.run.backend,
            out=out,
            seed=self.run.options.seed,
            save_probabilities=True,
            student_probabilities=student_probabilities,
            quality=QualityOptions() if calibration is not None or calibrate_on else None,
            calibration=calibration,
            calibrate_on=calibrate_on,
        )
        ending = self.run.cohort.file_ending
        files = tuple(path for case_id in case_ids for path in label_files(out, case_id, ending, probabilities=True))
        return records, files

    def _judged(self, student: Student) -> Path:
        return self.run.round_folder(student.number) / "student" / "quality"

    def _quality_by_value(self, student: Student) -> dict[int, float]:
        """Give each label value the validation Dice of its class, or the mean of the regions that hold it."""
        quality: dict[int, list[float]] = {}
        for name, dice in student.validation_by_class.items():
            for value in name.strip("()").split(","):
                if value.strip():
                    quality.setdefault(int(value), []).append(dice)
        return {value: sum(dices) / len(dices) for value, dices in quality.items()}
