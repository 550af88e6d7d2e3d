"""Classes whose place is known only roughly, given the odds at which a label overlaps them most.

Shape letters: K classes, z y x voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nnunet_sam2.labelling.member import Member

_BINS = 200
LEAST_THRESHOLD = 0.1
"""Probability below which a voxel never becomes part of a class that is likelier not to be there."""


def best_threshold(prob_zyx: np.ndarray) -> float:
    """Return the probability from which on voxels are taken so that the expected Dice is highest, at most a half.

    With calibrated probabilities that is half the Dice that comes out (Lipton, Elkan, Narayanaswamy, "Optimal
    thresholding of classifiers to maximize F1 measure", ECML 2014): a class that no voxel surely belongs to is better
    drawn where it is likeliest than nowhere.
    """
    counts, edges = np.histogram(prob_zyx, bins=_BINS, range=(0.0, 1.0))
    middles = 0.5 * (edges[1:] + edges[:-1])
    # Voxels that have nothing of the class say nothing.
    counts[0] = 0
    taken = np.cumsum(counts[::-1])[::-1]
    hit = np.cumsum((counts * middles)[::-1])[::-1]
    if not taken[0]:
        return 0.5
    dice = 2.0 * hit / (taken + hit[0])
    return float(np.clip(edges[int(np.argmax(dice))], LEAST_THRESHOLD, 0.5))


def at_even_odds(members: Sequence[Member], class_values: Sequence[int], rough: Sequence[int]) -> list[Member]:
    """Return the members with the odds of the ``rough`` classes such that `best_threshold` becomes a half.

    In place: the members' own arrays are changed.
    """
    threshold_k = {
        k: best_threshold(sum(member.prob_kzyx[k] for member in members) / np.float32(len(members)))
        for k, value in enumerate(class_values)
        if value in rough
    }
    shown = {str(class_values[k]): round(threshold, 4) for k, threshold in threshold_k.items()}
    found = []
    for member in members:
        prob_kzyx = member.prob_kzyx
        rest_zyx = 1.0 - prob_kzyx.max(axis=0) if member.background_zyx is None else member.background_zyx
        for k, threshold in threshold_k.items():
            prob_kzyx[k] *= np.float32((1.0 - threshold) / threshold)
        total_zyx = prob_kzyx.sum(axis=0) + rest_zyx
        np.maximum(total_zyx, 1e-6, out=total_zyx)
        prob_kzyx /= total_zyx
        rest_zyx /= total_zyx
        found.append(replace(member, background_zyx=rest_zyx, record={**member.record, "threshold": shown}))
    return found
