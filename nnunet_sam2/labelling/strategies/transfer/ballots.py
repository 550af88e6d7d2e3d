"""Whether the supports agree: what each of them would have made of a query by its own votes among the neighbours.

Shape letters: P locations or quarters of them, K neighbours, C channels (background first), S supports.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_LEAST_SHARE = 0.02
"""Part of the votes on a location below which a support has nothing to say there and follows all the others."""

_DECIMALS = 6


class Ballots:
    """Add up, slice by slice, how much the labels of every two supports overlap, by the votes that made the label."""

    def __init__(self, supports: int, classes: int) -> None:
        self._overlap_sskt = torch.zeros((supports, supports, classes, 2), dtype=torch.float64)

    def add(self, weight_pk: torch.Tensor, labels_pkc: torch.Tensor, owner_pk: torch.Tensor) -> None:
        """Count one slice: the neighbours' weights, their soft labels and which support each is of."""
        supports, _, classes, _ = self._overlap_sskt.shape
        own_pks = torch.nn.functional.one_hot(owner_pk, supports).to(weight_pk.dtype) * weight_pk[..., None]
        votes_psc = torch.bmm(own_pks.transpose(1, 2), labels_pkc)
        silent_ps = votes_psc.sum(dim=2) < _LEAST_SHARE
        winner_ps = torch.where(silent_ps, votes_psc.sum(dim=1).argmax(dim=1)[:, None], votes_psc.argmax(dim=2))
        for k in range(classes):
            won_ps = (winner_ps == k + 1).double()
            size_s = won_ps.sum(dim=0)
            self._overlap_sskt[:, :, k, 0] += 2.0 * won_ps.T @ won_ps
            self._overlap_sskt[:, :, k, 1] += size_s[:, None] + size_s

    def agreement(self, class_values: Sequence[int]) -> dict[str, float | None]:
        """Return the mean Dice of two supports for every class value; None with one support, or where none has it."""
        supports = len(self._overlap_sskt)
        pairs = torch.triu_indices(supports, supports, offset=1)
        found: dict[str, float | None] = {}
        for k, value in enumerate(class_values):
            both, total = self._overlap_sskt[pairs[0], pairs[1], k].unbind(dim=1)
            known = total > 0
            found[str(value)] = round(float((both[known] / total[known]).mean()), _DECIMALS) if known.any() else None
        return found
