"""How well features alone carry labels between subjects: the yardstick of the first stage.

The method is that of strategy ``transfer`` without its refinements: every place of every support slice votes, nearest
in feature and position first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate, normalize

IN_PLANE, ALONG = 1.0, 0.5
"""Weights of the place in the slice and of the slice's place, beside a feature of unit length."""


def transfer_dice(
    query_nchw: torch.Tensor,
    query_labels_nss: np.ndarray,
    supports_nchw: Sequence[torch.Tensor],
    support_labels_nss: Sequence[np.ndarray],
    *,
    neighbours: int = 9,
    least_pixels: int = 100,
) -> list[float]:
    """Return the Dice of every label that query and supports show with at least ``least_pixels`` pixels."""
    shown = [np.bincount(labels.ravel(), minlength=256) for labels in (query_labels_nss, *support_labels_nss)]
    values = [v for v in range(1, 256) if shown[0][v] >= least_pixels and sum(s[v] for s in shown[1:]) >= least_pixels]
    if not values:
        return []
    grid = query_nchw.shape[-1]
    votes = [_soft_labels(labels, values, grid) for labels in support_labels_nss]
    memory, vote = torch.cat([_placed(f) for f in supports_nchw]), torch.cat(votes)
    nearest = torch.cdist(_placed(query_nchw), memory).topk(min(neighbours, len(memory)), largest=False).indices
    scores = vote[nearest].mean(dim=1)
    maps = scores.reshape(len(query_nchw), grid, grid, -1).permute(0, 3, 1, 2)
    size = query_labels_nss.shape[1:]
    answer = interpolate(maps, size=size, mode="bilinear", align_corners=False).argmax(dim=1).numpy()
    dice = []
    for k, value in enumerate(values):
        predicted, true = answer == k + 1, query_labels_nss == value
        dice.append(float(2 * (predicted & true).sum() / (predicted.sum() + true.sum())))
    return dice


def _placed(features_nchw: torch.Tensor) -> torch.Tensor:
    n, _, height, width = features_nchw.shape
    unit = normalize(features_nchw.float(), dim=1)
    z = ((torch.arange(n) + 0.5) / n * ALONG)[:, None, None].expand(n, height, width)
    y = ((torch.arange(height) + 0.5) / height * IN_PLANE)[None, :, None].expand(n, height, width)
    x = ((torch.arange(width) + 0.5) / width * IN_PLANE)[None, None].expand(n, height, width)
    return torch.cat([unit, torch.stack([z, y, x], dim=1)], dim=1).permute(0, 2, 3, 1).reshape(n * height * width, -1)


def _soft_labels(labels_nss: np.ndarray, values: Sequence[int], grid: int) -> torch.Tensor:
    n, size, _ = labels_nss.shape
    cell = size // grid
    parts = [(labels_nss == v).reshape(n, grid, cell, grid, cell).mean(axis=(2, 4), dtype=np.float32) for v in values]
    stacked = np.stack([1 - sum(parts), *parts], axis=-1)
    return torch.from_numpy(stacked.reshape(n * grid * grid, -1))
