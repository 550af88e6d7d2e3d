"""Pseudo-videos of a query and a support as lists of slices: which to lay out, and which answers to take from them.

Nothing here knows images: slices are numbers. Shape letters: N query slices, M support slices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

QUERY, SUPPORT = "query", "support"

Slot = tuple[str, int]
"""A frame of a pseudo-video: `QUERY` or `SUPPORT`, and the slice of that volume."""


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Lay out one pseudo-video and say which way it is walked, and for which query slices."""

    slots: tuple[Slot, ...]
    asked: frozenset[int]
    """Query slices whose answers are taken; each stands in the video once."""
    reverse: bool = False


@dataclass(frozen=True, kw_only=True)
class Inserted:
    """Name the slices of a support that stand in a video, ascending, and those of them that carry a mask prompt."""

    kept: tuple[int, ...]
    prompts: tuple[int, ...]

    def between(self, low: int, high: int) -> Inserted:
        """Return what lies in ``low <= m < high``."""
        return Inserted(
            kept=tuple(m for m in self.kept if low <= m < high),
            prompts=tuple(m for m in self.prompts if low <= m < high),
        )

    def without(self, gone: Iterable[int]) -> Inserted:
        """Return all but the slices in ``gone``."""
        dropped = set(gone)
        return Inserted(
            kept=tuple(m for m in self.kept if m not in dropped),
            prompts=tuple(m for m in self.prompts if m not in dropped),
        )


def walks_from(support: Inserted, before: Sequence[int], after: Sequence[int], *, twice: bool) -> list[Walk]:
    """Put the support between two runs of query slices and walk from it to both ends.

    ``twice`` adds the ways back: each run is walked once more towards the place of insertion, with the support at its
    far end. (SSL-MedSAM2's backward pass never gets there: its mean of two directions covers the inserted slices
    alone.)
    """
    first, middle, last = _slots(QUERY, before), _slots(SUPPORT, support.kept), _slots(QUERY, after)
    video = (*first, *middle, *last)
    walks = []
    if after:
        walks.append(Walk(slots=video, asked=frozenset(after)))
    if before:
        walks.append(Walk(slots=video, asked=frozenset(before), reverse=True))
    if twice and before:
        walks.append(Walk(slots=(*middle, *first), asked=frozenset(before)))
    if twice and after:
        walks.append(Walk(slots=(*last, *middle), asked=frozenset(after), reverse=True))
    return walks


def walks_through(query: Sequence[int], before: Inserted, after: Inserted, *, twice: bool) -> list[Walk]:
    """Put query slices between two parts of a support and walk through them.

    From the prompted part before them forward, and from the part after them backward: both with ``twice``, else the
    first of the two that there is. Either way SAM 2 attends to the prompts on both sides.
    """
    video = (*_slots(SUPPORT, before.kept), *_slots(QUERY, query), *_slots(SUPPORT, after.kept))
    ways = [reverse for reverse, side in ((False, before), (True, after)) if side.prompts]
    return [Walk(slots=video, asked=frozenset(query), reverse=reverse) for reverse in ways[: 2 if twice else 1]]


def _slots(volume: str, slices: Sequence[int]) -> tuple[Slot, ...]:
    return tuple((volume, n) for n in slices)
