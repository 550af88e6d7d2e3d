"""nnU-Net's loss, weighted voxel by voxel with confidence, and silent on classes that nobody annotated.

Shape letters: b samples of a batch, c output channels (classes with the background first, or regions).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from torch import Tensor, nn
from torch.nn import functional

from nnunet_sam2.errors import InputError

_TINY = 1e-8

_NEVER = -1e4
"""Logit of a channel that takes no part: its probability is exactly 0, and half precision holds it."""


class ConfidenceLoss(nn.Module):
    """Wrap nnU-Net's loss: itself where no confidence is given, else weighted by it.

    The trainer hands confidence over with `weighted_by` around nnU-Net's own training step, so that the step need not
    be copied. Cross-entropy becomes the weighted mean over the batch, soft Dice counts each voxel by its weight; at
    full confidence both are nnU-Net's values.

    Samples of which some classes were not annotated have the marginal loss (Shi et al., "Marginal loss and exclusion
    loss for partially supervised multi-organ segmentation", Medical Image Analysis 2021): background and unannotated
    classes are one class, whose probability is the sum of theirs, and Dice counts the annotated classes alone.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock
        self._confidence: Tensor | None = None
        self._annotated_bc: Tensor | None = None
        self._soft: Tensor | None = None

    @contextmanager
    def weighted_by(
        self, confidence: Tensor | None, annotated_bc: Tensor | None = None, *, soft: Tensor | None = None
    ) -> Iterator[None]:
        """Weight the loss by confidence (batch, 1, z, y, x) or (batch, 1, y, x), 0 to 1, inside the block.

        ``annotated_bc`` (bool) says which channels were annotated in which sample; the background's always is. None
        stands for full confidence, and for all channels. ``soft`` are probabilities (batch, classes or regions, ...) of
        the finest scale that take the place of nnU-Net's target; coarser scales have the nearest voxel's, as labels do.
        """
        self._confidence, self._annotated_bc, self._soft = confidence, annotated_bc, soft
        try:
            yield
        finally:
            self._confidence = self._annotated_bc = self._soft = None

    def forward(self, output: Any, target: Any) -> Tensor:
        """Compute the loss of logits (batch, classes, ...) against nnU-Net's target, or of lists of scales."""
        if self._confidence is None and self._annotated_bc is None and self._soft is None:
            return self.stock(output, target)
        if not isinstance(self.stock, DeepSupervisionWrapper):
            return self._at_one_scale(self.stock, output, target)
        losses = []
        for factor, one_output, one_target in zip(self.stock.weight_factors, output, target, strict=True):
            if factor != 0:
                losses.append(factor * self._at_one_scale(self.stock.loss, one_output, one_target))
        return sum(losses[1:], start=losses[0])

    def _at_one_scale(self, stock: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        if self._confidence is None:
            confidence = torch.ones_like(target[:, :1], dtype=torch.float32)
        else:
            confidence = at_scale(self._confidence, target.shape[2:])
        if self._soft is not None:
            return self._soft_at_one_scale(stock, output, target, confidence)
        if isinstance(stock, DC_and_CE_loss):
            return weighted_dice_and_cross_entropy(stock, output, target, confidence, self._annotated_bc)
        if isinstance(stock, DC_and_BCE_loss):
            return weighted_dice_and_binary_cross_entropy(stock, output, target, confidence, self._annotated_bc)
        raise _other_loss(stock)

    def _soft_at_one_scale(self, stock: nn.Module, output: Tensor, target: Tensor, confidence: Tensor) -> Tensor:
        if self._soft is None or not isinstance(stock, (DC_and_CE_loss, DC_and_BCE_loss)):
            raise _other_loss(stock)
        if isinstance(stock, DC_and_CE_loss) and stock.ignore_label is not None:
            confidence = confidence * (target != stock.ignore_label)
        if isinstance(stock, DC_and_BCE_loss) and stock.use_ignore_label:
            confidence = confidence * (1 - target[:, -1:].float())
        soft = nearest_at_scale(self._soft, target.shape[2:])
        return soft_dice_and_cross_entropy(stock, output, soft, confidence, self._annotated_bc)


def _other_loss(stock: nn.Module) -> InputError:
    return InputError(
        f"confidence maps, soft targets and partly annotated cases need nnU-Net's own loss, this trainer has "
        f"{type(stock).__name__}"
    )


def at_scale(confidence: Tensor, shape: torch.Size) -> Tensor:
    """Average confidence to the shape of a deep supervision target."""
    if confidence.shape[2:] == shape:
        return confidence
    return functional.interpolate(confidence, tuple(shape), mode="area")


def nearest_at_scale(soft: Tensor, shape: torch.Size) -> Tensor:
    """Return probabilities at the shape of a deep supervision target, from the voxels that its labels come from."""
    if soft.shape[2:] == shape:
        return soft
    return functional.interpolate(soft, tuple(shape), mode="nearest-exact")


def merged_with_background(output: Tensor, annotated_bc: Tensor) -> Tensor:
    """Return logits whose background has the probability of background and unannotated classes together.

    The unannotated classes then have none, and the annotated ones what they had.
    """
    output = output.float()
    known_bc = _like(annotated_bc, output)
    merged = torch.where(known_bc, output, _NEVER)
    open_bc = ~known_bc
    open_bc[:, 0] = True
    background = torch.where(open_bc, output, _NEVER).logsumexp(dim=1, keepdim=True)
    # A sample with all classes keeps its background to the bit.
    partly_b1 = ~known_bc.all(dim=1, keepdim=True)
    return torch.cat([torch.where(partly_b1, background, merged[:, :1]), merged[:, 1:]], dim=1)


def mean_of_annotated(dice: Tensor, annotated_bc: Tensor, stock: nn.Module) -> Tensor:
    """Return the Dice loss over annotated channels alone, of one over all in which the others are empty in both maps.

    nnU-Net's soft Dice (``stock``) of what is empty in prediction and target is exactly 1.
    """
    counted = annotated_bc.to(dice.device)
    if stock.batch_dice:
        counted = counted.any(dim=0)
        if stock.ddp:  # stock adds up the batches of all processes before it divides
            counted = counted.to(torch.uint8)
            torch.distributed.all_reduce(counted, torch.distributed.ReduceOp.MAX)
    share = counted.float().mean()
    return (dice + 1.0 - share) / share.clamp_min(_TINY)


def weighted_dice_and_cross_entropy(
    stock: DC_and_CE_loss, output: Tensor, target: Tensor, confidence: Tensor, annotated_bc: Tensor | None = None
) -> Tensor:
    """Weight `DC_and_CE_loss`: target (batch, 1, ...) holds class indices, the ignore label counts as confidence 0."""
    if stock.ignore_label is not None:
        trusted = target != stock.ignore_label
        target = torch.where(trusted, target, 0)
        confidence = confidence * trusted
    if annotated_bc is not None:
        # Labels hold no class that their list leaves out, as long as nobody has edited either.
        known = annotated_bc.to(target.device).gather(1, target.flatten(1).long()).reshape(target.shape)
        output, target = merged_with_background(output, annotated_bc), torch.where(known, target, 0)
    dice = stock.dc(output, target, loss_mask=confidence)
    if annotated_bc is not None:
        of_dice_bc = annotated_bc if stock.dc.do_bg else annotated_bc[:, 1:]
        dice = mean_of_annotated(dice, of_dice_bc, stock.dc)
    voxelwise = functional.cross_entropy(output, target[:, 0].long(), reduction="none")
    cross_entropy = (voxelwise * confidence[:, 0]).sum() / confidence.sum().clamp_min(_TINY)
    return stock.weight_ce * cross_entropy + stock.weight_dice * dice


def weighted_dice_and_binary_cross_entropy(
    stock: DC_and_BCE_loss, output: Tensor, target: Tensor, confidence: Tensor, annotated_bc: Tensor | None = None
) -> Tensor:
    """Weight `DC_and_BCE_loss`: target (batch, regions, ...) holds region masks, the last one ignored voxels if any."""
    if stock.use_ignore_label:
        confidence = confidence * (1 - target[:, -1:].float())
        target = target[:, :-1]
    if annotated_bc is not None:
        # A region that was not annotated is empty in both maps, at no cost and without a pull.
        known_bc = _like(annotated_bc, output)
        output, target = torch.where(known_bc, output.float(), _NEVER), target * known_bc
    dice = stock.dc(output, target, loss_mask=confidence)
    if annotated_bc is not None:
        dice = mean_of_annotated(dice, annotated_bc, stock.dc)
    voxelwise = functional.binary_cross_entropy_with_logits(output, target.float(), reduction="none")
    total = _binary_total(stock, confidence, target.shape[1], annotated_bc)
    binary_cross_entropy = (voxelwise * confidence).sum() / total.clamp_min(_TINY)
    return stock.weight_ce * binary_cross_entropy + stock.weight_dice * dice


def soft_dice_and_cross_entropy(
    stock: DC_and_CE_loss | DC_and_BCE_loss,
    output: Tensor,
    soft: Tensor,
    confidence: Tensor,
    annotated_bc: Tensor | None = None,
) -> Tensor:
    """Weight either loss with probabilities (batch, classes or regions, ...) as target; stock's where they are 0 or 1.

    Dice takes the smaller one of prediction and target where nnU-Net multiplies them: the Dice semimetric loss of Wang
    et al. (MICCAI 2023), which like cross-entropy is lowest where both are equal; a product would reward hardening.
    """
    is_regions = isinstance(stock, DC_and_BCE_loss)
    if annotated_bc is not None:
        known_bc = _like(annotated_bc, output)
        if is_regions:
            output, soft = torch.where(known_bc, output.float(), _NEVER), soft * known_bc
        else:
            output, soft = merged_with_background(output, annotated_bc), _open_as_background(soft, known_bc)
    dice = soft_dice(stock.dc, output, soft, confidence)
    if annotated_bc is not None:
        of_dice_bc = annotated_bc if stock.dc.do_bg else annotated_bc[:, 1:]
        dice = mean_of_annotated(dice, of_dice_bc, stock.dc)
    if is_regions:
        voxelwise = functional.binary_cross_entropy_with_logits(output, soft, reduction="none") * confidence
        total = _binary_total(stock, confidence, soft.shape[1], annotated_bc)
    else:
        voxelwise = functional.cross_entropy(output, soft, reduction="none") * confidence[:, 0]
        total = confidence.sum()
    return stock.weight_ce * (voxelwise.sum() / total.clamp_min(_TINY)) + stock.weight_dice * dice


def soft_dice(stock: MemoryEfficientSoftDiceLoss, output: Tensor, soft: Tensor, confidence: Tensor) -> Tensor:
    """Compute `MemoryEfficientSoftDiceLoss` (``stock``) with the smaller one in the place of the product."""
    predicted = stock.apply_nonlin(output)
    if not stock.do_bg:
        predicted, soft = predicted[:, 1:], soft[:, 1:]
    axes = tuple(range(2, predicted.ndim))
    with torch.no_grad():
        weighed = soft * confidence
    # Both are weighed alike, so the smaller one is as well.
    predicted = predicted * confidence
    sums = [torch.minimum(predicted, weighed).sum(axes), predicted.sum(axes), weighed.sum(axes)]
    if stock.batch_dice:
        if stock.ddp:
            sums = [AllGatherGrad.apply(one).sum(0) for one in sums]
        sums = [one.sum(0) for one in sums]
    both, of_prediction, of_target = sums
    return -((2 * both + stock.smooth) / (of_target + of_prediction + float(stock.smooth)).clamp_min(_TINY)).mean()


def _open_as_background(soft: Tensor, known_bc: Tensor) -> Tensor:
    """Give the background what a target has of classes that were not annotated."""
    kept = soft * known_bc
    return torch.cat([kept[:, :1] + (soft - kept).sum(dim=1, keepdim=True), kept[:, 1:]], dim=1)


def _binary_total(stock: DC_and_BCE_loss, confidence: Tensor, regions: int, annotated_bc: Tensor | None) -> Tensor:
    """Return what binary cross-entropy, summed over voxels and regions, is divided by."""
    # Stock sums over regions but divides by voxels where an ignore label is in use, and takes the mean where not.
    if stock.use_ignore_label:
        return confidence.sum()
    if annotated_bc is None:
        return confidence.sum() * regions
    return (confidence.flatten(1).sum(dim=1) * annotated_bc.to(confidence.device).sum(dim=1)).sum()


def _like(annotated_bc: Tensor, output: Tensor) -> Tensor:
    return annotated_bc.reshape(*annotated_bc.shape, *[1] * (output.ndim - 2)).to(output.device)
