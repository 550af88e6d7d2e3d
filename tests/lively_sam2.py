"""A small SAM 2 whose answers vary, and images for it, for tests of the back end and of its cache."""

from __future__ import annotations

import numpy as np
import torch

from nnunet_sam2.sam2.backend import MetaSam2Backend
from nnunet_sam2.sam2.cache import EmbeddingCache
from nnunet_sam2.sam2.config import UNTRAINED, load_config
from nnunet_sam2.sam2.model import build_untrained, model_arguments
from nnunet_sam2.sam2.protocol import Sam2Spec

SIZE = 64
CONFIG = load_config(UNTRAINED)


def lively_model(config=CONFIG):
    """Return a small SAM 2 whose random weights are strong enough for masks, scores and memory to vary."""
    model = build_untrained(config, SIZE)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            fan_in = parameter[0].numel() if parameter.shape[0] > 1 else parameter.numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2.0 / fan_in) ** 0.5)
        elif name.endswith("gamma"):
            parameter.fill_(0.5)
        elif name.endswith("pred_obj_score_head.layers.2.bias"):
            parameter.fill_(0.33)  # some objects are then gone on some frames, most are there
    return model


def make_backend(model, cache=None, **changes):
    spec = {"name": "lively", "checkpoint_hash": "0", "image_size": SIZE, "has_memory": True, "origin": "a test"}
    return MetaSam2Backend(
        model=model,
        spec=Sam2Spec(**{**spec, **changes}),
        device=torch.device("cpu"),
        cache=cache or EmbeddingCache(None),
    )


def drifting_images():
    """Return nine images, (9, 3, 64, 64), that drift from one to the next."""
    rng = np.random.default_rng(0)
    base = rng.uniform(size=(3, 8, 8))
    drift = np.stack([base + 0.15 * n * rng.uniform(-1, 1, size=base.shape) for n in range(9)])
    return np.clip(drift, 0, 1).repeat(8, 2).repeat(8, 3).astype(np.float32)


def masks(*boxes):
    """Return (K, S, S) masks; None stands for an object that is not there."""
    out = np.zeros((len(boxes), SIZE, SIZE), bool)
    for mask, box in zip(out, boxes, strict=True):
        if box is not None:
            mask[box[1] : box[3], box[0] : box[2]] = True
    return out


def stock_walk(model, monkeypatch, embeddings, prompts, *, reverse, config=CONFIG):
    """Let sam2's own video predictor walk over the same features: {frame: logits (K, S, S)}."""
    from sam2 import sam2_video_predictor

    predictor = sam2_video_predictor.SAM2VideoPredictor(**model_arguments(config, SIZE)).eval()
    predictor.load_state_dict(model.state_dict())
    count = len(embeddings)
    numbered = torch.arange(count).float()[:, None, None, None].expand(-1, 3, SIZE, SIZE)
    monkeypatch.setattr(sam2_video_predictor, "load_video_frames", lambda **_: (numbered, SIZE, SIZE))

    def features(image):
        index = int(image[0, 0, 0, 0])
        maps = [m[None] for m in (*embeddings.high(index), embeddings.top(index))]
        encode = predictor.image_encoder.neck.position_encoding
        return {"backbone_fpn": maps, "vision_pos_enc": [encode(m) for m in maps]}

    monkeypatch.setattr(predictor, "forward_image", features)
    attention = predictor.memory_attention.forward
    # Where no object pointer is in reach, the predictor hands its bfloat16 memories to float32 layers and fails.
    monkeypatch.setattr(
        predictor.memory_attention, "forward", lambda **given: attention(**{**given, "memory": given["memory"].float()})
    )
    state = predictor.init_state("unused")
    for t, masks_kss in prompts.items():
        for k, mask in enumerate(masks_kss):
            if mask.any():
                predictor.add_new_mask(state, t, k, torch.from_numpy(mask))
    first = max(prompts) if reverse else min(prompts)
    steps = predictor.propagate_in_video(state, start_frame_idx=first, reverse=reverse)
    return {t: torch.stack([logits[ids.index(k)][0] for k in sorted(ids)]) for t, ids, logits in steps}
