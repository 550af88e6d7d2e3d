"""Soft maps become prompts for SAM 2's mask decoder, and its answers become probabilities again.

Shape letters: K classes, C channels (background first), h w pixels of a map that fills the frame, S model size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import interpolate

from nnunet_sam2.labelling.prompting.prompts import model_boxes, seed_prompts, seeds
from nnunet_sam2.sam2.protocol import Embeddings, Sam2Backend

_LEAST_AREA = 1e-4
"""Part of the frame that a class must cover to be prompted for: a fifth of one embedding location at 512 pixels."""

_LOGIT_LIMIT = 8.0


@dataclass(frozen=True, kw_only=True)
class PromptKinds:
    """Say which prompts a soft map gives."""

    box: bool = True
    points: bool = False
    mask: bool = True
    padding: float = 0.02
    """How far a box reaches beyond the map on each side, as a part of the box's own side."""

    def __post_init__(self) -> None:
        if not (self.box or self.points or self.mask):
            raise ValueError("at least one kind of prompt is needed")
        if not 0 <= self.padding < 1:
            raise ValueError(f"padding={self.padding} must lie in 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Hold the prompts for the classes that a slice shows, in pixels at model size."""

    classes: tuple[int, ...]
    """Positions of the prompted classes on axis k."""
    boxes_k4: np.ndarray | None
    points: list[tuple[np.ndarray, np.ndarray]] | None
    mask_logits_khw: torch.Tensor | None


def make_prompts(prob_chw: torch.Tensor, size: int, kinds: PromptKinds) -> Prompts | None:
    """Draw prompts from a soft map; None where no class covers enough of the slice.

    A class is taken where it beats every other channel. The positive point lies deepest inside the class's largest
    piece (not at its centroid, which may fall outside); the negative points are the other classes' positive ones (after
    Keuth et al., ADSMI 2024). The mask prompt is the map's logits at a quarter of the model size.
    """
    winner_hw = prob_chw.argmax(dim=0).numpy()
    height, width = winner_hw.shape
    shown = [k for k in range(prob_chw.shape[0] - 1) if (winner_hw == k + 1).sum() >= _LEAST_AREA * height * width]
    if not shown:
        return None
    scale_xy = np.array([size / width, size / height], np.float32)
    masks = [winner_hw == k + 1 for k in shown]
    boxes_k4 = None
    if kinds.box:
        boxes_k4 = model_boxes(masks, kinds.padding, size)
    points = None
    if kinds.points:
        points = seed_prompts(seeds(masks), shown, scale_xy)
    logits_khw = None
    if kinds.mask:
        prob_khw = prob_chw[[k + 1 for k in shown]].clamp(1e-4, 1 - 1e-4)
        quarter_khw = interpolate(prob_khw[None], size=(size // 4, size // 4), mode="bilinear", align_corners=False)[0]
        logits_khw = torch.logit(quarter_khw).clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT)
    return Prompts(classes=tuple(shown), boxes_k4=boxes_k4, points=points, mask_logits_khw=logits_khw)


def decode_map(
    backend: Sam2Backend, embeddings: Embeddings, index: int, prob_chw: torch.Tensor, kinds: PromptKinds
) -> dict[int, torch.Tensor]:
    """Prompt the decoder from a slice's soft map; the probability (h, w) of each prompted class, by position k."""
    prompts = make_prompts(prob_chw, backend.spec.image_size, kinds)
    if prompts is None:
        return {}
    decoded = backend.decode(
        embeddings,
        index,
        boxes_k4=prompts.boxes_k4,
        points=prompts.points,
        mask_logits_khw=prompts.mask_logits_khw,
    )
    shape = tuple(prob_chw.shape[1:])
    logits_khw = decoded.low_res_logits_khw.float().cpu()
    if tuple(logits_khw.shape[1:]) != shape:
        logits_khw = interpolate(logits_khw[None], size=shape, mode="bilinear", align_corners=False)[0]
    return dict(zip(prompts.classes, torch.sigmoid(logits_khw), strict=True))


def put_in(prob_chw: torch.Tensor, decoded: Mapping[int, torch.Tensor], share: Mapping[int, float]) -> torch.Tensor:
    """Move each class's probability towards the decoder's by ``share`` (0 to 1); the others keep their proportions.

    Where a class was certain and the decoder doubts it, the rest goes to the background. Channels still sum to one.
    """
    result = prob_chw
    for k, answer_hw in sorted(decoded.items()):
        if not share.get(k):
            continue
        if result is prob_chw:
            result = prob_chw.clone()
        before_hw = result[k + 1].clone()
        after_hw = before_hw + share[k] * (answer_hw - before_hw)
        rest_hw = 1.0 - before_hw
        known = rest_hw > 1e-4
        scale_hw = torch.where(known, (1.0 - after_hw) / rest_hw.clamp_min(1e-4), torch.zeros_like(rest_hw))
        result *= scale_hw
        result[k + 1] = after_hw
        result[0] += torch.where(known, torch.zeros_like(rest_hw), 1.0 - after_hw)
    return result
