"""The student's start: the teacher's first blocks and a linear map fitted to the teacher's features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from embedded_sam2.teacher import model_input

TRUNK = "image_encoder.trunk."


def feature_basis(features: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Return the (256, D) orthonormal basis that keeps most of the features' energy; cosines survive it.

    ``features`` are (N, 256, G, G). Not centred: strategy ``transfer`` compares directions from the origin.
    """
    rows = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]).double()
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    basis = vectors.flip(1)[:, :dimensions]
    # An eigenvector's sign is free; fix it, so that every machine starts from the same target.
    largest = basis.abs().argmax(dim=0)
    return (basis * basis[largest, torch.arange(dimensions)].sign()).float()


def copy_trunk(model: Any, teacher_state: Mapping[str, torch.Tensor], blocks: Mapping[int, int]) -> None:
    """Copy the stem and ``blocks`` (student's index -> teacher's) of the teacher's trunk into the student's."""
    own = {key: value for key, value in teacher_state.items() if key.startswith(TRUNK) and ".blocks." not in key}
    for student, teacher in blocks.items():
        prefix = f"{TRUNK}blocks.{teacher}."
        for key, value in teacher_state.items():
            if key.startswith(prefix):
                own[f"{TRUNK}blocks.{student}.{key.removeprefix(prefix)}"] = value
    missing, unexpected = model.load_state_dict(own, strict=False)
    left = [key for key in missing if key.startswith(TRUNK)]
    if left or unexpected:
        raise ValueError(f"the teacher's trunk does not fit the student's: {left[:3]} {list(unexpected)[:3]}")


@torch.no_grad()
def fit_fine_levels(model: Any, images_nss: torch.Tensor) -> None:
    """Let the decoder's skip features be the trunk's leading components, each of unit variance.

    They are frozen then, so that a frame's features need computing once however long the decoder trains.
    ``images_nss`` are slices in 0 to 1.
    """
    outputs = model.image_encoder.trunk(model_input(images_nss))
    decoder = model.sam_mask_decoder
    for level, squeeze in ((0, decoder.conv_s0), (1, decoder.conv_s1)):
        rows = outputs[level].permute(0, 2, 3, 1).reshape(-1, outputs[level].shape[1]).double()
        mean = rows.mean(dim=0)
        values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
        conv = model.image_encoder.neck.convs[len(outputs) - 1 - level].conv
        width = min(conv.out_channels, len(values))
        scale = values.flip(0)[:width].clamp(min=float(values[-1]) * 1e-3).rsqrt()
        weight = vectors.flip(1)[:, :width].T * scale[:, None]
        conv.weight.zero_()
        conv.bias.zero_()
        conv.weight[:width, :, 0, 0] = weight.float()
        conv.bias[:width] = -(weight @ mean).float()
        squeeze.weight.zero_()
        squeeze.bias.zero_()
        kept = torch.arange(squeeze.out_channels)
        squeeze.weight[kept, kept, 0, 0] = 1.0


@torch.no_grad()
def start_memory_as_lookup(model: Any, feature_norm: float, sharpness: float = 2.0) -> None:
    """Let memory attention start as what works without training: attend to the places whose features are alike.

    Memories are the frame's own features plus an embedding of the mask, queries and keys are the features themselves,
    and what attention adds is small beside the query, so that the decoder sees an image from the first step on.
    """
    width = model.hidden_dim
    encoder = model.memory_encoder
    if encoder.pix_feat_proj.weight.shape[0] != model.mem_dim:
        raise ValueError("the memory must be as wide as the features to start as a lookup")
    identity = torch.eye(width, device=encoder.pix_feat_proj.weight.device)
    encoder.pix_feat_proj.weight.copy_((identity * (width**0.5 / feature_norm))[:, :, None, None])
    encoder.pix_feat_proj.bias.zero_()
    for layer in model.memory_attention.layers:
        cross = layer.cross_attn_image
        for projection in (cross.q_proj, cross.k_proj):
            projection.weight.copy_(identity * sharpness**0.5)
            projection.bias.zero_()
        for small in (layer.self_attn.out_proj, layer.linear2):
            small.weight.mul_(0.1)
    # A mask given as a prompt comes as 0 and 1; the prompt encoder knows logits.
    model.mask_downsample.weight.fill_(20.0 / 16)
    model.mask_downsample.bias.fill_(-10.0)


@torch.no_grad()
def fit_neck(
    model: Any, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], basis: torch.Tensor, ridge: float = 1e-3
) -> float:
    """Fit the neck's coarse level by least squares to the targets; return the part of variance left unexplained.

    ``batches`` yield images (N, S, S) uint8 and teacher's features (N, 256, G, G).
    """
    gram: Any = 0.0
    cross: Any = 0.0
    energy: Any = 0.0
    total: Any = 0.0
    count = 0
    for images, features in batches:
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            trunk = model.image_encoder.trunk(model_input(images.float() / 255))[-1]
        x = trunk.permute(0, 2, 3, 1).reshape(-1, trunk.shape[1]).double()
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        target = (features.float().permute(0, 2, 3, 1).reshape(-1, features.shape[1]) @ basis).double()
        gram, cross = gram + x.T @ x, cross + x.T @ target
        energy, total, count = energy + (target**2).sum(), total + target.sum(dim=0), count + len(x)
    regular = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(regular, cross)
    conv = model.image_encoder.neck.convs[0].conv
    conv.weight.copy_(solution[:-1].T[:, :, None, None].float())
    conv.bias.copy_(solution[-1].float())
    left = energy - 2 * (solution * cross).sum() + (solution * (gram @ solution)).sum()
    return float(left / (energy - (total**2).sum() / count))
