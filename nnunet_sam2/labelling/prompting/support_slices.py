"""The slices of the supports, found by likeness to a query slice.

Shape letters: N slices, F features of a slice, K classes, S model size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch

from nnunet_sam2.frames import MASK_THRESHOLD
from nnunet_sam2.labelling.strategies.transfer.memory import LEAST_JUDGED, slice_descriptors
from nnunet_sam2.planes import resize
from nnunet_sam2.support.cases import Support

_KEPT_MASK_BYTES = 2**27


@dataclass(frozen=True, kw_only=True)
class Found:
    """Name a support slice that resembles a query slice."""

    support: int
    """Position in the list of supports."""
    index: int
    similarity: float
    """Cosine of the pooled embeddings."""
    weight: float
    """Its part of the vote; the found slices' weights sum to one."""


class SupportSlices:
    """Offer the support slices that look most like a query slice, and their masks at model size."""

    def __init__(self, supports: Sequence[Support], class_values: tuple[int, ...]) -> None:
        self.supports = list(supports)
        self.class_values = class_values
        self._descriptors_nf = torch.cat([slice_descriptors(support.embeddings) for support in self.supports])
        self._shown: dict[tuple[int, int], np.ndarray] = {}
        self._origin: list[tuple[int, int]] = []
        kept = []
        for s, support in enumerate(self.supports):
            for n, label_hw in enumerate(support.frames.slices_first(support.label_zyx)):
                values = np.unique(label_hw)
                self._shown[s, n] = np.isin(class_values, values)
                # A slice that nobody judged would say that it shows nothing.
                judged = support.ignore_value is None or np.mean(label_hw != support.ignore_value) >= LEAST_JUDGED
                kept.append(judged or bool(self._shown[s, n].any()))
                self._origin.append((s, n))
        self._judged_n = torch.tensor(kept)
        self._number = {slice_: number for number, slice_ in enumerate(self._origin)}
        self._shows: dict[tuple[int, int, int], bool] = {}
        self._masks: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def find(
        self, descriptor_f: torch.Tensor, count: int, temperature: float, *, without: Set[int] = frozenset()
    ) -> list[Found]:
        """Return the ``count`` most similar slices, best first; ``without`` leaves out supports by position.

        Always the same for the same query: SAM2-SGP's code draws its supports at random, with nearly equal chances.
        Weights are a softmax of the similarities, divided by ``temperature``, over what was found.
        """
        allowed_n = self._judged_n.clone()
        if without:
            allowed_n &= torch.tensor([s not in without for s, _ in self._origin])
        similarity_n = torch.where(allowed_n, self._descriptors_nf @ descriptor_f, -torch.inf)
        order = torch.argsort(similarity_n, descending=True, stable=True)[: min(count, int(allowed_n.sum()))]
        best = similarity_n[order]
        weights = torch.softmax((best - best.max()) / temperature, dim=0) if len(best) else best
        return [
            Found(
                support=self._origin[number][0],
                index=self._origin[number][1],
                similarity=float(similarity),
                weight=float(weight),
            )
            for number, similarity, weight in zip(order.tolist(), best, weights, strict=True)
        ]

    def nearest(self, origin: tuple[int, int], pool: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Sort slices (support, index) by their likeness to one of the supports' own, the most similar first."""
        numbers = [self._number[slice_] for slice_ in pool]
        similarity_p = self._descriptors_nf[numbers] @ self._descriptors_nf[self._number[origin]]
        return [pool[p] for p in torch.argsort(similarity_p, descending=True, stable=True).tolist()]

    def shows(self, s: int, n: int, k: int) -> bool:
        """Say whether a slice shows a class at model size."""
        if not self._shown[s, n][k]:
            return False
        if (s, n, k) not in self._shows:
            self._shows[s, n, k] = bool(self.mask(s, n, k).any())
        return self._shows[s, n, k]

    def showing(self, k: int) -> list[tuple[int, int]]:
        """List the slices (support, index) that show a class, in the supports' order."""
        return [(s, n) for s, n in self._origin if self.shows(s, n, k)]

    def mask(self, s: int, n: int, k: int) -> np.ndarray:
        """Return a class's mask on a slice, (S, S) bool, as `Frames.masks_to_model` makes it."""
        key = (s, n, k)
        found = self._masks.get(key)
        if found is None:
            support = self.supports[s]
            size = support.frames.size
            slice_hw = support.frames.slices_first(support.label_zyx)[n] == self.class_values[k]
            found = resize(slice_hw[None].astype(np.float32), (size, size))[0] >= MASK_THRESHOLD
            self._masks[key] = found
            while len(self._masks) * found.nbytes > _KEPT_MASK_BYTES:
                self._masks.popitem(last=False)
        self._masks.move_to_end(key)
        return found
