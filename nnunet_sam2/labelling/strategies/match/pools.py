"""Sets of candidates, and the ranking of their members by likeness to query slices.

Shape letters: Q query slices, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_sam2.labelling.strategies.match.candidates import Candidate, Candidates
from nnunet_sam2.labelling.strategies.transfer.memory import LEAST_JUDGED
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Support
from nnunet_sam2.support.matching import Metric

_BLOCK = 32
"""Candidates that are compared at once."""
_SPARE = 8
"""Candidates beyond those asked for that are measured exactly: the first comparison may err in its last digits."""
_KEPT_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Hold a candidate with its distance from one query slice."""

    candidate: Candidate
    distance: float


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Name the support slices that some classes are matched with, and how they are varied."""

    classes: tuple[int, ...]
    """Positions k of the classes that are carried over together."""
    origin: tuple[tuple[int, int], ...]
    """Slices (support, index)."""
    variants: int
    """Variants of each."""
    shortlist: int | None
    """Slices, the most similar as they are, whose variants are looked at; none: all variants compete."""

    @property
    def size(self) -> int:
        """Return how many candidates one query slice can choose from."""
        slices = len(self.origin) if self.shortlist is None else min(self.shortlist, len(self.origin))
        return slices * (1 + self.variants)


class Ranking:
    """Rank candidates by a metric; descriptions are kept, up to a gigabyte, and computed anew beyond."""

    def __init__(self, candidates: Candidates, metric: Metric, backend: Sam2Backend) -> None:
        self._candidates = candidates
        self._metric = metric
        self._backend = backend
        self._kept: dict[Candidate, np.ndarray] = {}
        self._bytes = 0

    def rank(self, pool: Pool, query: np.ndarray, count: int) -> list[list[Ranked]]:
        """Return the ``count`` best candidates of each of Q described slices, best first; ties in the pool's order."""
        base = [Candidate(support=s, index=n) for s, n in pool.origin]
        if pool.shortlist is None:
            everything = [c for candidate in base for c in (candidate, *_varied(candidate, pool.variants))]
            contenders = self._nearest(query, everything, count + _SPARE)
        else:
            short = self._nearest(query, base, pool.shortlist)
            contenders = [
                [c for candidate in found for c in (candidate, *_varied(candidate, pool.variants))] for found in short
            ]
        return [self._sorted(query[q], found)[:count] for q, found in enumerate(contenders)]

    def _nearest(self, query: np.ndarray, candidates: Sequence[Candidate], count: int) -> list[list[Candidate]]:
        """Return each slice's nearest candidates, the order of the pool among equals."""
        blocks = [candidates[start : start + _BLOCK] for start in range(0, len(candidates), _BLOCK)]
        distance_qc = np.concatenate([self._metric.distances(query, self._described(b)) for b in blocks], axis=1)
        order_qc = np.argsort(distance_qc, axis=1, kind="stable")[:, :count]
        return [[candidates[c] for c in order_c] for order_c in order_qc]

    def _sorted(self, query: np.ndarray, candidates: Sequence[Candidate]) -> list[Ranked]:
        (distance_c,) = self._metric.distances(query[None], self._described(candidates), exact=True)
        ranked = [
            Ranked(candidate=candidate, distance=float(distance))
            for candidate, distance in zip(candidates, distance_c, strict=True)
        ]
        return sorted(ranked, key=lambda r: r.distance)

    def _described(self, candidates: Sequence[Candidate]) -> np.ndarray:
        return np.stack([self._description(candidate) for candidate in candidates])

    def _description(self, candidate: Candidate) -> np.ndarray:
        found = self._kept.get(candidate)
        if found is None:
            if candidate.variant is None:
                support = self._candidates.supports[candidate.support]
                (found,) = self._metric.describe(support.frames, support.embeddings, [candidate.index])
            else:
                found = self._metric.describe_image(self._candidates.image(candidate), self._backend)
            if self._bytes + found.nbytes <= _KEPT_BYTES:
                self._kept[candidate] = found
                self._bytes += found.nbytes
        return found


def volume_pool(candidates: Candidates, *, variants: int, shortlist: int) -> Pool:
    """Offer all slices of all supports to all classes together; a slice without any class says that there is none.

    Slices with voxels that nobody has judged are left out where others show every class: a mask says that all else is
    background. Where they are needed, those count that show a class or are judged for the most part.
    """
    everything, sure = [], []
    for s, support in enumerate(candidates.supports):
        judged_n, shows_n = judged_part(support), np.asarray(candidates.areas(s).any(axis=1))
        for n in range(len(support.frames)):
            if shows_n[n] or judged_n[n] >= LEAST_JUDGED:
                everything.append((s, n))
            if judged_n[n] == 1.0:
                sure.append((s, n))
    shown, surely = (_classes_shown(candidates, origin) for origin in (everything, sure))
    return Pool(
        classes=tuple(range(len(candidates.class_values))),
        origin=tuple(sure if (surely == shown).all() else everything),
        variants=variants,
        shortlist=shortlist,
    )


def single_slice_pools(candidates: Candidates, *, variants: int) -> list[Pool]:
    """Offer each class one slice in many variants: that with its largest mask in the first support that shows it.

    One support slice and one class at a time is the published protocol. Slices with voxels that nobody has judged are
    taken where there are no others.
    """
    pools = []
    for k in range(len(candidates.class_values)):
        for s, support in enumerate(candidates.supports):
            area_n = candidates.areas(s)[:, k]
            if area_n.any():
                sure_n = area_n * (judged_part(support) == 1.0)
                best = int(np.argmax(sure_n if sure_n.any() else area_n))
                pools.append(Pool(classes=(k,), origin=((s, best),), variants=variants, shortlist=None))
                break
    return pools


def judged_part(support: Support) -> np.ndarray:
    """Return the part of each slice that a human has judged."""
    if support.ignore_value is None:
        return np.ones(len(support.frames))
    judged_nhw = support.frames.slices_first(support.label_zyx) != support.ignore_value
    return np.asarray(judged_nhw.mean(axis=(1, 2)))


def _classes_shown(candidates: Candidates, origin: Sequence[tuple[int, int]]) -> np.ndarray:
    shown_k = np.zeros(len(candidates.class_values), bool)
    for s, n in origin:
        shown_k |= candidates.areas(s)[n] > 0
    return shown_k


def _varied(candidate: Candidate, variants: int) -> list[Candidate]:
    return [Candidate(support=candidate.support, index=candidate.index, variant=v) for v in range(variants)]
