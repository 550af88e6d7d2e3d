"""Losses of the second stage, SAM 2's (arXiv 2408.00714): focal and Dice on masks, IoU and presence beside them."""

from __future__ import annotations

import torch
from torch.nn.functional import adaptive_avg_pool2d, binary_cross_entropy_with_logits

FOCAL, DICE, IOU, PRESENCE = 20.0, 1.0, 1.0, 1.0
LEAST_TARGET = 0.5
"""Cells of the low-resolution mask that an object must cover to count as present."""


def low_target(masks_bss: torch.Tensor, side: int) -> torch.Tensor:
    """Return the part of each cell that a mask covers, (B, side, side)."""
    return adaptive_avg_pool2d(masks_bss[:, None].float(), side)[:, 0]


def mask_losses(logits_bmhw: torch.Tensor, target_bhw: torch.Tensor) -> torch.Tensor:
    """Return the mask loss of each of M candidates, (B, M)."""
    target = target_bhw[:, None].expand_as(logits_bmhw)
    cross = binary_cross_entropy_with_logits(logits_bmhw, target, reduction="none")
    prob = logits_bmhw.sigmoid()
    miss = prob * (1 - target) + (1 - prob) * target
    # SAM weighs background three to one here; with equal weights small structures vanish less.
    focal = 0.5 * (cross * miss**2).mean(dim=(2, 3))
    overlap = (prob * target).sum(dim=(2, 3))
    dice = 1 - (2 * overlap + 1) / (prob.sum(dim=(2, 3)) + target.sum(dim=(2, 3)) + 1)
    return FOCAL * focal + DICE * dice


def iou_of(logits_bmhw: torch.Tensor, target_bhw: torch.Tensor) -> torch.Tensor:
    """Return the IoU of thresholded candidates with the target, (B, M), without gradient."""
    with torch.no_grad():
        predicted, true = logits_bmhw > 0, (target_bhw > 0.5)[:, None]
        union = (predicted | true).sum(dim=(2, 3)).clamp(min=1)
        return (predicted & true).sum(dim=(2, 3)) / union


def frame_loss(
    masks_b4hw: torch.Tensor, iou_b4: torch.Tensor, score_b: torch.Tensor, target_bhw: torch.Tensor, *, single: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each object on a frame and the Dice of the mask that would be shown, both (B,).

    The masks are those before the presence gate: a model that answers "absent" still learns what the object looks
    like, and cannot settle there. Candidate 0 is the single mask, 1 to 3 the ambiguous ones, of which the best learns.
    ``single`` asks for the single mask.
    """
    present = target_bhw.sum(dim=(1, 2)) > LEAST_TARGET
    losses = mask_losses(masks_b4hw, target_bhw)
    best = losses[:, 1:].min(dim=1).values
    mask_loss = losses[:, 0] + best if single else best + 0.3 * losses[:, 0]
    quality = iou_of(masks_b4hw, target_bhw)
    iou_loss = (iou_b4 - quality).abs().mean(dim=1)
    presence = binary_cross_entropy_with_logits(score_b, present.float(), reduction="none")
    loss = torch.where(present, mask_loss + IOU * iou_loss, 0.0) + PRESENCE * presence
    chosen = torch.zeros_like(score_b, dtype=torch.long) if single else 1 + iou_b4[:, 1:].argmax(dim=1)
    with torch.no_grad():
        shown = (masks_b4hw[torch.arange(len(chosen)), chosen] > 0) & ((score_b > 0) | single)[:, None, None]
        true = target_bhw > 0.5
        total = shown.sum(dim=(1, 2)) + true.sum(dim=(1, 2))
        dice = torch.where(total > 0, 2 * (shown & true).sum(dim=(1, 2)) / total.clamp(min=1), 1.0)
    return loss, dice
