"""Half cells: the search for neighbours once more, at twice the embedding's resolution, where it can only be.

A cell of the embedding covers 16 pixels of the model's input, more than the thickness of many structures. Each of its
four quarters looks for its own neighbours among the quarters of the cell's neighbours, with the embedding interpolated
and the skip features of the image encoder, which are twice as fine, beside it. The coarse search says where, the fine
one which part of it, so that the cost grows with the neighbours and not with the memory.

Shape letters: P locations of a slice, U memory entries, 4 quarters of each, D features, K neighbours, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate, normalize

from nnunet_sam2.sam2.protocol import Embeddings

_BLOCK_LOCATIONS = 64
_QUARTERS = ((-0.25, -0.25), (-0.25, 0.25), (0.25, -0.25), (0.25, 0.25))
"""Where a cell's quarters lie from its centre, (row, column) in cells; the order of `into_quarters`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HalfCells:
    """Offer what the finer search needs: the query slice's quarters, and those of memory entries by number."""

    query_p4f: torch.Tensor
    """As from `half_cell_features`."""
    entries: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    """Entry numbers (U,), ascending -> features (U, 4, F) and soft labels (U, 4, C) of their quarters."""
    spread_ratio: float
    """Variance of the unit-length embedding over that of the skip features: makes their weight mean the same for
    every model."""


def into_quarters(map_chw: torch.Tensor) -> torch.Tensor:
    """Bring a map of twice the embedding's side, (C, 2h, 2w), to (h w, 4, C): a cell's quarters row by row."""
    channels, height, width = map_chw.shape
    split = map_chw.reshape(channels, height // 2, 2, width // 2, 2).permute(1, 3, 2, 4, 0)
    return split.reshape(height * width // 4, 4, channels)


def from_quarters(values_p4c: torch.Tensor) -> torch.Tensor:
    """Undo `into_quarters` for a square grid: (C, 2h, 2w)."""
    count, _, channels = values_p4c.shape
    grid = round(count**0.5)
    split = values_p4c.reshape(grid, grid, 2, 2, channels).permute(4, 0, 2, 1, 3)
    return split.reshape(channels, 2 * grid, 2 * grid)


def half_cell_features(embeddings: Embeddings, index: int) -> torch.Tensor:
    """Return each cell's quarters, (P, 4, F): the unit-length embedding interpolated, then the finer skip features."""
    unit = normalize(embeddings.top(index).cpu().float(), dim=0)
    fine = embeddings.high(index)[1].cpu().float()
    doubled = interpolate(unit[None], size=tuple(fine.shape[1:]), mode="bilinear", align_corners=False)[0]
    return into_quarters(torch.cat([doubled, fine]))


def place_quarters(features_u4f: torch.Tensor, coordinates_u3: torch.Tensor, *, grid: int) -> torch.Tensor:
    """Append to quarters their own coordinates, (U, 4, F + 3) float32.

    ``coordinates_u3`` are those of the cells (row, column, depth, 0 to 1), ``grid`` is the number of cells a side.
    """
    offset_43 = torch.tensor([(row / grid, column / grid, 0.0) for row, column in _QUARTERS])
    count, quarters, features = features_u4f.shape
    placed = torch.empty((count, quarters, features + 3))
    placed[..., :features] = features_u4f
    placed[..., features:] = coordinates_u3[:, None] + offset_43
    return placed


def nearest_quarters(
    query_p4d: torch.Tensor, memory_u4d: torch.Tensor, parents_pk: torch.Tensor, count: int, scale_d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find each quarter's ``count`` nearest among the quarters of its cell's neighbours ``parents_pk``.

    Features count by the factors ``scale_d``. Returns squared distances beyond the nearest one's and numbers into
    (U x 4), both (P, 4, count), nearest first.
    """
    locations, neighbours = parents_pk.shape
    count = min(count, 4 * neighbours)
    # The query is the smaller of the two: factors on it, squared, stand for factors on both.
    squared_d = scale_d.square()
    norms_u4 = memory_u4d.square() @ squared_d
    query_p4d = query_p4d * squared_d
    excess, numbers = [], []
    for start in range(0, locations, _BLOCK_LOCATIONS):
        parents_bk = parents_pk[start : start + _BLOCK_LOCATIONS]
        size = len(parents_bk)
        candidates = memory_u4d.index_select(0, parents_bk.flatten()).reshape(size, 4 * neighbours, -1)
        norms = norms_u4[parents_bk].reshape(size, 1, 4 * neighbours)
        query = query_p4d[start : start + size]
        distance = torch.baddbmm(norms, query, candidates.transpose(1, 2), alpha=-2.0)
        values, chosen = distance.topk(count, dim=2, largest=False)
        parent = torch.gather(parents_bk[:, None].expand(-1, 4, -1), 2, chosen // 4)
        excess.append(values - values[..., :1])
        numbers.append(parent * 4 + chosen % 4)
    return torch.cat(excess), torch.cat(numbers)


def nearest_quarters_slow(
    query_p4d: torch.Tensor, memory_u4d: torch.Tensor, parents_pk: torch.Tensor, count: int, scale_d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `nearest_quarters` does, quarter by quarter, as the definition reads."""
    query_p4d, memory_u4d = query_p4d * scale_d, memory_u4d * scale_d
    excess, numbers = [], []
    for p, parents_k in enumerate(parents_pk):
        candidates = (parents_k[:, None] * 4 + torch.arange(4)).flatten()
        for quarter in range(4):
            distance = (memory_u4d.flatten(0, 1)[candidates] - query_p4d[p, quarter]).square().sum(dim=1)
            order = torch.argsort(distance)[:count]
            excess.append(distance[order] - distance[order[0]])
            numbers.append(candidates[order])
    shape = (len(parents_pk), 4, -1)
    return torch.stack(excess).reshape(shape), torch.stack(numbers).reshape(shape)
