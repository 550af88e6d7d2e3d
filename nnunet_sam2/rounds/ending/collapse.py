"""How a loop goes wrong while its labels look settled or busy: four ways to collapse, each with its evidence.

Pure functions on what the rounds left. Labels are looked at before a round is trained on them, so that no time goes
into labels that have collapsed; confirmation shows itself in the validation after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from nnunet_sam2.rounds.ending.convergence import RoundOutcome, StopReason

NOT_SHRINKING = 0.8
"""A change that is at least this part of the one before does not shrink: damped swinging is on its way to rest."""


@dataclass(frozen=True, kw_only=True)
class Signs:
    """Hold what a round's labels show of the loop's health, over all unlabelled cases."""

    volume_mm3: dict[int, float]
    """Mean volume of a class, cases without it included."""
    empty_share: dict[int, float]
    """Share of the cases that lack a class."""
    agreement: float | None = None
    """Mean Dice of the labels with what the student itself predicted; None without a student."""
    two_round_change: float | None = None
    """Mean change, 1 - Dice, to the labels of two rounds before; None in the first two rounds."""

    def to_json(self) -> dict[str, Any]:
        """Return the signs as a JSON value; JSON wants text as keys."""
        return {
            "volume_mm3": {str(value): volume for value, volume in self.volume_mm3.items()},
            "empty_share": {str(value): share for value, share in self.empty_share.items()},
            "agreement": self.agreement,
            "two_round_change": self.two_round_change,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Signs:
        """Rebuild the signs from `to_json`."""
        return cls(
            volume_mm3={int(key): volume for key, volume in value["volume_mm3"].items()},
            empty_share={int(key): share for key, share in value["empty_share"].items()},
            agreement=value["agreement"],
            two_round_change=value["two_round_change"],
        )


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Say why a run ends, and what shows it."""

    reason: StopReason
    text: str = ""
    """The evidence in one sentence; empty where the reason says it all."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """The evidence as a JSON value."""

    @property
    def evidence(self) -> dict[str, Any]:
        """Return what the ledger keeps."""
        return {"text": self.text, **self.numbers} if self.text else {}


def label_collapse(
    signs: Mapping[int, Signs],
    human: Signs,
    changes: Mapping[int, float],
    *,
    volume_drift: float,
    empty_rise: float,
    oscillation: float,
    settled_change: float,
) -> Ending | None:
    """Look for a collapse in the labels of the rounds so far, by round number; None where there is none.

    ``human`` are the signs of the human labels, ``changes`` the mean changes from round to round.
    """
    if len(signs) < 2:
        return None
    first, before, last = min(signs), *sorted(signs)[-2:]
    return (
        vanished_class(signs[first], signs[last], human, rise=empty_rise)
        or drifted_volume(signs[first], signs[last], human, factor=volume_drift)
        or swinging_labels(
            changes.get(before), changes.get(last), signs[last].two_round_change, oscillation, settled_change
        )
    )


def vanished_class(first: Signs, now: Signs, human: Signs, *, rise: float) -> Ending | None:
    """Find a class that many more cases lack than in the first round, and than in the human labels."""
    for value, share in now.empty_share.items():
        before, known = first.empty_share.get(value, 0.0), human.empty_share.get(value, 0.0)
        if share - before > rise and share - known > rise:
            return Ending(
                reason=StopReason.EMPTY_CLASS,
                text=f"class {value} is missing in {share:.0%} of the unlabelled cases, in the first round in "
                f"{before:.0%}, in the human labels in {known:.0%} (limit: {rise:.0%} more)",
                numbers={"class": value, "share": share, "first_round": before, "human": known, "limit": rise},
            )
    return None


def drifted_volume(first: Signs, now: Signs, human: Signs, *, factor: float) -> Ending | None:
    """Find a class whose mean volume moved by ``factor`` since the first round, and away from the human labels'.

    Towards them it is what the loop is for: SAM 2's first labels may be much too large or too small.
    """
    for value, volume in now.volume_mm3.items():
        before, known = first.volume_mm3.get(value, 0.0), human.volume_mm3.get(value, 0.0)
        if before <= 0 or abs(_log_ratio(volume, before)) <= math.log(factor):
            continue
        if known > 0 and abs(_log_ratio(volume, known)) <= abs(_log_ratio(before, known)):
            continue
        return Ending(
            reason=StopReason.VOLUME_DRIFT,
            text=f"class {value} has a mean volume of {volume / 1000:.3g} mL, in the first round of "
            f"{before / 1000:.3g} mL, in the human labels of {known / 1000:.3g} mL (limit: a factor of {factor:g} "
            "away from them)",
            numbers={"class": value, "mm3": volume, "first_round": before, "human": known, "limit": factor},
        )
    return None


def swinging_labels(
    previous_change: float | None,
    change: float | None,
    two_round_change: float | None,
    ratio: float,
    settled_change: float,
) -> Ending | None:
    """Find labels that swing between two states: far from the last round's, close to those before, and not slowing.

    Labels on their way somewhere are further from those of two rounds ago than from the last ones; labels that jitter
    about a point are as far from either; only labels that swing are closer. A ``ratio`` of one half is clear of both.
    """
    if previous_change is None or change is None or two_round_change is None or change <= settled_change:
        return None
    if change < NOT_SHRINKING * previous_change or two_round_change >= ratio * change:
        return None
    return Ending(
        reason=StopReason.OSCILLATION,
        text=f"labels are {change:.3f} from the last round's but only {two_round_change:.3f} from those of the round "
        f"before it (limit: {ratio:g} of the change), and the change before was {previous_change:.3f}",
        numbers={
            "change": change,
            "two_round_change": two_round_change,
            "previous_change": previous_change,
            "limit": ratio,
        },
    )


def settled_but_for_noise(change: float, two_round_change: float, limit: float) -> Ending:
    """Say of labels that move no further (`only_noise`) what shows it."""
    return Ending(
        reason=StopReason.CONVERGED,
        text=f"labels are {change:.3f} from the last round's and {two_round_change:.3f} from those of the round before "
        f"it: they move by no more than {limit:g} a round, the rest is what one training differs from another",
        numbers={"change": change, "two_round_change": two_round_change, "limit": limit},
    )


def confirmed_errors(rounds: Sequence[RoundOutcome], signs: Mapping[int, Signs], *, drop: float) -> Ending | None:
    """Find a loop that learns its own errors: validation on human labels falls while labels agree with the student.

    Either by more than ``drop`` below the best round, or twice in a row and by more than half of it in sum; each time
    with labels that agreed more with the student than before.
    """
    scored = [
        (r.number, r.validation_dice, signs[r.number].agreement)
        for r in rounds
        if r.validation_dice is not None and r.number in signs
    ]
    known = [(number, dice, agreed) for number, dice, agreed in scored if agreed is not None]
    if len(known) < 2:
        return None
    best, last = max(known[:-1], key=lambda item: (item[1], item[0])), known[-1]
    since = [best, last]
    fell = best[1] - last[1] > drop and last[2] > best[2]
    if not fell and len(known) >= 3:
        since = known[-3:]
        falling = all(a[1] > b[1] and a[2] < b[2] for a, b in pairwise(since))
        fell = falling and since[0][1] - last[1] > drop / 2
    if not fell:
        return None
    told = " to ".join(f"{dice:.3f}" for _, dice, _ in since)
    agreed = " to ".join(f"{agreement:.3f}" for _, _, agreement in since)
    return Ending(
        reason=StopReason.CONFIRMATION,
        text=f"validation Dice on human labels fell from {told} (rounds {', '.join(str(n) for n, _, _ in since)}) "
        f"while the labels' Dice with the student's own predictions rose from {agreed}",
        numbers={
            "rounds": [number for number, _, _ in since],
            "validation_dice": [dice for _, dice, _ in since],
            "agreement": [agreement for _, _, agreement in since],
            "limit": drop,
        },
    )


def _log_ratio(one: float, other: float) -> float:
    return math.log(one / other) if one > 0 else -math.inf
