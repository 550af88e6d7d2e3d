"""Cheap label transfer between two volumes: a few slices, few neighbours, half the embedding's cells as its finest.

Shape letters: N slices, P locations of a slice, M locations of several, C channels (background first), g grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, interpolate

from nnunet_sam2.labelling.slice_check import check_slices
from nnunet_sam2.labelling.strategies.transfer.memory import LEAST_JUDGED, Place, slice_descriptors, slice_features
from nnunet_sam2.labelling.strategies.transfer.nearest import nearest, vote
from nnunet_sam2.planes import overlap_matrix
from nnunet_sam2.sam2.protocol import Embeddings
from nnunet_sam2.support.cases import Support

_PLACE = Place(position_weight=1.5, slice_weight=1.0)
_NEIGHBOURS = 12
_SHARPNESS = 0.1
_LEAST_ENTRIES = 2048
_LEAST_SLICES = 4
"""Memory for one slice: eight slices at 256 pixels, four at 512, so that cost follows the label's own."""


class LabelledCells:
    """Show a labelled volume as labelled cells; `forget` what was read of it, for a cohort may have many of them."""

    def __init__(self, support: Support, class_values: Sequence[int]) -> None:
        self.support = support
        self._values = (0, *class_values)
        self._read: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def embeddings(self) -> Embeddings:
        """Return the volume's embeddings."""
        return self.support.embeddings

    @cached_property
    def grid(self) -> int:
        """Return the embedding's cells along a side."""
        return int(self.embeddings.top(0).shape[-1])

    @cached_property
    def descriptors_nf(self) -> torch.Tensor:
        """Return a description of each slice, as `slice_descriptors` gives it."""
        return slice_descriptors(self.embeddings)

    @cached_property
    def _overlaps(self) -> tuple[np.ndarray, np.ndarray]:
        height, width = self.support.frames.slice_shape_hw
        return overlap_matrix(height, 2 * self.grid), overlap_matrix(width, 2 * self.grid)

    def halves(self, index: int) -> np.ndarray:
        """Return which part of each half cell every value covers, (C, 2g, 2g) float32; unjudged parts are missing."""
        rows_gh, columns_gw = self._overlaps
        label_hw = self.support.frames.slices_first(self.support.label_zyx)[index]
        return np.stack([rows_gh @ (label_hw == v).astype(np.float32) @ columns_gw.T for v in self._values])

    def entries(self, slices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the judged locations of some slices: features (M, F + 3) and soft labels (M, C)."""
        parts = [self._slice(n) for n in slices]
        return torch.cat([features for features, _ in parts]), torch.cat([labels for _, labels in parts])

    def forget(self) -> None:
        """Drop the slices that were read."""
        self._read.clear()

    def _slice(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index not in self._read:
            cells_chw = avg_pool2d(torch.from_numpy(self.halves(index))[None], 2)[0]
            cells_pc = cells_chw.flatten(1).T
            judged_p = cells_pc.sum(dim=1)
            kept = judged_p >= LEAST_JUDGED
            features_pf = slice_features(self.embeddings, index)
            self._read[index] = features_pf[kept], cells_pc[kept] / judged_p[kept, None]
        return self._read[index]

    def like(self, descriptor_f: torch.Tensor, depth: float) -> list[int]:
        """Choose the few slices that look most like another volume's slice at a like relative position, ascending."""
        depth_n = (torch.arange(len(self.embeddings)) + 0.5) / len(self.embeddings)
        score_n = self.descriptors_nf @ descriptor_f - (depth_n - depth).square()
        count = max(_LEAST_SLICES, _LEAST_ENTRIES // self.grid**2)
        return sorted(score_n.topk(min(count, len(score_n))).indices.tolist())

    def checked(self, class_values: Sequence[int], count: int) -> list[int]:
        """Choose slices to compare on: about ``count`` spread over the labelled part, and two of every class."""
        chosen = set(check_slices(self.support, class_values, count))
        label_nhw = self.support.frames.slices_first(self.support.label_zyx)
        for value in class_values:
            shown = np.flatnonzero((label_nhw == value).any(axis=(1, 2))).tolist()
            if len(chosen.intersection(shown)) < 2:
                chosen.update(shown[round(i)] for i in np.linspace(0, len(shown) - 1, 4)[1:3] if shown)
        return sorted(chosen)


def likeness(mine: LabelledCells, other: LabelledCells) -> float:
    """Return the mean cosine of each slice of one volume with its most similar one in the other."""
    return float((mine.descriptors_nf @ other.descriptors_nf.T).amax(dim=1).mean())


def relabel(source: LabelledCells, target: LabelledCells, index: int) -> np.ndarray | None:
    """Label one slice of ``target`` from ``source`` alone, (C, 2g, 2g) summing to one.

    None where the source has no judged location to offer.
    """
    depth = (index + 0.5) / len(target.embeddings)
    memory_mf, labels_mc = source.entries(source.like(target.descriptors_nf[index], depth))
    if not len(memory_mf):
        return None
    query_pf = slice_features(target.embeddings, index)
    scale_f = _PLACE.scale(query_pf.shape[1])
    excess_pk, index_pk = nearest(query_pf * scale_f, memory_mf * scale_f, _NEIGHBOURS)
    prob_pc = vote(excess_pk, labels_mc[index_pk], _SHARPNESS)
    prob_chw = prob_pc.T.reshape(-1, target.grid, target.grid)
    return interpolate(prob_chw[None], scale_factor=2, mode="bilinear", align_corners=False)[0].numpy()


class CellDice:
    """Add up overlaps of relabelled slices with a volume's own label, softly and by the winner of each half cell."""

    def __init__(self, classes: int) -> None:
        self._soft_k2 = np.zeros((classes, 2))
        self._hard_k2 = np.zeros((classes, 2))
        self._shown_k = np.zeros(classes, bool)

    def add(self, prob_chw: np.ndarray, truth_chw: np.ndarray) -> None:
        """Compare one slice; cells count by the part of them that was judged."""
        judged_hw = truth_chw.sum(axis=0)
        mine_khw, theirs_khw = prob_chw[1:] * judged_hw, truth_chw[1:]
        both_k = 2.0 * np.minimum(mine_khw, theirs_khw).sum(axis=(1, 2))
        self._soft_k2 += np.stack([both_k, (mine_khw + theirs_khw).sum(axis=(1, 2))], axis=1)
        known_hw = judged_hw >= LEAST_JUDGED
        mine_hw, theirs_hw = prob_chw.argmax(axis=0), truth_chw.argmax(axis=0)
        for k in range(len(self._shown_k)):
            mine, theirs = (mine_hw == k + 1) & known_hw, (theirs_hw == k + 1) & known_hw
            self._hard_k2[k] += 2 * np.count_nonzero(mine & theirs), np.count_nonzero(mine) + np.count_nonzero(theirs)
        self._shown_k |= theirs_khw.any(axis=(1, 2))

    def soft(self, k: int) -> float | None:
        """Return the Dice of areas for class ``k``; None where the volume's own label does not show it."""
        return self._ratio(self._soft_k2[k], k)

    def hard(self, k: int) -> float | None:
        """Return the Dice of winners for class ``k``; None where the volume's own label does not show it."""
        return self._ratio(self._hard_k2[k], k)

    def _ratio(self, sums_2: np.ndarray, k: int) -> float | None:
        if not self._shown_k[k]:
            return None
        # A class too thin to win any half cell on either side is no evidence against the label.
        return float(sums_2[0] / sums_2[1]) if sums_2[1] > 0 else None
