"""From nnU-Net's probe to what planning, a training and predictions cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_sam2.cohort.cohort import Case
from nnunet_sam2.rounds.estimate.costs import Cost
from nnunet_sam2.rounds.estimate.sizes import preprocessed_shape, tiles, voxels
from nnunet_sam2.trainers.settings import RoundSettings

_PLANNING_STARTS = 3
"""Processes that import nnU-Net while it plans: its command and a worker each for fingerprint and preprocessing."""

_FINGERPRINT = 1.0
"""Reading and cropping a labelled case for the fingerprint, in preprocessings of it."""

_SAVES_AN_EPOCH = 1.0
"""Best checkpoints, which early epochs write nearly every time, beside the latest ones."""


@dataclass(frozen=True, kw_only=True)
class NnunetCosts:
    """Answer what nnU-Net's part of a run costs, from the probe's ``answer``."""

    answer: dict[str, Any]
    heads: int
    """Outputs of the network, the background among them."""

    @property
    def start(self) -> Cost:
        """Return what a process of nnU-Net takes until it begins with its work."""
        return Cost.of(self.answer, "start")

    @property
    def patch_size(self) -> list[int]:
        """Return the patch that a round trains with."""
        return list(self.answer["configuration"]["patch_size"])

    def plan(self, labelled: Sequence[Case], unlabelled: Sequence[Case], *, planned: bool) -> Cost:
        """Return what fingerprint, plans and preprocessing cost; ``planned`` where nnU-Net's part is done."""
        mine = sum(voxels(case) for case in unlabelled)
        theirs = 0.0 if planned else (1 + _FINGERPRINT) * sum(voxels(case) for case in labelled)
        cost = self._preprocess(mine + theirs) + self.start * (0.5 if planned else 0.5 + _PLANNING_STARTS)
        return cost if planned else cost + Cost.of(self.answer, "planning")

    def data(self, pseudo: Sequence[Case]) -> Cost:
        """Return what a round's segmentations cost; label and confidence are resampled, as images are."""
        return self._preprocess(2 * sum(voxels(case) for case in pseudo))

    def train(self, settings: RoundSettings, validation: Sequence[Case]) -> Cost:
        """Return what a training costs, its process and its validation included."""
        grown = self._patch_growth
        step, check = Cost.of(self.answer, "training_step"), Cost.of(self.answer, "validation_step")
        epoch = step * (grown * settings.num_iterations_per_epoch) + check * (
            grown * settings.num_val_iterations_per_epoch
        )
        saves = settings.num_epochs * (_SAVES_AN_EPOCH + 1.0 / settings.save_every) + 1
        return (
            self.start
            + Cost.of(self.answer, "training_start")
            + epoch * settings.num_epochs
            + Cost.of(self.answer, "checkpoint") * saves
            + Cost.total(
                self._predict(case, mirroring=settings.mirroring and settings.validation_mirroring)
                for case in validation
            )
        )

    def predict(self, cases: Sequence[Case], *, mirroring: bool) -> Cost:
        """Return what the prediction of the cases costs, in a process of its own."""
        return self.start + Cost.total(self._predict(case, mirroring=mirroring) for case in cases)

    def plan_memory_bytes(self, cases: Sequence[Case], channels: int) -> int:
        """Return the memory of preprocessing the largest case: raw, cropped and resampled, float32 and float64."""
        largest = max(voxels(case) + math.prod(self._shape(case)) for case in cases)
        return int(self.answer["start_memory_bytes"] + largest * channels * 4 * 4)

    def train_memory_bytes(self) -> int:
        """Return the main memory of a training."""
        base = self.answer["start_memory_bytes"]
        return int(base + (self.answer["training_memory_bytes"] - base) * self._patch_growth)

    def predict_memory_bytes(self, cases: Sequence[Case]) -> int:
        """Return the main memory of predicting the largest case: logits, their sum of weights, probabilities."""
        base = self.answer["start_memory_bytes"]
        largest = max(2 * math.prod(self._shape(case)) + 3 * voxels(case) for case in cases)
        net = (self.answer["training_memory_bytes"] - base) * self._patch_growth / 2
        return int(base + net + largest * self.heads * 4)

    def gpu_bytes(self) -> int:
        """Return the accelerator's memory that a training takes."""
        return int(self.answer["training_gpu_bytes"] * self._patch_growth)

    @property
    def _patch_growth(self) -> float:
        configuration = self.answer["configuration"]
        return math.prod(configuration["patch_size"]) / math.prod(configuration["probed_patch_size"])

    def _preprocess(self, count: float) -> Cost:
        a_voxel = (Cost.of(self.answer, "preprocessing") + Cost.of(self.answer, "segmentation")) * (
            1.0 / self.answer["probed_voxels"]
        )
        return a_voxel * count

    def _shape(self, case: Case) -> tuple[int, ...]:
        return preprocessed_shape(
            case.geometry.shape_zyx,
            case.geometry.spacing_zyx_mm,
            self.answer["configuration"]["spacing"],
            self.answer["transpose_forward"],
        )

    def _predict(self, case: Case, *, mirroring: bool) -> Cost:
        """Return tiles times looks, and what else a voxel costs: preprocessing, resampling, softmax."""
        configuration = self.answer["configuration"]
        probed = tiles(self.answer["preprocessed_shape"], configuration["probed_patch_size"])
        tile = Cost.of(self.answer, "tile")
        rest = Cost.of(self.answer, "prediction").less(tile * probed) * (1.0 / self.answer["probed_voxels"])
        looks = 2 ** len(configuration["patch_size"]) if mirroring else 1
        count = tiles(self._shape(case), configuration["patch_size"])
        return tile * (count * looks * self._patch_growth) + rest * voxels(case)
