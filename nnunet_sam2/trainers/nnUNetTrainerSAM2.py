"""The trainer that nnU-Net finds: human labels and pseudo-labels, each voxel by its confidence."""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule

from nnunet_sam2.errors import InputError
from nnunet_sam2.trainers import randomness
from nnunet_sam2.trainers.annotated import PartlyAnnotated, validate_one_by_one
from nnunet_sam2.trainers.averaging import WeightAverage
from nnunet_sam2.trainers.checkpoints import (
    PROVENANCE,
    load_all_weights,
    read_checkpoint,
    versions,
    write_checkpoint,
)
from nnunet_sam2.trainers.copy_paste import draw_box, exchange, partners
from nnunet_sam2.trainers.dataset import RoundDataset, distrust_path
from nnunet_sam2.trainers.loader import RoundDataLoader
from nnunet_sam2.trainers.loss import ConfidenceLoss
from nnunet_sam2.trainers.precision import computing, is_reduced
from nnunet_sam2.trainers.settings import PROVENANCE_KEY, SETTINGS_KEY, RoundSettings
from nnunet_sam2.trainers.soft_targets import foreground_channels, soft_target
from nnunet_sam2.trainers.split import Split, choose_split, read_or_make_splits
from nnunet_sam2.trainers.validation import summarise, validate_sequentially

_SECONDS_BETWEEN_PLOTS = 60.0


class nnUNetTrainerSAM2(nnUNetTrainer):
    """Train nnU-Net on labelled and pseudo-labelled cases, by the settings in its plans configuration.

    Without settings it is the stock trainer, but for four things: folds that do not exist are refused,
    ``splits_final.json`` is made by patient, checkpoints are written whole, and a killed training that is continued
    draws the random numbers that it would have drawn. The network is the stock one, so that stock nnU-Net predicts
    with its checkpoints.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        block = self.configuration_manager.configuration
        self.settings = RoundSettings.from_configuration(block)
        self.round_provenance = (block.get(SETTINGS_KEY) or {}).get(PROVENANCE_KEY)
        self.num_epochs = self.settings.num_epochs
        self.num_iterations_per_epoch = self.settings.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.settings.num_val_iterations_per_epoch
        self.save_every = self.settings.save_every
        self.initial_lr = self.settings.initial_lr
        self.weight_decay = self.settings.weight_decay
        if self.settings.threads is not None and self.device.type == "cpu":
            torch.set_num_threads(self.settings.threads)
        self._reduced = is_reduced(self.settings.cpu_precision, self.device)
        self.split: Split | None = None
        self.annotated = PartlyAnnotated()
        self.warm_started_from: dict[str, str] | None = None
        self.average: WeightAverage | None = None
        self.soft_cases: frozenset[str] = frozenset()
        self._is_continued = False
        self._random_state: dict[str, Any] | None = None
        self._seconds_before = 0.0
        self._started_at = time.monotonic()
        self._plotted_at = self._started_at
        self._plot_progress = self.logger.plot_progress_png
        self.logger.plot_progress_png = self._plot_now_and_then

    def initialize(self) -> None:
        """Build network, optimizer and loss; seed before, start warm after."""
        if self.settings.seed is not None:
            randomness.seed_all(self.settings.seed)
        super().initialize()
        if self._reduced:
            self.print_to_log_file("this processor computes in bfloat16; weights and loss stay float32")
            if len(self.configuration_manager.patch_size) == 2:
                self.network.to(memory_format=torch.channels_last)
        if self.settings.warm_start is not None and not self._is_continued:
            self.warm_started_from = load_all_weights(self._plain_network(), self._warm_start_path())
            self.print_to_log_file(f"warm start: all weights of {self.warm_started_from['path']}")
        if self.settings.ema_decay is not None:
            average = self.average = WeightAverage(self._plain_network(), self.settings.ema_decay)
            # After the optimizer's steps alone: a step that the gradient scaler skips is none.
            self.optimizer.register_step_post_hook(lambda *_: average.update())
        if self.settings.seed is not None and self.is_ddp:
            randomness.seed_all(self.settings.seed + 1 + self.local_rank)  # ranks must not draw the same batches

    def configure_optimizers(self) -> tuple[Any, Any]:
        """Return nnU-Net's SGD, or AdamW for schedules too short for it, with the polynomial decay of both."""
        if self.settings.optimizer == "sgd":
            return super().configure_optimizers()
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, Any, Any, Any]:
        """Take mirroring out of augmentation and prediction where the settings say so."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if not self.settings.mirroring:
            mirror_axes = self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def _build_loss(self) -> nn.Module:
        return ConfidenceLoss(super()._build_loss())

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return training and validation cases; pseudo-labelled cases only ever train."""
        dataset_class = self.dataset_class or infer_dataset_class(self.preprocessed_dataset_folder)
        available = set(dataset_class.get_identifiers(self.preprocessed_dataset_folder))
        pseudo, human = self.settings.pseudo_cases, self.settings.human_cases
        splits: Any = []
        if self.fold != "all":
            raw = self._raw_folder()
            splits_file = Path(self.preprocessed_dataset_folder_base) / "splits_final.json"
            splits = read_or_make_splits(splits_file, raw, available - {*pseudo, *human})
        split = choose_split(self.fold, available=available, pseudo_cases=pseudo, human_cases=human, splits=splits)
        if self.split is None:
            self.print_to_log_file(
                f"Fold {self.fold}: {len(split.labelled)} labelled and {len(split.pseudo)} pseudo-labelled cases to "
                f"train on, {len(split.validation)} labelled cases to validate on."
            )
            if split.note:
                self.print_to_log_file(f"NOTE: {split.note}")
            self._read_annotated(split)
        self.split = split
        return split.training, list(split.validation)

    def get_tr_and_val_datasets(self) -> tuple[RoundDataset, Any]:
        """Return the training cases with distrust maps, where there are any, and nnU-Net's own validation cases."""
        stock_training, validation = super().get_tr_and_val_datasets()
        folder = self._distrust_folder(stock_training.identifiers)
        training = RoundDataset(
            stock_training,
            pseudo_cases=self.settings.pseudo_cases,
            pseudo_per_batch=self.settings.pseudo_per_batch,
            distrust_folder=folder,
            n_soft=foreground_channels(self.label_manager) if self.settings.soft_targets else 0,
            repeatable=self.settings.seed is not None,
        )
        if folder is not None:
            self.print_to_log_file(f"The loss is weighted with the distrust maps of {folder}")
        self.soft_cases = training.soft_identifiers
        if self.soft_cases:
            self.print_to_log_file(f"{len(self.soft_cases)} cases are learnt from probabilities instead of labels")
        return training, validation

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Build nnU-Net's loaders with ours in the place of the class that the stock method names."""
        stock_module: Any = sys.modules[nnUNetTrainer.__module__]
        stock_loader = stock_module.nnUNetDataLoader
        stock_module.nnUNetDataLoader = RoundDataLoader
        try:
            return super().get_dataloaders()
        finally:
            stock_module.nnUNetDataLoader = stock_loader

    def train_step(self, batch: dict) -> dict:
        """Run nnU-Net's step on the batch, copied and pasted, its loss weighted by the maps that it carries."""
        scales = batch["target"] if self.enable_deep_supervision else [batch["target"]]
        target = [scale.to(self.device, non_blocking=True) for scale in scales]
        joined = batch["data"].to(self.device, non_blocking=True)
        data, maps = joined[:, : self.num_input_channels], joined[:, self.num_input_channels :]
        annotated_bc = self._annotated_in(batch)
        confidence, soft = None, None
        if maps.shape[1]:
            confidence = (1 - maps[:, -1:]).clamp_(0, 1)  # interpolation overshoots by a rounding error
            soft_b = [key in self.soft_cases for key in batch["keys"]]
            soft = soft_target(target[0], maps[:, :-1], soft_b, self.label_manager) if any(soft_b) else None
        if self.settings.copy_paste and np.random.uniform() < self.settings.copy_paste:
            pseudo = set(self.settings.pseudo_cases)
            partner = partners([key in pseudo for key in batch["keys"]], annotated_bc)
            box = draw_box(data.shape[2:])
            exchange([one for one in (data, *target, confidence, soft) if one is not None], partner, box)
        with self.loss.weighted_by(confidence, annotated_bc, soft=soft), computing(reduced=self._reduced):
            return super().train_step({"data": data, "target": target if self.enable_deep_supervision else target[0]})

    def validation_step(self, batch: dict) -> dict:
        """Run nnU-Net's step; a class counts nowhere in a case that was not annotated for it.

        With several processes, which have to walk in step, the online Dice counts it nevertheless.
        """
        annotated_bc = self._annotated_in(batch)
        if annotated_bc is None or self.is_ddp:
            return self._validation_step(batch, annotated_bc)
        background = not self.label_manager.has_regions
        return validate_one_by_one(self._validation_step, batch, annotated_bc, background=background)

    def _validation_step(self, batch: dict, annotated_bc: torch.Tensor | None) -> dict:
        with self.loss.weighted_by(None, annotated_bc), self._averaged(), computing(reduced=self._reduced):
            return super().validation_step(batch)

    def on_train_start(self) -> None:
        """Prepare the training; continued, go on with the random numbers where the checkpoint was written."""
        if not self.was_initialized:
            self.initialize()
        super().on_train_start()
        self._started_at = time.monotonic()
        if self._random_state is not None:
            randomness.restore(self._random_state)
            self._random_state = None

    def on_epoch_end(self) -> None:
        """Write ``checkpoint_latest`` last, so that what continues from it knows of the best one as well."""
        self.save_every, save_every = sys.maxsize, self.save_every
        try:
            super().on_epoch_end()
        finally:
            self.save_every = save_every
        if self.current_epoch < self.num_epochs:
            if self.current_epoch % self.save_every == 0:
                self.current_epoch -= 1
                self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_latest.pth"))
                self.current_epoch += 1
            budget = self.settings.time_budget_s
            if budget is not None and self._seconds_trained() >= budget:
                raise _BudgetSpent

    def run_training(self) -> None:
        """Train until the schedule or the time budget ends; either way a final checkpoint is written."""
        try:
            super().run_training()
        except _BudgetSpent:
            self.print_to_log_file(
                f"time budget of {self.settings.time_budget_s:g} s is spent after {self.current_epoch} of "
                f"{self.num_epochs} epochs: training ends here"
            )
            self.on_train_end()

    def on_train_end(self) -> None:
        """Write the final checkpoint and the last plot."""
        super().on_train_end()
        if self.local_rank == 0:
            self._plot_progress(self.output_folder)

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint atomically, with provenance and the state of the random generators."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        last = self._plain_network().state_dict()
        with self._averaged():
            weights = self._plain_network().state_dict()
        checkpoint = {
            "network_weights": weights,
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            PROVENANCE: {
                "versions": versions(),
                "settings": self.settings.to_json(),
                "round": self.round_provenance,
                "labelled": list(self.split.labelled) if self.split else None,
                "pseudo": list(self.split.pseudo) if self.split else None,
                **({"annotated": self.annotated.to_json()} if self.annotated.known else {}),
                "warm_start": self.warm_started_from,
                "seconds": self._seconds_trained(),
                **({"ema": {"updates": self.average.updates, "last": last}} if self.average else {}),
                "random_state": randomness.capture(),
                "precision": "bfloat16" if self._reduced else "float32",
            },
        }
        write_checkpoint(checkpoint, Path(filename))

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Load a checkpoint to go on from, or to validate with."""
        self._is_continued = True
        # First by our reader, which refuses what nnU-Net's would execute.
        provenance = read_checkpoint(Path(filename_or_checkpoint)).get(PROVENANCE)
        super().load_checkpoint(filename_or_checkpoint)
        if self.average is not None:
            averaged = (provenance or {}).get("ema")
            self.average.restart(averaged["updates"] if averaged else 0)
            if averaged:
                self._plain_network().load_state_dict(averaged["last"])
        if provenance is not None:
            self._random_state = provenance["random_state"]
            self._seconds_before = provenance["seconds"]
            self.warm_started_from = provenance["warm_start"]
            changed = _difference(provenance["settings"], self.settings.to_json())
            if changed:
                self.print_to_log_file(f"NOTE: settings changed since {filename_or_checkpoint} was written: {changed}")

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the validation cases and compare them with human labels."""
        with self._averaged():
            self._validate(save_probabilities)

    def _validate(self, save_probabilities: bool) -> None:
        mirroring = self.settings.validation_mirroring
        if self.settings.sequential_validation and not self.is_ddp and not self._is_in_cascade():
            summary = validate_sequentially(self, save_probabilities=save_probabilities, mirroring=mirroring)
            dice = summary["foreground_mean"]["Dice"]
            self.logger.log_summary("final_val/foreground_dice", dice)
            self.print_to_log_file("Validation complete", also_print_to_console=True)
            self.print_to_log_file("Mean Validation Dice: ", dice, also_print_to_console=True)
            return
        axes = self.inference_allowed_mirroring_axes
        self.inference_allowed_mirroring_axes = axes if mirroring else None
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.inference_allowed_mirroring_axes = axes
        if self.split and set(self.split.validation) & set(self.annotated.known) and not self.local_rank:
            dice = summarise(self, self.split.validation)["foreground_mean"]["Dice"]
            self.print_to_log_file("Mean Validation Dice of what was annotated: ", dice, also_print_to_console=True)

    def _read_annotated(self, split: Split) -> None:
        values = [int(value) for value in self.label_manager.all_labels if value != 0]
        self.annotated = PartlyAnnotated.of_training(self._raw_folder(), split.training, values)
        if self.annotated.known:
            count = len(self.annotated.known)
            self.print_to_log_file(f"{count} cases are annotated in part: the loss is silent on their other classes")
        if self.annotated.never:
            self.print_to_log_file(
                f"NOTE: no training case of fold {self.fold} is annotated for {list(self.annotated.never)}, which are "
                "learnt as background; use another fold, or all"
            )

    def _annotated_in(self, batch: dict) -> torch.Tensor | None:
        """Return which output channels were annotated in which sample, (b, c); None where all were in all."""
        annotated_bc = self.annotated.channels(batch["keys"], self.label_manager)
        if annotated_bc is None and self.is_ddp and self.annotated.known:
            # All processes have to walk in step: see `mean_of_annotated`.
            heads = self.label_manager.num_segmentation_heads
            return torch.ones((len(batch["keys"]), heads), dtype=torch.bool)
        return annotated_bc

    def _averaged(self) -> AbstractContextManager[None]:
        """Give the network its averaged weights, where they are averaged, inside a block."""
        return self.average.in_use() if self.average else nullcontext()

    def _raw_folder(self) -> Path | None:
        return Path(nnUNet_raw) / self.plans_manager.dataset_name if nnUNet_raw.is_set() else None

    def _is_in_cascade(self) -> bool:
        return self.is_cascaded or self.configuration_manager.next_stage_names is not None

    def _plain_network(self) -> nn.Module:
        network = self.network.module if self.is_ddp else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def _warm_start_path(self) -> Path:
        path = Path(str(self.settings.warm_start)).expanduser()
        if path.is_absolute():
            return path
        if self.output_folder_base is None:
            raise InputError(f"warm start from {path}: set nnUNet_results, or give an absolute path")
        return Path(self.output_folder_base).parent / path

    def _distrust_folder(self, cases: list[str]) -> Path | None:
        base = Path(self.preprocessed_dataset_folder_base)
        named = self.settings.confidence_folder
        folder = base / (named or f"{self.configuration_manager.data_identifier}_conf")
        if named is not None and not folder.is_dir():
            raise InputError(f"folder {folder} with the distrust maps does not exist; make the round again")
        return folder if any(distrust_path(folder, case).is_file() for case in cases) else None

    def _seconds_trained(self) -> float:
        return self._seconds_before + time.monotonic() - self._started_at

    def _plot_now_and_then(self, output_folder: str) -> None:
        # The plot costs about a second: more than a short epoch on small data.
        now = time.monotonic()
        if now - self._plotted_at >= _SECONDS_BETWEEN_PLOTS and self.current_epoch + 1 < self.num_epochs:
            self._plotted_at = now
            self._plot_progress(output_folder)


class _BudgetSpent(Exception):  # noqa: N818 - ends the epoch loop of run_training, which cannot be shortened otherwise
    pass


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    return ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in keys)
