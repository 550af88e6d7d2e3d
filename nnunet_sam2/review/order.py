"""Which case a person should look at first: the one where looking is likely to change most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, prod

UNKNOWN_DOUBT = 0.5
"""Doubt of a label of which nothing is known."""

WEIGHTS = {"doubt": 1.0, "change": 0.5, "disagreement": 0.5, "unlike": 0.5}
"""How much each sign counts. Doubt is an estimate of the very thing; the others only hint at it."""

_NAMED = 0.1
"""Part of a sign from which on it is named as a reason."""


@dataclass(frozen=True, kw_only=True)
class Signs:
    """Hold what speaks for looking at one class of one case, each 0 (nothing) to 1; None where it is not known."""

    doubt: float | None = None
    """1 - estimated Dice of the newest label."""
    change: float | None = None
    """1 - Dice of the newest label to the one before it."""
    disagreement: float | None = None
    """1 - mean Dice of the members with the label that they were fused to."""
    unlike: float | None = None
    """How far its volume lies outside those of the labelled cases, as `unlikeness` says."""
    missing: bool = False
    """Whether every labelled case shows the class and this one does not."""
    again: bool = False
    """Whether a person rejected the class, and its label has changed since."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Hold what looking at a case is worth, and why."""

    value: float
    by_class: Mapping[int, float]
    """Of the classes that are open: nobody has settled them."""
    worst: int | None
    """The open class that is worth most."""
    why: tuple[str, ...]


def unlikeness(volume: float, known: Sequence[float]) -> float | None:
    """Say how unlike the labelled cases a volume is: 1 - exp(-d / log 2), 0 to 1.

    d is the distance, in logarithms, from the range that the labelled cases span: a volume that is half of their
    smallest, or twice their largest, is unlike them by 0.63. None where there is nothing to compare.
    """
    spanned = [v for v in known if v > 0]
    if not spanned or volume <= 0:
        return None
    distance = max(0.0, log(min(spanned) / volume), log(volume / max(spanned)))
    return 1.0 - exp(-distance / log(2.0))


def worth_of(signs: Signs) -> float:
    """Join the signs of one class to the worth of looking at it, 0 to 1.

    worth = 1 - product over the signs of (1 - weight x sign): each sign alone can put a class on top, none can hide
    another, and what is not known says nothing. A class that is missing or shown again stands at 1.
    """
    if signs.missing or signs.again:
        return 1.0
    return 1.0 - prod(1.0 - WEIGHTS[name] * value for name, value in _values(signs).items())


def reasons(signs: Signs) -> list[tuple[float, str]]:
    """Return why to look at a class, with the part of each reason, the largest first."""
    if signs.again:
        return [(1.0, "rejected before, and this is a newer label")]
    if signs.missing:
        return [(1.0, "every labelled case shows it, this label does not")]
    texts = {
        "doubt": "nothing is known of its quality"
        if signs.doubt is None
        else f"estimated Dice {1.0 - signs.doubt:.2f}",
        "change": f"changed by {signs.change or 0.0:.2f} since the round before",
        "disagreement": f"the members of its label disagree by {signs.disagreement or 0.0:.2f}",
        "unlike": "its volume is unlike those of the labelled cases",
    }
    found = [(WEIGHTS[name] * value, texts[name]) for name, value in _values(signs).items()]
    return sorted((part for part in found if part[0] >= _NAMED), key=lambda part: -part[0])


def rank_case(signs: Mapping[int, Signs], names: Mapping[int, str]) -> Rank:
    """Rank one case by its open classes: it is worth what its worst class is worth.

    ``signs`` holds the open classes alone; with none of them the case is worth nothing.
    """
    by_class = {value: worth_of(own) for value, own in signs.items()}
    if not by_class:
        return Rank(value=0.0, by_class={}, worst=None, why=())
    worst = max(by_class, key=lambda value: by_class[value])
    named = f"{names.get(worst, worst)}: " if len(names) > 1 else ""
    why = [text for _, text in reasons(signs[worst])]
    return Rank(
        value=by_class[worst],
        by_class=by_class,
        worst=worst,
        why=(named + why[0], *why[1:]) if why else (f"{named}nothing stands out",),
    )


def in_order(ranks: Mapping[str, Rank]) -> list[str]:
    """Return the cases with the worth most first; of equals, the one whose classes are worth more on the mean."""

    def key(case_id: str) -> tuple[float, float, str]:
        rank = ranks[case_id]
        mean = sum(rank.by_class.values()) / len(rank.by_class) if rank.by_class else 0.0
        return (-rank.value, -mean, case_id)

    return sorted(ranks, key=key)


def _values(signs: Signs) -> dict[str, float]:
    found = {
        "doubt": UNKNOWN_DOUBT if signs.doubt is None else signs.doubt,
        "change": signs.change,
        "disagreement": signs.disagreement,
        "unlike": signs.unlike,
    }
    return {name: min(1.0, max(0.0, value)) for name, value in found.items() if value is not None}
