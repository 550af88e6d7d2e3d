"""What all stages of a run share: its cohort, options and folders, and what follows from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Addition, Cohort, Role
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.labeller import require_memory
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.progress import say
from nnunet_sam2.rounds import disk, nnunet
from nnunet_sam2.rounds.ledger import Ledger
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.state import EMBEDDINGS, RUNS_FOLDER
from nnunet_sam2.sam2.weights.cache import weights_identity
from nnunet_sam2.storage import file_hash
from nnunet_sam2.trainers.settings import RoundSettings


def load_labeller(options: RunOptions, cache_dir: Path | None, *, precision: str | None = None) -> Any:
    """Load SAM 2 as the options say; raise `InputError` where it cannot serve the strategy."""
    from nnunet_sam2.sam2.backend import load_backend

    strategy = make_strategy(options.strategy, options.strategy_options)
    backend = load_backend(
        options.sam2,
        device=options.device,
        image_size=options.image_size,
        cache_dir=cache_dir,
        threads=options.threads,
        precision=precision,
    )
    require_memory(strategy, backend)
    return backend


@dataclass(frozen=True, kw_only=True, eq=False)
class RunContext:
    """Hold a run and answer what its stages ask about it."""

    folders: DatasetFolders
    cohort: Cohort
    """As it was planned: human labels that came later are unlabelled cases of it."""
    options: RunOptions
    ledger: Ledger
    folder: Path
    """The run's own folder, with the ledger, logs, labels and predictions."""

    @property
    def logs(self) -> Path:
        """Return the folder of log files."""
        return self.folder / "logs"

    @cached_property
    def backend(self) -> Any:
        """Load SAM 2, once, with its embeddings kept under the results of the dataset where there is room for them."""
        backend = load_labeller(self.options, self._embeddings)
        if not self._has_room_for_embeddings(backend):
            backend = load_labeller(self.options, None)
        say(f"SAM 2: {backend.spec.origin}")
        return backend

    def cpu_backend(self, like: Any) -> Any:
        """Load SAM 2 on the CPU, computing in the number format of ``like``: for what a GPU has no memory for."""
        folder = self._embeddings if self._has_room_for_embeddings(like) else None
        return load_labeller(replace(self.options, device="cpu"), folder, precision=like.spec.precision)

    @property
    def _embeddings(self) -> Path:
        return self.folders.results / RUNS_FOLDER / EMBEDDINGS

    def _has_room_for_embeddings(self, backend: Any) -> bool:
        looks = disk.LOOKS.get(self.options.strategy, 1)
        needed = disk.embedding_bytes(disk.run_size(self.cohort), backend.spec.image_size, looks=looks)
        free = disk.free_bytes(self._embeddings) + disk.folder_bytes(self._embeddings)
        if free >= needed + disk.RESERVE:
            return True
        say(
            f"SAM 2's features are not kept on disk, where they may take {disk.readable(needed)} and "
            f"{disk.readable(free)} are free; slices are encoded again where they are needed again"
        )
        return False

    @cached_property
    def sam2_identity(self) -> str:
        """Return what identifies the weights: the hash of their file, or of the tensors of a fetched name."""
        return weights_identity(self.options.sam2)

    @cached_property
    def human_label_hashes(self) -> dict[str, str]:
        """Hash the human label files that may be learned from."""
        return {c.case_id: file_hash(self.cohort.label_path(c)) for c in self.cohort.labelled}

    @cached_property
    def validation_ids(self) -> list[str]:
        """Return the fold's held-out labelled cases; none for fold ``all``."""
        if self.fold == "all":
            return []
        return list(self._done("setup/plan")["info"]["folds"][int(self.fold)]["val"])

    @cached_property
    def support_ids(self) -> list[str]:
        """Return the labelled cases that prompt SAM 2."""
        labelled = [c.case_id for c in self.cohort.labelled]
        if self.options.supports != "all":
            labelled = [case_id for case_id in labelled if case_id not in set(self.validation_ids)]
        return [*labelled, *self.added_before]

    def support_cohort(self, drawn: Mapping[str, Addition] | None = None) -> Cohort:
        """Return the cohort with the labels that prompt SAM 2: those that came before the run began as well.

        ``drawn`` are whole human labels that came while the run went on, by case id.
        """
        labels = {**self.added_before, **(drawn or {})}
        cases = (
            replace(c, role=Role.LABELLED, label=labels[c.case_id].label, added=labels[c.case_id])
            if c.case_id in labels
            else c
            for c in self.cohort.cases
        )
        return replace(self.cohort, cases=tuple(cases))

    @cached_property
    def several_scans(self) -> dict[str, dict[str, str]]:
        """Return the patients of whom there are several cases as inputs of stages that leave patients out; else none.

        Where each case is a patient the stages' keys are what they always were.
        """
        counts = Counter(case.patient for case in self.cohort.cases)
        patients = {case.case_id: case.patient for case in self.cohort.cases if counts[case.patient] > 1}
        return {"patients": patients} if patients else {}

    @cached_property
    def added_before(self) -> dict[str, Addition]:
        """Human labels that came after the dataset was made and before this run; later ones are the rounds' `Holds`."""
        for event in self.ledger.events:
            if event["event"] == "started" and event["stage"] == "setup/sam2_quality":
                added = event["inputs"].get("added", {})
                return {case_id: Addition.from_json(value) for case_id, value in added.items()}
        held_out = {self.cohort.case(case_id).patient for case_id in self.validation_ids}
        return {
            c.case_id: c.added
            for c in Cohort.load(self.cohort.root).labelled
            if c.added and c.patient not in held_out and self.cohort.case(c.case_id).role is Role.UNLABELLED
        }

    @property
    def fold(self) -> int | str:
        """Return the fold as nnU-Net takes it."""
        return self.options.fold if self.options.fold == "all" else int(self.options.fold)

    @cached_property
    def plans(self) -> Mapping[str, Any]:
        """Return nnU-Net's plans of the dataset."""
        return nnunet.read_plans(self.folders, self.options.plans)

    @cached_property
    def overrides(self) -> Mapping[str, Any] | None:
        """Return what the profile changes in the planned configuration."""
        if self.options.profile != "cpu":
            return None
        return nnunet.light_configuration(self.plans, self.options.configuration)

    def settings(self, number: int, *, final: bool, warm_start: Path | None = None) -> RoundSettings:
        """Return the settings of a round's training, which starts with the weights of a checkpoint, if any."""
        settings = self.options.training(nnunet.light_settings(self.plans, self.options.configuration), final=final)
        warm_lr = self.options.warm_lr if warm_start is not None else None
        return replace(
            settings,
            seed=self.options.seed + number,
            warm_start=str(warm_start.relative_to(self.folders.results)) if warm_start else None,
            initial_lr=settings.initial_lr if warm_lr is None else warm_lr,
            pseudo_per_batch=self.options.pseudo_per_batch if number > 0 else None,
        )

    def round_folder(self, number: int) -> Path:
        """Return the folder of a round."""
        return self.folder / f"r{number:02d}"

    def next_number(self, number: int, *, final: bool = False) -> int:
        """Return the number after ``number`` that no final training has, or that of the final training that follows.

        A run that goes on after its end, because people decided something, keeps the numbers that it has used.
        """
        number += 1
        while self._is_final(number) is not None and self._is_final(number) is not final:
            number += 1
        return number

    def configuration_name(self, number: int, *, final: bool) -> str:
        """Return the name of a round's configuration; a second final training has a name of its own."""
        name = self.options.round_configuration(number, final=final)
        earlier = sum(self._is_final(n) is True for n in range(number)) if final else 0
        return f"{name}{earlier + 1}" if earlier else name

    def _is_final(self, number: int) -> bool | None:
        """Return whether ``number`` is a final training's, None where it is free."""
        for event in reversed(self.ledger.events):
            if event["event"] == "done" and event["stage"] == f"r{number:02d}/data":
                return bool(event["info"].get("final", False))
        return None

    def digest(self, stage: str) -> str:
        """Return the digest of a stage that was done."""
        return str(self._done(stage)["digest"])

    def _done(self, stage: str) -> dict[str, Any]:
        for event in reversed(self.ledger.events):
            if event["event"] == "done" and event["stage"] == stage:
                return event
        raise InputError(f"{self.ledger.path} lacks the stage {stage}; restore the file or start anew with --branch")


def refuse_other_weights(run: RunContext) -> None:
    """Refuse to go on with a SAM 2 whose file is no longer the one that the run's labels came from."""
    known = [e["inputs"].get("sam2") for e in run.ledger.events if e["event"] == "started" and "sam2" in e["inputs"]]
    if known and known[-1] != run.sam2_identity:
        raise InputError(
            f"--sam2 {run.options.sam2} is another model than the one that {run.folder} was started with "
            f"(sha256 {run.sam2_identity[:12]}, before {str(known[-1])[:12]}); put that one back, "
            "or give --branch NAME for a new run beside it"
        )
