"""SAM 2's mask decoder on one frame: prompts in, one mask for each out. Inference and training both call it.

Shape letters: K prompts, P points, S model size, C embedding channels, H W embedding grid, h w a quarter of the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from nnunet_sam2.sam2.gate import gated
from nnunet_sam2.sam2.protocol import Decoded, Embeddings

_PADDING, _NEGATIVE, _POSITIVE, _CORNER_FIRST, _CORNER_LAST = -1, 0, 1, 2, 3
"""Point labels of SAM's prompt encoder."""

_LOGIT_LIMIT = 32.0


def decode_frame(
    model: Any,
    device: torch.device,
    embeddings: Embeddings,
    index: int,
    *,
    boxes_k4: np.ndarray | None = None,
    points: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
    mask_logits_khw: torch.Tensor | None = None,
    features_kchw: torch.Tensor | None = None,
    gate_khw: torch.Tensor | None = None,
    several: bool = False,
) -> Decoded:
    """Answer K prompts on one frame, under the caller's gradient mode; see `Sam2Backend.decode`.

    As in SAM 2's training, a mask without points comes with a padding point. A single mask is asked for, with the
    fallback to the best of three where it is unstable; with ``several``, the best of three in any case.
    """
    coordinates, labels, count = _point_prompts(boxes_k4, points, mask_logits_khw, features_kchw)
    mask_prompt = None
    if mask_logits_khw is not None:
        mask_prompt = mask_logits_khw.to(device).float()[:, None].clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT)
    if features_kchw is None:
        top = embeddings.top(index).to(device)[None] + model.no_mem_embed.reshape(1, -1, 1, 1)
        features_kchw = top.expand(count, -1, -1, -1)
    decoder = model.sam_mask_decoder
    sparse, dense = model.sam_prompt_encoder(
        points=(torch.from_numpy(coordinates).to(device), torch.from_numpy(labels).to(device)),
        boxes=None,
        masks=mask_prompt,
    )
    with gated(decoder, gate_khw):
        masks, ious, _, scores = decoder.predict_masks(
            image_embeddings=features_kchw,
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            repeat_image=False,
            high_res_features=[m.to(device)[None].expand(count, -1, -1, -1) for m in embeddings.high(index)],
        )
    if several:
        rows, best = torch.arange(count, device=device), 1 + ious[:, 1:].argmax(dim=1)
        masks, ious = masks[rows, best, None], ious[rows, best, None]
    else:
        masks, ious = decoder._dynamic_multimask_via_stability(masks, ious)
    low_res = masks.float()
    size = (model.image_size, model.image_size)
    high_res = interpolate(low_res, size=size, mode="bilinear", align_corners=False)
    return Decoded(
        logits_kss=high_res[:, 0],
        low_res_logits_khw=low_res[:, 0],
        iou_k=ious[:, 0].float().clamp(0.0, 1.0),
        object_score_k=scores[:, 0].float(),
    )


def _point_prompts(
    boxes_k4: np.ndarray | None,
    points: Sequence[tuple[np.ndarray, np.ndarray]] | None,
    mask_logits_khw: torch.Tensor | None,
    features_kchw: torch.Tensor | None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Write boxes and points as labelled points of equal number: (K, P, 2) float32, (K, P) int32."""
    given = (boxes_k4, points, mask_logits_khw, features_kchw)
    counts = {len(prompts) for prompts in given if prompts is not None}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"prompts must be given, the same number of each kind, got {sorted(counts)}")
    count = counts.pop()
    width = max((len(labels) for _, labels in points), default=0) if points is not None else 0
    corners = 2 if boxes_k4 is not None else 0
    total = max(1, corners + width)
    coordinates = np.zeros((count, total, 2), dtype=np.float32)
    labels_kp = np.full((count, total), _PADDING, dtype=np.int32)
    if boxes_k4 is not None:
        coordinates[:, :2] = np.asarray(boxes_k4, dtype=np.float32).reshape(count, 2, 2)
        labels_kp[:, 0], labels_kp[:, 1] = _CORNER_FIRST, _CORNER_LAST
    for k, (xy_p2, positive_p) in enumerate(points or ()):
        stop = corners + len(positive_p)
        coordinates[k, corners:stop] = xy_p2
        labels_kp[k, corners:stop] = np.where(np.asarray(positive_p, dtype=bool), _POSITIVE, _NEGATIVE)
    return coordinates, labels_kp, count
