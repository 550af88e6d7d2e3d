"""Probabilities as targets: those that were carried beside the image, and the one-hot labels of human cases.

Shape letters: b samples of a batch, c output channels (classes with the background first, or regions).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def foreground_channels(labels: Any) -> int:
    """Return how many of a network's channels are not the background, by nnU-Net's label manager."""
    return len(labels.foreground_regions if labels.has_regions else labels.foreground_labels)


def soft_target(target: Tensor, carried: Tensor, soft_b: Sequence[bool], labels: Any) -> Tensor:
    """Return what a batch is learnt from, float32 (b, c, ...) on the finest scale.

    ``target`` is nnU-Net's there: labels (b, 1, ...), or region masks (b, c, ...) with the ignored voxels behind where
    there are such. ``carried`` (b, foreground channels, ...) holds the probabilities of the samples in ``soft_b``; the
    background has what they leave. An ignored voxel becomes background, which no loss looks at. ``labels`` is nnU-Net's
    label manager.
    """
    heads = labels.num_segmentation_heads
    if labels.has_regions:
        soft = target[:, :heads].float()
    else:
        drawn = torch.where(target == labels.ignore_label, 0, target) if labels.has_ignore_label else target
        soft = torch.zeros((len(target), heads, *target.shape[2:]), device=target.device)
        soft.scatter_(1, drawn.long(), 1.0)
    carried = carried.clamp(0, 1)  # interpolation overshoots by a rounding error
    for n in (n for n, is_soft in enumerate(soft_b) if is_soft):
        soft[n, heads - carried.shape[1] :] = carried[n]
        if not labels.has_regions:
            soft[n, 0] = (1 - carried[n].sum(dim=0)).clamp(min=0)
    return soft
