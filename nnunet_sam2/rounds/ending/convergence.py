"""When the loop ends: how far labels moved since the last round, and the named reasons to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np


class StopReason(str, Enum):
    """Name why a run ended."""

    CONVERGED = "converged"
    ROUND_LIMIT = "round limit"
    VALIDATION_FELL = "validation Dice fell"
    NOTHING_TO_LABEL = "nothing to label"
    VOLUME_DRIFT = "volumes drift"
    EMPTY_CLASS = "a class vanishes"
    OSCILLATION = "labels oscillate"
    CONFIRMATION = "errors are confirmed"


@dataclass(frozen=True, kw_only=True)
class Change:
    """Hold the label change of one round: 1 - Dice to the round before, for each case and class."""

    by_case: dict[str, dict[int, float]]
    mean: float
    worst_tenth: float
    """Mean over the tenth of the (case, class) pairs that changed most, at least one pair."""


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """Hold what the stopping rule looks at."""

    number: int
    change: Change | None
    """None in the first round, which has nothing to be compared with."""
    validation_dice: float | None
    """Mean Dice on held-out human labels; None where no labelled case could be spared."""


def class_change(previous_zyx: np.ndarray, current_zyx: np.ndarray, class_values: Sequence[int]) -> dict[int, float]:
    """Compute 1 - Dice of two label maps for each class that is present in either of them."""
    if previous_zyx.shape != current_zyx.shape:
        raise ValueError(f"label maps differ in shape: {previous_zyx.shape} against {current_zyx.shape}")
    change = {}
    for value in class_values:
        before, now = previous_zyx == value, current_zyx == value
        total = int(before.sum()) + int(now.sum())
        if total:
            change[value] = 1.0 - 2.0 * int((before & now).sum()) / total
    return change


def summarise_change(by_case: Mapping[str, Mapping[int, float]]) -> Change:
    """Reduce the changes of all cases and classes to their mean and the mean of their worst tenth."""
    values = sorted((v for changes in by_case.values() for v in changes.values()), reverse=True)
    worst = values[: max(1, math.ceil(len(values) / 10))]
    return Change(
        by_case={case: dict(changes) for case, changes in by_case.items()},
        mean=float(np.mean(values)) if values else 0.0,
        worst_tenth=float(np.mean(worst)) if worst else 0.0,
    )


def stop_reason(
    rounds: Sequence[RoundOutcome],
    *,
    round_limit: int,
    mean_change: float,
    worst_tenth_change: float,
    validation_drop: float,
    two_round_change: float | None = None,
) -> StopReason | None:
    """Decide after a round whether the loop ends, and why.

    ``two_round_change`` is the mean change to the labels of two rounds ago, where there are any.

    A fall of the validation Dice outranks convergence: labels that settle on something worse have not converged
    to anything worth having.
    """
    last = rounds[-1]
    seen = [r.validation_dice for r in rounds if r.validation_dice is not None]
    if last.number > 0 and last.validation_dice is not None and max(seen) - last.validation_dice > validation_drop:
        return StopReason.VALIDATION_FELL
    if last.change is not None and last.change.mean <= mean_change and last.change.worst_tenth <= worst_tenth_change:
        return StopReason.CONVERGED
    if last.change is not None and only_noise(last.change.mean, two_round_change, mean_change):
        return StopReason.CONVERGED
    if last.number >= round_limit:
        return StopReason.ROUND_LIMIT
    return None


def only_noise(change: float, two_round_change: float | None, limit: float) -> bool:
    """Say whether labels still change, but move no further than ``limit`` a round.

    Two students that learn from the same labels differ by chance. Labels that chance moves about a point are as far
    from those of two rounds ago as from the last ones; what lies between the two distances is how far they moved.
    """
    return two_round_change is not None and abs(two_round_change - change) <= limit


def kept_round(rounds: Sequence[RoundOutcome], *, since: int, drop: float) -> int:
    """Choose the round to keep where people had their word, which the rounds from ``since`` on know (0: nobody had).

    The best of those that know it, as long as its validation Dice is not more than ``drop`` below the best of all.
    """
    best = best_round(rounds)
    knowing = [r for r in rounds if r.number >= since]
    if not since or not knowing:
        return best
    chosen = best_round(knowing)
    dice = {r.number: r.validation_dice for r in rounds}
    most, own = dice[best], dice[chosen]
    return best if most is not None and own is not None and own < most - drop else chosen


def best_round(rounds: Sequence[RoundOutcome]) -> int:
    """Choose the round to keep: the highest validation Dice, the later one of equals, the last where none is known."""
    scored = [r for r in rounds if r.validation_dice is not None]
    if not scored:
        return rounds[-1].number
    return max(scored, key=lambda r: (r.validation_dice or 0.0, r.number)).number
