"""What a label is worth, and whether that was foreseen: pure functions on masks and on rows of figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from nnunet_sam2.labelling.quality.coverage import check_coverage

Estimated = Mapping[str, Mapping[str, float | None]]
"""Class value -> true ``dice``, estimated ``estimate`` and ``lower`` bound of one case; None where unknown."""

_FEWEST_PAIRS = 5
"""Fewer pairs of estimated and true Dice say nothing about their order."""


def organ_slice_dice(guess_zyx: np.ndarray, truth_zyx: np.ndarray, slice_axis: int) -> float | None:
    """Compute the Dice of two masks over the slices on which the truth has the organ; None where it has it nowhere."""
    others = tuple(axis for axis in range(truth_zyx.ndim) if axis != slice_axis)
    shown = np.flatnonzero(truth_zyx.any(axis=others))
    if not len(shown):
        return None
    return mask_dice(np.take(guess_zyx, shown, axis=slice_axis), np.take(truth_zyx, shown, axis=slice_axis))


def mask_dice(guess_zyx: np.ndarray, truth_zyx: np.ndarray) -> float | None:
    """Compute the Dice of two masks; None where both are empty."""
    total = int(np.count_nonzero(guess_zyx)) + int(np.count_nonzero(truth_zyx))
    return 2.0 * int(np.count_nonzero(guess_zyx & truth_zyx)) / total if total else None


def rank_correlation(cases: Iterable[Estimated]) -> dict[str, Any]:
    """Correlate estimated and true Dice by rank (Spearman) over all pairs of a case and a class.

    ``spearman`` is None for fewer than five pairs and where one side is the same everywhere; ``error`` is the mean
    absolute difference.
    """
    pairs = [
        (row["estimate"], row["dice"])
        for case in cases
        for row in case.values()
        if row["estimate"] is not None and row["dice"] is not None
    ]
    estimates, truths = np.array(pairs, float).reshape(-1, 2).T
    told = len(pairs) >= _FEWEST_PAIRS and np.ptp(estimates) > 0 and np.ptp(truths) > 0
    return {
        "pairs": len(pairs),
        "spearman": round(float(spearmanr(estimates, truths).statistic), 4) if told else None,
        "error": round(float(np.abs(estimates - truths).mean()), 4) if pairs else None,
    }


def bound_coverage(
    cases: Sequence[Estimated], calibration_cases: Mapping[str, int], coverage: float
) -> dict[str, dict[str, Any]]:
    """Check lower bounds class by class; classes without a bound are left out.

    ``calibration_cases`` says with how many labelled cases each class was calibrated.
    """
    checks = {}
    for value, count in calibration_cases.items():
        rows = [case[value] for case in cases if value in case]
        known = [(r["lower"], r["dice"]) for r in rows if r["lower"] is not None and r["dice"] is not None]
        if known and count:
            lower, dice = zip(*known, strict=True)
            checks[value] = check_coverage(lower, dice, calibration_patients=count, coverage=coverage).to_json()
    return checks


def pooled_coverage(checks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Add up the checks of the classes; None where there is none."""
    if not checks:
        return None
    rows = list(checks.values())
    return {
        "held": sum(row["held"] for row in rows),
        "count": sum(row["count"] for row in rows),
        "target": min(row["target"] for row in rows),
        "classes_kept": sum(bool(row["kept"]) for row in rows),
        "classes": len(rows),
    }
