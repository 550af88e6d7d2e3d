"""Labels from the nearest entries of a memory, and their way to the edges of the image.

Shape letters: P locations of the query, M entries of the memory, F features, C channels (background first).
"""

from __future__ import annotations

from functools import cache

import torch

_BLOCK_DISTANCES = 2**22
_GROUP = 16


def nearest(
    query_pf: torch.Tensor, memory_mf: torch.Tensor, count: int, *, norms_m: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find each location's ``count`` nearest memory entries by Euclidean distance.

    Returns squared distances beyond the nearest entry's and the entries' numbers, both (P, count), nearest first.
    Blocked: no more than some million distances are held at a time. ``norms_m`` stand for the entries' squared lengths:
    factors on the features can then be given to the query alone, squared, and the memory stays as it is.
    """
    count = min(count, memory_mf.shape[0])
    # ||q - m||² without ||q||², which is the same for all entries of a location.
    norms_m = memory_mf.square().sum(dim=1) if norms_m is None else norms_m
    # Whole rows at a time: choosing among a row's entries once is cheaper than merging choices of its parts.
    locations = max(1, _BLOCK_DISTANCES // max(1, memory_mf.shape[0]))
    blocks = query_pf.split(locations)
    found = [smallest(torch.addmm(norms_m, block_bf, memory_mf.T, alpha=-2.0), count) for block_bf in blocks]
    best_pk = torch.cat([values for values, _ in found])
    return best_pk - best_pk[:, :1], torch.cat([numbers for _, numbers in found])


def vote(excess_pk: torch.Tensor, labels_pkc: torch.Tensor, sharpness: float) -> torch.Tensor:
    """Average the neighbours' soft labels, (P, C): a vote falls to 1/e at ``sharpness`` times the usual spread.

    ``excess_pk`` are squared distances beyond the nearest neighbour's. The usual spread is the mean over locations of
    the farthest neighbour's excess, so that the rule does not depend on how far apart a model's embeddings lie.
    """
    return torch.einsum("pk,pkc->pc", vote_weights(excess_pk, sharpness), labels_pkc)


def vote_weights(excess_pk: torch.Tensor, sharpness: float) -> torch.Tensor:
    """Return what each neighbour's vote weighs, (P, K), summing to one for each location; see `vote`."""
    spread = excess_pk[:, -1].mean().clamp_min(1e-12)
    return torch.softmax(-excess_pk / (sharpness * spread), dim=1)


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

    The smallest values all lie in the ``count`` groups with the smallest minima, or in what is left over when the row
    is divided into groups; only those are sorted. A group is every ``groups``-th value, so that the minima are taken of
    whole stretches of a row at once.
    """
    rows, width = values_pm.shape
    groups = width // _GROUP
    if groups <= 2 * count:
        values, indices = values_pm.topk(count, dim=1, largest=False)
        return values, indices
    grouped = values_pm[:, : groups * _GROUP].unflatten(1, (_GROUP, groups))
    chosen = grouped.amin(dim=1).topk(count, dim=1, largest=False, sorted=False).indices
    candidates = torch.gather(grouped, 2, chosen[:, None].expand(-1, _GROUP, -1)).flatten(1)
    rest = torch.arange(groups * _GROUP, width).expand(rows, -1)
    numbers = (chosen[:, None] + groups * torch.arange(_GROUP)[:, None]).flatten(1)
    values, inside = torch.cat([candidates, values_pm[:, groups * _GROUP :]], dim=1).topk(count, dim=1, largest=False)
    return values, torch.gather(torch.cat([numbers, rest], dim=1), 1, inside)


def snap_to_edges(prob_chw: torch.Tensor, image_hw: torch.Tensor, *, radius: int, softness: float) -> torch.Tensor:
    """Let probabilities follow the edges of an image on the same grid; (C, H, W), summing to what they summed to.

    In every window of side 2 radius + 1 the probabilities are fitted as a linear function of the image, and the fits
    of all windows over a pixel are averaged: the guided filter (He, Sun, Tang, TPAMI 2013). ``softness`` is the
    variance of intensity (0 to 1, squared) below which a window counts as flat and is averaged instead.
    """
    # What a slice has nothing of stays nothing; of many classes that is most of them, and most of the work.
    shown_c = prob_chw.flatten(1).any(dim=1)
    guide, prob = image_hw[None, None], prob_chw[shown_c][:, None]
    mean_i, mean_p = _box(guide, radius), _box(prob, radius)
    covariance = _box(guide * prob, radius) - mean_i * mean_p
    variance = _box(guide * guide, radius) - mean_i * mean_i
    slope = covariance / (variance.clamp_min(0.0) + softness)
    offset = mean_p - slope * mean_i
    fitted = (_box(slope, radius) * guide + _box(offset, radius))[:, 0].clamp_min(0.0)
    total_hw = fitted.sum(dim=0).clamp_min(1e-6)
    snapped_chw = torch.zeros_like(prob_chw)
    snapped_chw[shown_c] = fitted * (prob_chw.sum(dim=0) / total_hw)
    return snapped_chw


def _box(planes_c1hw: torch.Tensor, radius: int) -> torch.Tensor:
    """Return the means over windows of side 2 radius + 1; borders are repeated beyond the image."""
    height, width = planes_c1hw.shape[-2:]
    return _band(height, radius) @ planes_c1hw @ _band(width, radius).T


@cache
def _band(length: int, radius: int) -> torch.Tensor:
    """Return the (length, length) matrix that averages over windows: a product takes a ninth of pooling's time."""
    window = torch.arange(length)[:, None] + torch.arange(-radius, radius + 1)
    band = torch.zeros((length, length))
    return band.scatter_add_(1, window.clamp(0, length - 1), torch.full(window.shape, 1.0 / (2 * radius + 1)))
