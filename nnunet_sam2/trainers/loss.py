"""nnU-Net's loss, weighted voxel by voxel with confidence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn
from torch.nn import functional

from nnunet_sam2.errors import InputError

_TINY = 1e-8


class ConfidenceLoss(nn.Module):
    """Wrap nnU-Net's loss: itself where no confidence is given, else weighted by it.

    The trainer hands confidence over with `weighted_by` around nnU-Net's own training step, so that the step need not
    be copied. Cross-entropy becomes the weighted mean over the batch, soft Dice counts each voxel by its weight; at
    full confidence both are nnU-Net's values.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock
        self._confidence: Tensor | None = None

    @contextmanager
    def weighted_by(self, confidence: Tensor) -> Iterator[None]:
        """Weight the loss by confidence (batch, 1, z, y, x) or (batch, 1, y, x), 0 to 1, inside the block."""
        self._confidence = confidence
        try:
            yield
        finally:
            self._confidence = None

    def forward(self, output: Any, target: Any) -> Tensor:
        """Compute the loss of logits (batch, classes, ...) against nnU-Net's target, or of lists of scales."""
        if self._confidence is None:
            return self.stock(output, target)
        if not isinstance(self.stock, DeepSupervisionWrapper):
            return _weighted(self.stock, output, target, self._confidence)
        losses = []
        for factor, one_output, one_target in zip(self.stock.weight_factors, output, target, strict=True):
            if factor != 0:
                confidence = at_scale(self._confidence, one_target.shape[2:])
                losses.append(factor * _weighted(self.stock.loss, one_output, one_target, confidence))
        return sum(losses[1:], start=losses[0])


def at_scale(confidence: Tensor, shape: torch.Size) -> Tensor:
    """Average confidence to the shape of a deep supervision target."""
    if confidence.shape[2:] == shape:
        return confidence
    return functional.interpolate(confidence, tuple(shape), mode="area")


def _weighted(stock: nn.Module, output: Tensor, target: Tensor, confidence: Tensor) -> Tensor:
    if isinstance(stock, DC_and_CE_loss):
        return weighted_dice_and_cross_entropy(stock, output, target, confidence)
    if isinstance(stock, DC_and_BCE_loss):
        return weighted_dice_and_binary_cross_entropy(stock, output, target, confidence)
    raise InputError(f"confidence maps need nnU-Net's own loss, this trainer has {type(stock).__name__}")


def weighted_dice_and_cross_entropy(
    stock: DC_and_CE_loss, output: Tensor, target: Tensor, confidence: Tensor
) -> Tensor:
    """Weight `DC_and_CE_loss`: target (batch, 1, ...) holds class indices, the ignore label counts as confidence 0."""
    if stock.ignore_label is not None:
        trusted = target != stock.ignore_label
        target = torch.where(trusted, target, 0)
        confidence = confidence * trusted
    dice = stock.dc(output, target, loss_mask=confidence)
    voxelwise = functional.cross_entropy(output, target[:, 0].long(), reduction="none")
    cross_entropy = (voxelwise * confidence[:, 0]).sum() / confidence.sum().clamp_min(_TINY)
    return stock.weight_ce * cross_entropy + stock.weight_dice * dice


def weighted_dice_and_binary_cross_entropy(
    stock: DC_and_BCE_loss, output: Tensor, target: Tensor, confidence: Tensor
) -> Tensor:
    """Weight `DC_and_BCE_loss`: target (batch, regions, ...) holds region masks, the last one ignored voxels if any."""
    if stock.use_ignore_label:
        confidence = confidence * (1 - target[:, -1:].float())
        target = target[:, :-1]
    dice = stock.dc(output, target, loss_mask=confidence)
    voxelwise = functional.binary_cross_entropy_with_logits(output, target.float(), reduction="none")
    total = confidence.sum()
    # Stock sums over regions but divides by voxels where an ignore label is in use, and takes the mean where not.
    if not stock.use_ignore_label:
        total = total * target.shape[1]
    binary_cross_entropy = (voxelwise * confidence).sum() / total.clamp_min(_TINY)
    return stock.weight_ce * binary_cross_entropy + stock.weight_dice * dice
