"""Where in a support or a query the pseudo-videos of one class are joined: drawn, or matched by appearance.

Shape letters: N query slices, M support slices, P prompted slices, F features of a slice, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_sam2.labelling.strategies.insert.videos import Inserted, Walk, walks_from, walks_through

LEAST_TO_SWITCH = 2
"""Labelled slices that a switch needs: one half goes into the query, the other one stays."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """Hold what planning knows of a query and a support, for one class."""

    query_nf: np.ndarray
    """Unit-length descriptions of the query's slices."""
    support_mf: np.ndarray
    support: Inserted
    """What may enter a video: the prompted slices alone, or all."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Say how plans are made."""

    count: int
    """Plans wanted; there are fewer where there are fewer different places."""
    matched: bool
    """Places that look alike; else drawn, or at the same relative place, as in SSL-MedSAM2."""
    twice: bool
    """Visit query slices in both directions."""
    chunks: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Hold the videos of one class in one member, and a JSON record of where they were joined."""

    walks: tuple[Walk, ...]
    place: dict[str, Any]


def la_to_un(pair: Pair, asked: Asked, rng: np.random.Generator) -> list[Plan]:
    """Insert the support before a query slice: the mode that SSL-MedSAM2 (arXiv 2512.11548) uses.

    Matched: before the query slices that look most like a prompted slice, kept apart from each other.
    """
    total = len(pair.query_nf)
    count = min(asked.count, total)
    if asked.matched:
        likeness_n = (pair.query_nf @ pair.support_mf[list(pair.support.prompts)].T).max(axis=1)
        positions = spread_peaks(likeness_n, count)
    else:
        positions = _drawn(rng, range(total), count)
    return [
        Plan(
            walks=tuple(walks_from(pair.support, range(p), range(p, total), twice=asked.twice)),
            place={"before_query_slice": p},
        )
        for p in positions
    ]


def un_to_la(pair: Pair, asked: Asked, rng: np.random.Generator) -> list[Plan]:
    """Insert the whole query between two prompted slices of the support.

    Released, the place is any slice of the support, so that often all prompts lie on one side. Matched: between the
    slices that look most like the query's first and last one. With one prompted slice the query comes after it.
    """
    prompts = pair.support.prompts
    # Before which prompted slice the query comes.
    cuts = list(range(1, len(prompts))) or [1]
    count = min(asked.count, len(cuts))
    if asked.matched:
        first_m, last_m = pair.support_mf @ pair.query_nf[0], pair.support_mf @ pair.query_nf[-1]
        fit = [first_m[prompts[c - 1]] + last_m[prompts[min(c, len(prompts) - 1)]] for c in cuts]
        chosen = [cuts[i] for i in np.argsort(-np.asarray(fit), kind="stable")[:count]]
    else:
        chosen = _drawn(rng, cuts, count)
    plans = []
    for cut in chosen:
        place = prompts[cut - 1] + 1
        before, after = _split(pair.support, place)
        walks = walks_through(range(len(pair.query_nf)), before, after, twice=asked.twice)
        plans.append(Plan(walks=tuple(walks), place={"after_support_slice": place - 1}))
    return plans


def switch(pair: Pair, asked: Asked, rng: np.random.Generator) -> list[Plan]:
    """Exchange a run of half the prompted slices with a run of the query: two videos, which cover the query together.

    In one, the support's run stands in the query and labels the rest of it; in the other, the query's run stands in
    the support. Released, both runs have the same slice numbers, whatever the volumes' lengths, and the second video
    gets the support's own slices back in place of the query's. Here the query's run is as long relative to the query,
    and lies where it looks most like the support's (matched) or at the same relative place.
    """
    prompts, total, depth = pair.support.prompts, len(pair.query_nf), len(pair.support_mf)
    if len(prompts) < LEAST_TO_SWITCH:
        return []
    half = len(prompts) // 2
    begins = range(len(prompts) - half + 1)
    count = min(asked.count, len(begins))
    chosen = spread(np.arange(len(begins)), count) if asked.matched else _drawn(rng, begins, count)
    plans = []
    for begin in chosen:
        low, high = prompts[begin], prompts[begin + half - 1] + 1
        width = int(np.clip(round((high - low) * total / depth), 1, total))
        start = int(np.clip(round(low * total / depth), 0, total - width))
        run = pair.support.between(low, high)
        if asked.matched:
            start = best_window(pair.support_mf[list(run.prompts)] @ pair.query_nf.T, width, start)
        stop = start + width
        outside = walks_from(run, range(start), range(stop, total), twice=asked.twice)
        before, after = pair.support.between(0, low), pair.support.between(high, depth)
        inside = walks_through(range(start, stop), before, after, twice=asked.twice)
        place = {"support_slices": [low, high - 1], "query_slices": [start, stop - 1]}
        plans.append(Plan(walks=(*outside, *inside), place=place))
    return plans


def chunk(pair: Pair, asked: Asked, rng: np.random.Generator) -> list[Plan]:
    """Let each of a few stretches of the query take the place of a stretch of the support; one plan.

    The stretch that gives way has the same relative length, lies where it looks most alike (matched) or at the same
    relative place (released: at the same slice numbers), and never holds more than half of the prompts. Nothing is
    drawn.
    """
    total, depth = len(pair.query_nf), len(pair.support_mf)
    walks: list[Walk] = []
    places = []
    for stretch in np.array_split(np.arange(total), min(asked.chunks, total)):
        first, last = int(stretch[0]), int(stretch[-1])
        width = int(np.clip(round(len(stretch) * depth / total), 1, depth))
        start = int(np.clip(round(first * depth / total), 0, depth - width))
        if asked.matched:
            start = best_window(pair.query_nf[first : last + 1] @ pair.support_mf.T, width, start)
        centre = start + (width - 1) / 2
        stays = set(pair.support.prompts)
        in_window = [m for m in pair.support.prompts if start <= m < start + width]
        for m in sorted(in_window, key=lambda m: (abs(m - centre), m))[: len(stays) // 2]:
            stays.discard(m)
        gone = [m for m in range(start, start + width) if m not in stays]
        joint = int(np.ceil(centre))
        before, after = _split(pair.support.without(gone), joint)
        walks += walks_through([int(n) for n in stretch], before, after, twice=asked.twice)
        places.append({"query_slices": [first, last], "before_support_slice": joint, "instead_of_support_slices": gone})
    return [Plan(walks=tuple(walks), place={"chunks": places})]


MODES: Mapping[str, Callable[[Pair, Asked, np.random.Generator], list[Plan]]] = {
    "la_to_un": la_to_un,
    "un_to_la": un_to_la,
    "switch": switch,
    "chunk": chunk,
}


def spread(indices: np.ndarray, limit: int | None) -> list[int]:
    """Choose at most ``limit`` of ascending indices, evenly spread, the ends included where there is room."""
    if limit is None or len(indices) <= limit:
        return [int(i) for i in indices]
    if limit == 1:
        return [int(indices[len(indices) // 2])]
    return [int(indices[round(i)]) for i in np.linspace(0, len(indices) - 1, limit)]


def spread_peaks(score_n: np.ndarray, count: int) -> list[int]:
    """Choose ``count`` positions of high score that keep a distance where there is room; best first, ties by order."""
    distance = max(1, len(score_n) // (2 * count))
    ranked = [int(n) for n in np.argsort(-score_n, kind="stable")]
    chosen: list[int] = []
    while len(chosen) < count and distance >= 1:
        for n in ranked:
            if len(chosen) < count and all(abs(n - other) >= distance for other in chosen):
                chosen.append(n)
        distance //= 2
    return chosen


def best_window(likeness_rc: np.ndarray, width: int, expected: int) -> int:
    """Return the first of the ``width`` neighbouring columns in which the rows find their best match on average.

    Of equally good windows it is the one nearest to ``expected``.
    """
    windows = np.lib.stride_tricks.sliding_window_view(likeness_rc, width, axis=1)
    score = windows.max(axis=2).mean(axis=0)
    best = np.flatnonzero(np.isclose(score, score.max(), rtol=0.0, atol=1e-6))
    return int(best[np.argmin(np.abs(best - expected))])


def _split(support: Inserted, place: int) -> tuple[Inserted, Inserted]:
    highest = max(support.kept, default=-1) + 1
    return support.between(0, place), support.between(place, max(place, highest))


def _drawn(rng: np.random.Generator, places: range | list[int], count: int) -> list[int]:
    return sorted(int(p) for p in rng.choice(np.asarray(places), size=count, replace=False))
