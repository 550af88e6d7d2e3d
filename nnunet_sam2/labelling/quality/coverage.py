"""Whether lower bounds held, and how often they may be expected to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import betabinom

from nnunet_sam2.labelling.quality.calibration import bound_rank


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Hold how many bounds held, beside what chance alone allows."""

    held: int
    count: int
    target: float
    """Coverage that the bounds promise, with the labelled patients that there were."""
    least: int
    most: int
    """Bounds that hold in nine draws of ten of as many labelled and new patients, 5% beyond either end."""

    @property
    def rate(self) -> float:
        """Return the share of bounds that held."""
        return self.held / self.count

    @property
    def kept(self) -> bool:
        """Say whether the promise was kept: not fewer bounds held than chance allows."""
        return self.held >= self.least

    def to_json(self) -> dict[str, Any]:
        """Return the check as a JSON value."""
        return {**asdict(self), "rate": self.rate, "kept": self.kept}


def check_coverage(
    lower: Sequence[float], dice: Sequence[float], *, calibration_patients: int, coverage: float
) -> Coverage:
    """Count lower bounds of one class that the true Dice of as many new cases reach.

    ``coverage`` is what was asked for. Of m new cases, a patient each, the bounds of one calibration on n patients hold
    for a number that is beta-binomial (Vovk, 2012): few labelled ones give bounds too bold or too timid.
    Bounds of several classes of a case do not hold or fail independently: check class by class, or read ``least`` and
    ``most`` of pooled ones with that in mind. Raises `ValueError` where there is nothing to count.
    """
    if len(lower) != len(dice) or not dice:
        raise ValueError(f"{len(lower)} bounds for {len(dice)} cases; there must be one each, and at least one")
    if calibration_patients < 1:
        raise ValueError("bounds need at least one calibration patient")
    rank = bound_rank(calibration_patients, coverage)
    expected = betabinom(len(dice), calibration_patients + 1 - rank, rank)
    return Coverage(
        held=sum(bool(truth >= bound) for bound, truth in zip(lower, dice, strict=True)),
        count=len(dice),
        target=1.0 - rank / (calibration_patients + 1),
        least=int(expected.ppf(0.05)),
        most=int(expected.ppf(0.95)),
    )
