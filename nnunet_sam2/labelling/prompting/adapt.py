"""What small adaptations of SAM 2 have in common: the loss of a mask, the steps, and what is written down of them.

Shape letters: K objects, S model size, h w a quarter of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from nnunet_sam2.errors import StageError
from nnunet_sam2.progress import track
from nnunet_sam2.sam2.protocol import Sam2Backend

_REPORTED = 10
"""Steps whose mean loss stands for the beginning and the end of a training."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Say how long and how fast an adaptation is trained."""

    steps: int
    learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")


def mask_loss(logits_khw: torch.Tensor, target_khw: torch.Tensor, *, positive_weight: float = 1.0) -> torch.Tensor:
    """Compute binary cross-entropy plus soft Dice loss of masks (K, h, w) against targets from 0 to 1."""
    weight = torch.tensor(positive_weight, device=logits_khw.device)
    entropy = binary_cross_entropy_with_logits(logits_khw, target_khw, pos_weight=weight)
    prob_khw = torch.sigmoid(logits_khw)
    overlap_k = (prob_khw * target_khw).sum(dim=(1, 2))
    sizes_k = prob_khw.sum(dim=(1, 2)) + target_khw.sum(dim=(1, 2))
    return entropy + (1.0 - (2.0 * overlap_k + 1.0) / (sizes_k + 1.0)).mean()


def train(
    backend: Sam2Backend,
    parameters: Sequence[torch.nn.Parameter],
    step: Callable[[int], torch.Tensor],
    options: TrainingOptions,
    *,
    what: str,
) -> dict[str, Any]:
    """Take AdamW steps with a falling rate and return a JSON record.

    ``step`` gets the step's number and returns its loss. Raises `StageError` where the loss is not finite.
    """
    optimiser = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    losses = []
    with backend.computing(gradients=True):
        for number in track(range(options.steps), what=what, total=options.steps):
            loss = step(number)
            if not bool(torch.isfinite(loss)):
                raise StageError(f"{what}: loss {float(loss.detach())} in step {number}; lower the learning rate")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return {
        **asdict(options),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "loss_at_first": round(float(np.mean(losses[:_REPORTED])), 4),
        "loss_at_last": round(float(np.mean(losses[-_REPORTED:])), 4),
    }


def target_like(mask_ss: np.ndarray, like_khw: torch.Tensor) -> torch.Tensor:
    """Average a mask to the size of logits (K, h, w); (1, h, w) from 0 to 1."""
    planes = torch.from_numpy(mask_ss.astype(np.float32))[None, None]
    return interpolate(planes, size=tuple(like_khw.shape[1:]), mode="area")[0].to(like_khw.device)
