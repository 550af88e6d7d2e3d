"""Labels from the nearest entries of a memory, and their way to the edges of the image.

Shape letters: P locations of the query, M entries of the memory, F features, C channels (background first).
"""

from __future__ import annotations

import torch
from torch.nn.functional import avg_pool2d, pad

_BLOCK_ENTRIES = 4096
_GROUP = 64


def nearest(query_pf: torch.Tensor, memory_mf: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find each location's ``count`` nearest memory entries by Euclidean distance.

    Returns squared distances beyond the nearest entry's and the entries' numbers, both (P, count), nearest first.
    Blocked: no more than a few thousand entries are compared at a time.
    """
    count = min(count, memory_mf.shape[0])
    # ||q - m||² without ||q||², which is the same for all entries of a location.
    norms_m = memory_mf.square().sum(dim=1)
    best_pk = torch.empty((query_pf.shape[0], 0))
    index_pk = torch.empty((query_pf.shape[0], 0), dtype=torch.long)
    for start in range(0, memory_mf.shape[0], _BLOCK_ENTRIES):
        block_mf = memory_mf[start : start + _BLOCK_ENTRIES]
        distance_pm = torch.addmm(norms_m[start : start + len(block_mf)], query_pf, block_mf.T, alpha=-2.0)
        values, indices = smallest(distance_pm, min(count, len(block_mf)))
        best_pk = torch.cat([best_pk, values], dim=1)
        index_pk = torch.cat([index_pk, indices + start], dim=1)
        best_pk, chosen = best_pk.topk(min(count, best_pk.shape[1]), dim=1, largest=False)
        index_pk = torch.gather(index_pk, 1, chosen)
    return best_pk - best_pk[:, :1], index_pk


def vote(excess_pk: torch.Tensor, labels_pkc: torch.Tensor, sharpness: float) -> torch.Tensor:
    """Average the neighbours' soft labels, (P, C): a vote falls to 1/e at ``sharpness`` times the usual spread.

    ``excess_pk`` are squared distances beyond the nearest neighbour's. The usual spread is the mean over locations of
    the farthest neighbour's excess, so that the rule does not depend on how far apart a model's embeddings lie.
    """
    spread = excess_pk[:, -1].mean().clamp_min(1e-12)
    weight_pk = torch.softmax(-excess_pk / (sharpness * spread), dim=1)
    return torch.einsum("pk,pkc->pc", weight_pk, labels_pkc)


def nearest_slow(query_pf: torch.Tensor, memory_mf: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `nearest` does, location by location, as the definition reads."""
    excess, numbers = [], []
    for query_f in query_pf:
        distance_m = (memory_mf - query_f).square().sum(dim=1)
        order = torch.argsort(distance_m)[:count]
        excess.append(distance_m[order] - distance_m[order[0]])
        numbers.append(order)
    return torch.stack(excess), torch.stack(numbers)


def smallest(values_pm: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``count`` smallest values of each row and where they are, like ``topk`` but faster on long rows.

    The smallest values all lie in the ``count`` groups with the smallest minima, so only those are sorted.
    """
    width = values_pm.shape[1]
    groups = width // _GROUP
    if groups <= 2 * count or width % _GROUP:
        values, indices = values_pm.topk(count, dim=1, largest=False)
        return values, indices
    grouped = values_pm.view(values_pm.shape[0], groups, _GROUP)
    chosen = grouped.amin(dim=2).topk(count, dim=1, largest=False).indices
    candidates = torch.gather(grouped, 1, chosen[:, :, None].expand(-1, -1, _GROUP)).flatten(1)
    values, inside = candidates.topk(count, dim=1, largest=False)
    return values, torch.gather(chosen, 1, inside // _GROUP) * _GROUP + inside % _GROUP


def snap_to_edges(prob_chw: torch.Tensor, image_hw: torch.Tensor, *, radius: int, softness: float) -> torch.Tensor:
    """Let probabilities follow the edges of an image on the same grid; (C, H, W), summing to what they summed to.

    In every window of side 2 radius + 1 the probabilities are fitted as a linear function of the image, and the fits
    of all windows over a pixel are averaged: the guided filter (He, Sun, Tang, TPAMI 2013). ``softness`` is the
    variance of intensity (0 to 1, squared) below which a window counts as flat and is averaged instead.
    """
    guide, prob = image_hw[None, None], prob_chw[:, None]
    mean_i, mean_p = _box(guide, radius), _box(prob, radius)
    covariance = _box(guide * prob, radius) - mean_i * mean_p
    variance = _box(guide * guide, radius) - mean_i * mean_i
    slope = covariance / (variance.clamp_min(0.0) + softness)
    offset = mean_p - slope * mean_i
    fitted = (_box(slope, radius) * guide + _box(offset, radius))[:, 0].clamp_min(0.0)
    total_hw = fitted.sum(dim=0).clamp_min(1e-6)
    return fitted * (prob_chw.sum(dim=0) / total_hw)


def _box(planes_c1hw: torch.Tensor, radius: int) -> torch.Tensor:
    # Row means of column means: cost does not grow with the square of the radius.
    side = 2 * radius + 1
    rows = avg_pool2d(pad(planes_c1hw, (0, 0, radius, radius), mode="replicate"), (side, 1), stride=1)
    return avg_pool2d(pad(rows, (radius, radius, 0, 0), mode="replicate"), (1, side), stride=1)
