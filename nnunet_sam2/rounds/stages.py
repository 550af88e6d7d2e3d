"""The stages of a run, each recorded in the ledger with what went in and what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.labeller import label_cases, label_files
from nnunet_sam2.labelling.leave_one_out import estimated_quality
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.progress import say
from nnunet_sam2.rounds import nnunet
from nnunet_sam2.rounds.ledger import Ledger, StageResult
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.pseudo_labels import Fused, fuse_cases
from nnunet_sam2.storage import file_hash, read_json
from nnunet_sam2.trainers.settings import RoundSettings


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
    digest: str


def load_labeller(options: RunOptions, cache_dir: Path | None) -> Any:
    """Load SAM 2 as the options say; raise `InputError` where it cannot serve the strategy."""
    from nnunet_sam2.sam2.backend import load_backend

    strategy = make_strategy(options.strategy, options.strategy_options)
    backend = load_backend(
        options.sam2,
        device=options.device,
        image_size=options.image_size,
        cache_dir=cache_dir,
        threads=options.threads,
    )
    if strategy.needs_memory and not backend.spec.has_memory:
        raise InputError(
            f"strategy {options.strategy} needs SAM 2's video memory, which {options.sam2} does not hold; "
            "use --strategy transfer or a whole checkpoint"
        )
    return backend


class Stages:
    """Run the stages of one run; every method may be called again and then returns what is there."""

    def __init__(
        self, *, folders: DatasetFolders, cohort: Cohort, options: RunOptions, ledger: Ledger, folder: Path
    ) -> None:
        self.folders = folders
        self.cohort = cohort
        self.options = options
        self.ledger = ledger
        self.folder = folder
        self.logs = folder / "logs"
        self._setup_digest = ""
        self._fused: dict[int, Fused] = {}

    # -- once a run ---------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Fingerprint, plan and preprocess: plans from the labelled cases alone, images of the unlabelled ones once."""

        def work() -> StageResult:
            nnunet.plan_and_preprocess(
                self.folders, self.cohort, self.options.configuration, log=self.logs / "plan_and_preprocess.log"
            )
            folds = nnunet.write_splits(self.folders, self.cohort)
            nnunet.preprocess_unlabelled(
                self.folders, self.cohort, self.options.configuration, [c.case_id for c in self.cohort.unlabelled]
            )
            return StageResult(
                files=(self.folders.preprocessed / "dataset_fingerprint.json",), info={"folds": folds}
            )

        inputs = {
            "configuration": self.options.configuration,
            "cases": {c.case_id: [c.role.value, c.patient, c.voxel_hash] for c in self.cohort.cases},
            "labels": self._human_label_hashes,
        }
        event = self.ledger.run_stage(
            "setup/plan", inputs, work, what="nnU-Net plans and preprocesses; plans see the labelled cases alone"
        )
        self._folds = event["info"]["folds"]
        self._setup_digest = event["digest"]

    def label_from_supports(self) -> SupportLabels:
        """Label the unlabelled cases by SAM 2 from the supports, and the labelled ones to see how good that is."""
        out = self.folder / "sam2"
        inputs = {
            "setup": self._setup_digest,
            "supports": self._support_ids,
            "strategy": self.options.strategy,
            "strategy_options": self.options.strategy_options,
            "sam2": self._sam2_identity,
            "image_size": self.options.image_size,
            "seed": self.options.seed,
        }
        unlabelled = [c.case_id for c in self.cohort.unlabelled]

        def label() -> StageResult:
            _, files = self._label(unlabelled, self._support_ids, self.options.strategy, out / "unlabelled")
            return StageResult(files=files, info={"sam2": self._backend.spec.origin, "cases": len(unlabelled)})

        labelled = self.ledger.run_stage(
            "setup/sam2",
            inputs,
            label,
            what=f"SAM 2 labels {len(unlabelled)} cases from {len(self._support_ids)} supports",
        )

        def check() -> StageResult:
            checkable = [c.case_id for c in self.cohort.labelled if set(self._support_ids) - {c.case_id}]
            records, files = self._label(
                checkable, self._support_ids, self.options.strategy, out / "labelled"
            )
            quality = estimated_quality(records, self.cohort.class_values)
            return StageResult(files=files, info={"dice": {str(v): d for v, d in quality.items() if d is not None}})

        checked = self.ledger.run_stage(
            "setup/sam2_quality", inputs, check, what="SAM 2 labels the labelled cases too, each from the others"
        )
        return SupportLabels(
            folder=out / "unlabelled",
            quality={int(value): dice for value, dice in checked["info"]["dice"].items()},
            digest=labelled["digest"],
        )

    # -- every round --------------------------------------------------------------------------------------------

    def refine(self, number: int, student: Student) -> Path | None:
        """Prompt SAM 2 with the student's predictions; return the refined probabilities, None where it cannot help.

        Whether a class gains by it is checked on the fold's validation cases, which the student has not seen.
        """
        if not self._validation_ids:
            return None
        out = self._round_folder(number) / "prompted"
        predicted = self._round_folder(student.number) / "student" / "probabilities"
        inputs = {"student": student.digest, "sam2": self._sam2_identity, "image_size": self.options.image_size}

        def work() -> StageResult:
            _, files = self._label(
                [c.case_id for c in self.cohort.unlabelled],
                self._validation_ids,
                "prompted",
                out,
                student_probabilities=predicted,
            )
            return StageResult(files=files)

        self.ledger.run_stage(f"r{number:02d}/refine", inputs, work, what="SAM 2, prompted by the student")
        return out / "probabilities"

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
        self._fused[number] = self._fuse(
            f"r{number:02d}/fuse", self._round_folder(number) / "labels", supports, student, refined, previous,
            info={"round": number}, what=f"labels of round {number}",
        )
        return self._fused[number]

    def finish(self, best: Student, supports: SupportLabels) -> Fused:
        """Write the run's own labels: SAM 2's, fused with what the best round's model says."""
        self.predict(best)
        return self._fuse(
            "finish/labels", self.folder / "labels", supports, best, None, None,
            info={"best_round": best.number}, what=f"final labels, with the model of round {best.number}",
        )

    def labels_of(self, number: int) -> Fused:
        """Return the labels of an earlier round."""
        return self._fused[number]

    def make_data(self, number: int, *, labels: Fused | None, final: bool = False) -> None:
        """Build the round's immutable configuration: human labels and, from round 1 on, pseudo-labels."""
        name = self.options.round_configuration(number, final=final)
        settings = self._settings(number, final=final)
        inputs = {
            "setup": self._setup_digest,
            "labels": labels.digest if labels else None,
            "settings": settings.to_json(),
            "configuration": name,
        }

        def work() -> StageResult:
            made = nnunet.make_round_configuration(
                self.folders,
                self.cohort,
                base_configuration=self.options.configuration,
                name=name,
                settings=settings,
                pseudo_cases=labels.used_cases if labels else (),
                labels=labels.folder if labels else None,
                confidence=labels.folder / "confidence" if labels else None,
                overrides=self._overrides,
            )
            return StageResult(
                info={"round": number, "configuration": name, "final": final, "key": made.key,
                      "pseudo_labelled": len(labels.used_cases) if labels else 0}
            )

        self.ledger.run_stage(f"r{number:02d}/data", inputs, work, what=f"configuration {name}")

    def train(self, number: int, *, warm_start: Student | None, final: bool = False) -> Student:
        """Train the round's nnU-Net with ``nnUNetv2_train``; from round 1 on it starts with the last one's weights."""
        name = self.options.round_configuration(number, final=final)
        settings = self._settings(number, final=final)
        # the data stage hashes the configuration without the checkpoint to start from: the digest stands for it here
        inputs = {"data": self._digest(f"r{number:02d}/data"), "warm_start": warm_start.digest if warm_start else None}

        def work() -> StageResult:
            trained = nnunet.train(
                self.folders,
                name,
                self._fold,
                device=self.options.device,
                log=self.logs / f"{name}_train.log",
                threads=self.options.threads,
            )
            validation = nnunet.read_validation(self.folders, name, self._fold) if self._validation_ids else None
            files = [trained.checkpoint] + ([trained.summary] if trained.summary else [])
            return StageResult(
                files=tuple(files),
                info={
                    "iterations": settings.num_epochs * settings.num_iterations_per_epoch,
                    "validation_dice": validation.mean if validation else None,
                    "validation_by_class": {k: v for k, v in validation.classes.items() if v is not None}
                    if validation else {},
                    "checkpoint": str(trained.checkpoint.relative_to(self.folders.results)),
                },
            )

        event = self.ledger.run_stage(
            f"r{number:02d}/train", inputs, work,
            what=f"nnUNetv2_train {self.folders.dataset_id} {name} {self._fold}: "
            f"{settings.num_epochs} epochs of {settings.num_iterations_per_epoch} iterations",
        )
        return Student(
            number=number,
            configuration=name,
            checkpoint=self.folders.results / event["info"]["checkpoint"],
            validation_dice=event["info"]["validation_dice"],
            validation_by_class=event["info"]["validation_by_class"],
            digest=event["digest"],
        )

    def predict(self, student: Student) -> None:
        """Let the student segment the unlabelled cases, and the validation cases that check what prompts can do."""
        out = self._round_folder(student.number) / "student"
        cases = [*self.cohort.unlabelled, *(self.cohort.case(c) for c in self._validation_ids)]

        def work() -> StageResult:
            files = nnunet.predict_cases(
                self.folders,
                student.configuration,
                [self._fold],
                {c.case_id: self.cohort.image_paths(c) for c in cases},
                out,
                device=self.options.device,
                log=self.logs / f"{student.configuration}_predict.log",
                save_probabilities=True,
                threads=self.options.threads,
            )
            probabilities = [out / "probabilities" / f"{c.case_id}.npz" for c in cases]
            return StageResult(files=(*files, *probabilities))

        self.ledger.run_stage(
            f"r{student.number:02d}/predict", {"student": student.digest, "cases": [c.case_id for c in cases]}, work,
            what=f"the student segments {len(cases)} cases",
        )

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
        inputs = {
            "supports": supports.digest,
            "student": student.digest if student else None,
            "refined": refined is not None,
            "sam2_quality": {str(v): q for v, q in supports.quality.items()},
            "validation": {str(v): q for v, q in validation.items()},
            "previous": previous.digest if previous else None,
        }

        def work() -> StageResult:
            predicted = self._round_folder(student.number) / "student" if student else None
            fused = fuse_cases(
                self.cohort,
                sam2=supports.folder,
                student=predicted,
                student_probabilities=refined or (predicted and predicted / "probabilities"),
                sam2_quality=supports.quality,
                validation=validation,
                validation_cases=len(self._validation_ids),
                out=out,
                previous=previous.folder if previous else None,
            )
            return StageResult(files=fused.files(self.cohort.file_ending), info={**info, **fused.to_json()})

        event = self.ledger.run_stage(stage, inputs, work, what=what)
        return Fused.from_json(out, event["info"], digest=event["digest"])

    def _label(
        self,
        case_ids: Sequence[str],
        support_ids: Sequence[str],
        strategy: str,
        out: Path,
        *,
        student_probabilities: Path | None = None,
    ) -> tuple[list[dict[str, Any]], tuple[Path, ...]]:
        settings = self.options.strategy_options if strategy == self.options.strategy else {}
        records = label_cases(
            cohort=self.cohort,
            case_ids=case_ids,
            support_ids=support_ids,
            strategy=make_strategy(strategy, settings),
            backend=self._backend,
            out=out,
            seed=self.options.seed,
            save_probabilities=True,
            student_probabilities=student_probabilities,
        )
        ending = self.cohort.file_ending
        files = tuple(path for case_id in case_ids for path in label_files(out, case_id, ending, probabilities=True))
        return records, files

    @cached_property
    def _backend(self) -> Any:
        backend = load_labeller(self.options, self.folders.results / "nnunet_sam2" / "embeddings")
        say(f"SAM 2: {backend.spec.origin}")
        return backend

    @cached_property
    def _sam2_identity(self) -> str:
        path = Path(self.options.sam2)
        return file_hash(path) if path.is_file() else self.options.sam2

    @cached_property
    def _human_label_hashes(self) -> dict[str, str]:
        return {c.case_id: file_hash(self.cohort.label_path(c)) for c in self.cohort.labelled}

    @cached_property
    def _validation_ids(self) -> list[str]:
        return [] if self._fold == "all" else list(self._folds[int(self._fold)]["val"])

    @cached_property
    def _support_ids(self) -> list[str]:
        labelled = [c.case_id for c in self.cohort.labelled]
        if self.options.supports == "all":
            return labelled
        return [case_id for case_id in labelled if case_id not in set(self._validation_ids)]

    @property
    def _fold(self) -> int | str:
        return self.options.fold if self.options.fold == "all" else int(self.options.fold)

    @cached_property
    def _plans(self) -> Mapping[str, Any]:
        plans: Mapping[str, Any] = read_json(self.folders.preprocessed / f"{nnunet.PLANS}.json")
        return plans

    @cached_property
    def _overrides(self) -> Mapping[str, Any] | None:
        if self.options.profile != "cpu":
            return None
        return nnunet.light_configuration(self._plans, self.options.configuration)

    def _settings(self, number: int, *, final: bool) -> RoundSettings:
        settings = self.options.training(nnunet.light_settings(self._plans, self.options.configuration), final=final)
        warm_start = None
        if number > (1 if self.options.skip_baseline else 0) and not final:
            before = self.options.round_configuration(number - 1)
            folder = nnunet.model_folder(self.folders, before) / f"fold_{self._fold}"
            warm_start = str((folder / "checkpoint_final.pth").relative_to(self.folders.results))
        return replace(
            settings,
            seed=self.options.seed + number,
            warm_start=warm_start,
            pseudo_per_batch=self.options.pseudo_per_batch if number > 0 else None,
        )

    def _round_folder(self, number: int) -> Path:
        return self.folder / f"r{number:02d}"

    def _digest(self, stage: str) -> str:
        for event in reversed(self.ledger.events):
            if event["event"] == "done" and event["stage"] == stage:
                return str(event["digest"])
        raise InputError(f"{self.ledger.path} lacks the stage {stage}; restore the file or start anew with --branch")

    def _quality_by_value(self, student: Student) -> dict[int, float]:
        """Give each label value the validation Dice of its class, or the mean of the regions that hold it."""
        quality: dict[int, list[float]] = {}
        for name, dice in student.validation_by_class.items():
            for value in name.strip("()").split(","):
                if value.strip():
                    quality.setdefault(int(value), []).append(dice)
        return {value: sum(dices) / len(dices) for value, dices in quality.items()}

