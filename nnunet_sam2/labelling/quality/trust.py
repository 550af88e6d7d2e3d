"""What quality does to a label that is trained on: how far its voxels are trusted, and which classes are not at all.

Shape letters: C channels (background first), K classes, z y x voxels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

from nnunet_sam2.labelling.leave_one_out import DiceTable
from nnunet_sam2.labelling.quality.calibration import Calibration
from nnunet_sam2.labelling.quality.features import CaseFeatures

DOUBTED = 0.1
"""Probability from which on a voxel may belong to a class whose label is not trusted."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Say which classes of one label are fit to be learnt from."""

    estimate: DiceTable
    """Estimated Dice; None where nothing is known of the class."""
    failed: tuple[int, ...]
    """Classes whose estimate is below the least."""
    reason: str | None
    """Why the whole case is left out; None where it is not."""


def judge(estimate: DiceTable, least: float) -> Verdict:
    """Say which classes of a case fail, and whether there is anything left of it to learn from."""
    known = {value: dice for value, dice in estimate.items() if dice is not None}
    failed = tuple(value for value, dice in known.items() if dice < least)
    reason = None
    if known and len(failed) == len(known):
        shown = ", ".join(f"class {value}: {known[value]:.2f}" for value in failed)
        reason = f"its estimated Dice is below {least:g} in every class that was judged ({shown})"
    return Verdict(estimate=dict(estimate), failed=failed, reason=reason)


def fused_estimate(
    sources: Mapping[str, DiceTable], weights: Mapping[str, Mapping[int, float]], voxels: Mapping[int, int]
) -> DiceTable:
    """Estimate a fused label's Dice by class: the mean of its sources', weighted as they were fused.

    A class that nobody drew stands at 0 where a source takes it for missed, and is unknown elsewhere.
    """
    table: DiceTable = {}
    for value, count in voxels.items():
        known = {name: dice for name, own in sources.items() if (dice := own.get(value)) is not None}
        if not count:
            table[value] = 0.0 if 0.0 in known.values() else None
            continue
        total = sum(weights[name][value] for name in known)
        table[value] = sum(weights[name][value] * dice for name, dice in known.items()) / total if total > 0 else None
    return table


def trusted_confidence(
    confidence_zyx: np.ndarray,
    label_zyx: np.ndarray,
    prob_czyx: np.ndarray,
    class_values: Sequence[int],
    verdict: Verdict,
) -> np.ndarray:
    """Scale voxels' confidence by the estimated Dice of the classes that are in question there, float32, 0 to 1.

    Both sides of a class's border are scaled alike, so that the loss keeps its balance between class and background.
    Where no class has a probability of `DOUBTED` the scaling fades out: that nothing is there far from every organ is
    certain however the organs were drawn. Where a failed class is or may be, confidence is 0: such voxels are neither
    class nor background.
    """
    known = [dice for dice in verdict.estimate.values() if dice is not None]
    if not known:
        return confidence_zyx
    mean = float(np.mean(known))
    dice_k = np.array([mean if (d := verdict.estimate.get(v)) is None else d for v in class_values], np.float32)
    seen_zyx = prob_czyx[1:].sum(axis=0) + np.float32(1e-6)
    dice_zyx = np.tensordot(dice_k, prob_czyx[1:] + np.float32(1e-6) / len(dice_k), axes=1) / seen_zyx
    in_question_zyx = np.minimum(seen_zyx / np.float32(DOUBTED), 1.0)
    scaled_zyx = confidence_zyx * (1.0 - in_question_zyx * (1.0 - dice_zyx))
    for k, value in enumerate(class_values):
        if value in verdict.failed:
            scaled_zyx[(label_zyx == value) | (prob_czyx[k + 1] >= DOUBTED)] = 0.0
    return np.asarray(scaled_zyx, np.float32)


def spread_quality(
    level: Mapping[int, float], seen: Mapping[str, CaseFeatures], calibration: Calibration
) -> dict[str, DiceTable]:
    """Spread a source's mean Dice of each class, known from elsewhere, over its cases by what was seen of them.

    For a student, whose labelled cases are training cases and calibrate nothing: the slopes are those of SAM 2's
    labels, and each class's median case keeps ``level``. A class that a case lacks stands at 0 where every labelled
    case shows it, and is unknown elsewhere.
    """
    shifts = {name: calibration.shift(features) for name, features in seen.items()}
    table: dict[str, DiceTable] = {name: {} for name in seen}
    for value, dice in level.items():
        found = [row[value] for row in shifts.values() if value in row]
        centre = float(np.median(found)) if found else 0.0
        start = float(logit(np.clip(dice, 0.01, 0.99)))
        for name, features in seen.items():
            if value in shifts[name]:
                table[name][value] = float(expit(start + shifts[name][value] - centre))
            else:
                table[name][value] = 0.0 if features[value].shown_in == 1.0 else None
    return table
