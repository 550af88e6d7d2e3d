"""The stages that nnU-Net does: plan, data of a round, training, prediction; each recorded in the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnunet_sam2.cohort.cohort import IGNORE, Cohort
from nnunet_sam2.cohort.labels import BACKGROUND
from nnunet_sam2.labelling.job import CONFIDENCE
from nnunet_sam2.progress import say
from nnunet_sam2.rounds import nnunet
from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.ledger import StageResult
from nnunet_sam2.rounds.pseudo_labels import Fused
from nnunet_sam2.storage import file_hash
from nnunet_sam2.support.library import PROBABILITIES
from nnunet_sam2.trainers.settings import RoundSettings


@dataclass(frozen=True, kw_only=True)
class Student:
    """Hold the nnU-Net of one round."""

    number: int
    configuration: str
    checkpoint: Path
    validation_dice: float | None
    """Mean Dice on the fold's held-out human labels; None where there are none."""
    digest: str
    postprocessing: nnunet.Postprocessing | None = None
    """What is done to its labels; None where nothing is held out to decide it on, or an earlier version trained it."""


class TrainingStages:
    """Run what nnU-Net does in one run; every method may be called again and then returns what is there."""

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self.plans = run.options.plans

    def prepare(self) -> None:
        """Fingerprint, plan and preprocess: plans from the labelled cases alone, images of the unlabelled ones once."""

        def work() -> StageResult:
            nnunet.plan_and_preprocess(
                self.run.folders,
                self.run.cohort,
                self.run.options.configuration,
                log=self.run.logs / "plan_and_preprocess.log",
                plans=self.plans,
                planner=nnunet.PLANNERS.get(self.plans),
                hang_minutes=self.run.options.hang_minutes,
            )
            folds = nnunet.write_splits(self.run.folders, self.run.cohort)
            nnunet.preprocess_unlabelled(
                self.run.folders,
                self.run.cohort,
                self.run.options.configuration,
                [c.case_id for c in self.run.cohort.unlabelled],
                plans=self.plans,
            )
            preprocessed = nnunet.preprocessed_labelled(
                self.run.folders, self.run.options.configuration, plans=self.plans
            )
            return StageResult(
                files=(self.run.folders.preprocessed / "dataset_fingerprint.json", *preprocessed),
                info={"folds": folds},
            )

        partly = _partly_annotated(self.run.cohort)
        inputs = {
            "configuration": self.run.options.configuration,
            **({"plans": self.plans} if self.plans != nnunet.PLANS else {}),
            "cases": {c.case_id: [c.role.value, c.patient, c.voxel_hash] for c in self.run.cohort.cases},
            "labels": self.run.human_label_hashes,
            **({"annotated": partly} if partly else {}),
        }
        done = self.run.ledger.run_stage(
            "setup/plan", inputs, work, what="nnU-Net plans and preprocesses; plans see the labelled cases alone"
        )
        nnunet.require_splits(self.run.folders, done["info"]["folds"])
        if partly:
            self._tell_unanswered()

    def _tell_unanswered(self) -> None:
        """Say which classes no case that the fold trains on is annotated for: supports and training lack them alike."""
        training = [c for c in self.run.cohort.labelled if c.case_id not in set(self.run.validation_ids)]
        names = [
            name
            for name, value in self.run.cohort.labels.items()
            if name not in (BACKGROUND, IGNORE)
            and not any(all(map(c.answers_for, value if isinstance(value, list) else [value])) for c in training)
        ]
        if names:
            say(
                f"note: no case that fold {self.run.fold} trains on is annotated for {', '.join(names)}, which is "
                "learnt as background: take another fold with -f, or -f all"
            )

    def make_data(
        self, number: int, *, labels: Fused | None, warm_start: Student | None = None, final: bool = False
    ) -> None:
        """Build the round's immutable configuration: human labels and, from round 1 on, pseudo-labels."""
        name = self.run.configuration_name(number, final=final)
        settings = self._settings(number, warm_start, final=final)
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
                human_cases=labels.human_cases if labels else (),
                labels=labels.folder if labels else None,
                confidence=labels.folder / CONFIDENCE if labels else None,
                probabilities=labels.folder / PROBABILITIES if labels and settings.soft_targets else None,
                overrides=self.run.overrides,
                plans=self.plans,
            )
            return StageResult(
                files=made.hashed_files,
                info={
                    "round": number,
                    "configuration": name,
                    "final": final,
                    "key": made.key,
                    "pseudo_labelled": len(labels.used_cases) - len(labels.human_cases) if labels else 0,
                },
            )

        self.run.ledger.run_stage(f"r{number:02d}/data", inputs, work, what=f"configuration {name}")

    def train(self, number: int, *, warm_start: Student | None, final: bool = False) -> Student:
        """Train the round's nnU-Net with ``nnUNetv2_train``, from the weights of an earlier one where one is given."""
        name = self.run.configuration_name(number, final=final)
        settings = self._settings(number, warm_start, final=final)
        pretrained = Path(self.run.options.pretrained) if self.run.options.pretrained and not warm_start else None
        # the data stage hashes the configuration without the checkpoint to start from: the digest stands for it here
        inputs = {
            "data": self.run.digest(f"r{number:02d}/data"),
            "warm_start": warm_start.digest if warm_start else None,
            **({"pretrained": file_hash(pretrained)} if pretrained else {}),
        }

        def work() -> StageResult:
            trained = nnunet.train(
                self.run.folders,
                name,
                self.run.fold,
                device=self.run.options.device,
                log=self.run.logs / f"{name}_train.log",
                threads=self.run.options.threads,
                pretrained=pretrained,
                plans=self.plans,
                hang_minutes=self.run.options.hang_minutes,
                note=self.run.ledger.note_retry,
            )
            validation = (
                nnunet.read_validation(self.run.folders, name, self.run.fold, plans=self.plans)
                if self.run.validation_ids
                else None
            )
            files = [trained.checkpoint] + ([trained.summary] if trained.summary else [])
            decided = self._decide_postprocessing(name) if self.run.validation_ids else None
            if decided is not None:
                files += nnunet.write_postprocessing(
                    nnunet.model_folder(self.run.folders, name, plans=self.plans), decided
                )
            return StageResult(
                files=tuple(files),
                info={
                    "iterations": settings.num_epochs * settings.num_iterations_per_epoch,
                    "validation_dice": validation.mean if validation else None,
                    "validation_by_class": {k: v for k, v in validation.classes.items() if v is not None}
                    if validation
                    else {},
                    "checkpoint": str(trained.checkpoint.relative_to(self.run.folders.results)),
                    "postprocessing": decided.to_json() if decided else None,
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
            digest=event["digest"],
            postprocessing=nnunet.Postprocessing.from_json(decided)
            if (decided := event["info"].get("postprocessing"))
            else None,
        )

    def _settings(self, number: int, warm_start: Student | None, *, final: bool) -> RoundSettings:
        return self.run.settings(number, final=final, warm_start=warm_start.checkpoint if warm_start else None)

    def _decide_postprocessing(self, configuration: str) -> nnunet.Postprocessing:
        """Decide the post-processing on the fold's held-out cases, and say what it is."""
        folder = nnunet.fold_folder(self.run.folders, configuration, self.run.fold, plans=self.plans) / "validation"
        files = {name: folder / f"{name}{self.run.cohort.file_ending}" for name in self.run.validation_ids}
        decided = nnunet.decide_postprocessing(self.run.cohort, files)
        say(f"post-processing of {configuration}, decided on held-out patients: {decided.described(self.run.cohort)}")
        return decided

    def predict(self, student: Student) -> None:
        """Let the student segment the unlabelled cases, and the validation cases that check what prompts can do."""
        out = self.run.round_folder(student.number) / "student"
        cases = [*self.run.cohort.unlabelled, *(self.run.cohort.case(c) for c in self.run.validation_ids)]
        steps = student.postprocessing.steps if student.postprocessing else ()

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
                postprocessing=steps,
                plans=self.plans,
                threads=self.run.options.threads,
                hang_minutes=self.run.options.hang_minutes,
                note=self.run.ledger.note_retry,
            )
            probabilities = [out / PROBABILITIES / f"{c.case_id}.npz" for c in cases]
            return StageResult(files=(*files, *probabilities))

        self.run.ledger.run_stage(
            f"r{student.number:02d}/predict",
            {
                "student": student.digest,
                "cases": [c.case_id for c in cases],
                **({"postprocessing": [list(step) for step in steps]} if steps else {}),
            },
            work,
            what=f"the student segments {len(cases)} cases",
        )


def _partly_annotated(cohort: Cohort) -> dict[str, list[int]]:
    known = {case.case_id: case.known_classes for case in cohort.labelled}
    return {case_id: list(values) for case_id, values in known.items() if values is not None}
