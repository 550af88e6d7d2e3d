"""Strategy guided on one slice: a mask from memory alone, then a second one that is prompted and gated by the first.

Shape letters: K classes, S model size, h w a quarter of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from nnunet_sam2.labelling.prompting.prompts import model_boxes, voxel_places
from nnunet_sam2.labelling.prompting.support_slices import Found, SupportSlices
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query

FIRST, SECOND = "first", "second"


@dataclass(frozen=True, kw_only=True)
class GuidedPasses:
    """Say how the first mask prompts the second."""

    threshold: float
    """Probability from which on a pixel belongs to the first mask's box."""
    padding: float
    gate_floor: float
    """What the gate lets through where the first mask is sure that nothing is; 1 opens it everywhere."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SecondPrompts:
    """Hold what a first mask asks the second pass for."""

    boxes_k4: np.ndarray
    mask_logits_khw: torch.Tensor
    gate_khw: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Remembered:
    """Hold a slice of the query that is labelled already, with the masks that were found."""

    index: int
    masks_kss: np.ndarray


@dataclass(kw_only=True, eq=False)
class SliceAnswer:
    """Hold both passes' probabilities for one slice; zero where a class was not asked for."""

    first_khw: torch.Tensor
    second_khw: torch.Tensor
    """The first one's where there was nothing to prompt with."""
    record: dict[str, Any] = field(default_factory=dict)


def second_prompts(logits_hw: torch.Tensor, passes: GuidedPasses, size: int) -> SecondPrompts | None:
    """Turn a first mask's logits (a quarter of the model size) into prompts; None where it is empty.

    An empty mask asks for nothing; SAM2-SGP's code then takes the whole image for the box.
    """
    prob_hw = torch.sigmoid(logits_hw.detach().float())
    mask_hw = (prob_hw > passes.threshold).cpu().numpy()
    if not mask_hw.any():
        return None
    return SecondPrompts(
        boxes_k4=model_boxes([mask_hw], passes.padding, size),
        mask_logits_khw=logits_hw.detach()[None],
        gate_khw=(passes.gate_floor + (1.0 - passes.gate_floor) * prob_hw)[None],
    )


def label_slice(
    backend: Sam2Backend,
    query: Query,
    n: int,
    library: SupportSlices,
    found: Sequence[Found],
    passes: GuidedPasses,
    *,
    least_presence: float,
    previous: Sequence[Remembered] = (),
) -> SliceAnswer:
    """Label one slice from the found support slices and from slices of its own volume, class by class.

    A class is asked for where the found slices that show it have at least ``least_presence`` of the vote. Its memories
    are those slices, the most similar one last (nearest in time), then the ``previous`` slices that show it. A first
    mask that SAM 2 says is not there (object score) counts as empty.
    """
    side = backend.spec.image_size // 4
    count = len(library.class_values)
    first_khw, second_khw = torch.zeros(count, side, side), torch.zeros(count, side, side)
    classes: dict[str, Any] = {}
    for k, value in enumerate(library.class_values):
        showing = [f for f in found if library.shows(f.support, f.index, k)]
        presence = sum(f.weight for f in showing)
        record: dict[str, Any] = {"presence": round(presence, 3)}
        classes[str(value)] = record
        if not showing or presence < least_presence:
            continue
        own = [slice_ for slice_ in previous if slice_.masks_kss[k].any()]
        memories = [(library.supports[f.support].embeddings, f.index) for f in reversed(showing)]
        memories += [(query.embeddings, slice_.index) for slice_ in own]
        masks = [library.mask(f.support, f.index, k) for f in reversed(showing)] + [s.masks_kss[k] for s in own]
        features_kchw = backend.recall((query.embeddings, n), memories, np.stack(masks)[:, None])
        first = backend.decode(query.embeddings, n, features_kchw=features_kchw, several=True)
        record["iou"] = [round(float(first.iou_k[0]), 3)]
        if own:
            record["previous"] = [slice_.index for slice_ in own]
        if first.object_score_k is not None:
            record["object_score"] = round(float(first.object_score_k[0]), 2)
            if float(first.object_score_k[0]) <= 0:
                continue
        first_khw[k] = second_khw[k] = torch.sigmoid(first.low_res_logits_khw[0].float()).cpu()
        prompts = second_prompts(first.low_res_logits_khw[0], passes, backend.spec.image_size)
        if prompts is None:
            continue
        second = backend.decode(
            query.embeddings,
            n,
            features_kchw=features_kchw,
            boxes_k4=prompts.boxes_k4,
            mask_logits_khw=prompts.mask_logits_khw,
            gate_khw=prompts.gate_khw,
        )
        second_khw[k] = torch.sigmoid(second.low_res_logits_khw[0].float()).cpu()
        record["box"] = voxel_places(prompts.boxes_k4[0], query.frames)
        record["iou"].append(round(float(second.iou_k[0]), 3))
    supports = [
        {
            "case": library.supports[f.support].case_id,
            "slice": f.index,
            "similarity": round(f.similarity, 4),
            "weight": round(f.weight, 3),
        }
        for f in found
    ]
    return SliceAnswer(
        first_khw=first_khw, second_khw=second_khw, record={"slice": n, "supports": supports, "classes": classes}
    )


def masks_at_model_size(prob_khw: torch.Tensor, size: int, confidence: float) -> np.ndarray:
    """Turn a slice's probabilities into masks (K, S, S) fit to be remembered; empty where the class is not sure enough.

    A class is sure where its mean probability over its own mask is at least ``confidence``.
    """
    prob_kss = interpolate(prob_khw[None], size=(size, size), mode="bilinear", align_corners=False)[0].numpy()
    masks_kss = prob_kss > 0.5
    for mask_ss, prob_ss in zip(masks_kss, prob_kss, strict=True):
        if mask_ss.any() and float(prob_ss[mask_ss].mean()) < confidence:
            mask_ss[:] = False
    return np.asarray(masks_kss)
