"""What quality does to a label that is trained on: how far its voxels are trusted, and which classes are not at all.

Shape letters: C channels (background first), K classes, z y x voxels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

from nnunet_sam2.labelling.fusion import confidence_of
from nnunet_sam2.labelling.leave_one_out import DiceTable
from nnunet_sam2.labelling.quality.calibration import Calibration
from nnunet_sam2.labelling.quality.features import CaseFeatures
from nnunet_sam2.labelling.temperature import (
    DOUBTED,
    LEAST,
    LEAST_PROBABILITY,
    MOST,
    in_doubt,
    log_probability,
    softmax,
)

_TEMPERATURES = tuple(np.geomspace(LEAST, MOST, 49).tolist())


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
    sources: Mapping[str, DiceTable],
    weights: Mapping[str, Mapping[int, float]],
    agreement: DiceTable,
    voxels: Mapping[int, int],
) -> DiceTable:
    """Estimate a fused label's Dice by class from its sources', their weights and their Dice with each other.

    Borders are displaced by 1 - Dice, on a scale, and what is drawn is their weighted mean: so squared errors average
    by weight, less by what the sources do not share, ``w1 e1^2 + w2 e2^2 - w1 w2 D^2`` with the disagreement D. A class
    that nobody drew stands at 0 where a source takes it for missed, and is unknown elsewhere.
    """
    table: DiceTable = {}
    for value, count in voxels.items():
        known = {name: dice for name, own in sources.items() if (dice := own.get(value)) is not None}
        if not count:
            table[value] = 0.0 if 0.0 in known.values() else None
            continue
        total = sum(weights[name][value] for name in known)
        if not total > 0:
            table[value] = None
            continue
        shares = {name: weights[name][value] / total for name in known}
        squared = sum(share * (1.0 - known[name]) ** 2 for name, share in shares.items())
        if len(known) == 2 and (agreed := agreement.get(value)) is not None:
            squared -= float(np.prod(list(shares.values()))) * (1.0 - agreed) ** 2
        table[value] = 1.0 - float(np.sqrt(max(squared, 0.0)))
    return table


def trusted_confidence(
    label_zyx: np.ndarray, prob_czyx: np.ndarray, class_values: Sequence[int], verdict: Verdict
) -> np.ndarray:
    """Say of each voxel how much surer its label is right than wrong, float32: 2 P - 1, and 0 at a half and below.

    P is the label's probability, made as sure as the classes' estimated Dice allows: by the temperature of each class
    at which its probabilities foretell that Dice. So an estimate acts where there is doubt, on both sides of a border
    alike, and hardly on what is certain: the inside, and background far from every organ (where no class has
    `DOUBTED` the temperature fades out). Where a failed class is or may be, confidence is 0: such voxels are neither
    class nor background.
    """
    temperature_k = np.ones(len(class_values), np.float32)
    for k, value in enumerate(class_values):
        if (dice := verdict.estimate.get(value)) is not None:
            temperature_k[k] = _foretelling(prob_czyx[k + 1], label_zyx == value, dice)
    values = np.array([0, *class_values])
    trusted_zyx = np.empty(label_zyx.shape, np.float32)
    # Slice by slice, for a whole map of powers would be one array too many.
    for z, label_yx in enumerate(label_zyx):
        prob_cyx = prob_czyx[:, z]
        seen_yx = prob_cyx[1:].sum(axis=0) + np.float32(1e-6)
        excess_yx = np.tensordot(temperature_k - 1.0, prob_cyx[1:], axes=1) / seen_yx
        temperature_yx = 1.0 + excess_yx * in_doubt(seen_yx)
        right_cyx = softmax(log_probability(prob_cyx.copy()) / temperature_yx)
        right_yx = np.take_along_axis(right_cyx, np.searchsorted(values, label_yx)[None], axis=0)[0]
        trusted_zyx[z] = confidence_of(right_yx, "margin")
    for k, value in enumerate(class_values):
        if value in verdict.failed:
            trusted_zyx[(label_zyx == value) | (prob_czyx[k + 1] >= DOUBTED)] = 0.0
    return trusted_zyx


def _foretelling(prob_zyx: np.ndarray, mask_zyx: np.ndarray, dice: float) -> float:
    """Find the temperature at which a class's probabilities foretell a Dice of its mask."""
    # In steps of probability: as fine as they are stored, and a bisection needs no pass over voxels.
    steps = np.linspace(0.0, 1.0, 256)
    of_voxel = np.rint(prob_zyx * 255.0).astype(np.uint8)
    inside = np.bincount(of_voxel[mask_zyx], minlength=256)
    every = np.bincount(of_voxel.ravel(), minlength=256)
    if not inside.sum():
        return 1.0
    odds, doubt = logit(steps.clip(LEAST_PROBABILITY, 1.0 - LEAST_PROBABILITY)), in_doubt(steps)

    def foretold(temperature: float) -> float:
        right = np.where(steps > 0, expit(odds / (1.0 + (temperature - 1.0) * doubt)), 0.0)
        return float(2.0 * (inside * right).sum() / (inside.sum() + (every * right).sum()))

    return min(_TEMPERATURES, key=lambda t: abs(foretold(t) - dice))


def spread_quality(
    level: Mapping[int, float],
    seen: Mapping[str, CaseFeatures],
    calibration: Calibration,
    *,
    among: Mapping[str, CaseFeatures] | None = None,
) -> dict[str, DiceTable]:
    """Spread a source's mean Dice of each class, known from elsewhere, over its cases by what was seen of them.

    For a student, whose labelled cases are training cases and calibrate nothing: the slopes are those of SAM 2's
    labels, and each class's median case keeps ``level``: the median of the cases ``among`` which the level was found,
    by default those that are ``seen``. A class that a case lacks stands at 0 where every labelled
    case shows it, and is unknown elsewhere.
    """
    shifts = {name: calibration.shift(features) for name, features in seen.items()}
    typical = shifts if among is None else {name: calibration.shift(features) for name, features in among.items()}
    table: dict[str, DiceTable] = {name: {} for name in seen}
    for value, dice in level.items():
        found = [row[value] for row in typical.values() if value in row]
        centre = float(np.median(found)) if found else 0.0
        start = float(logit(np.clip(dice, 0.01, 0.99)))
        for name, features in seen.items():
            if value in shifts[name]:
                table[name][value] = float(expit(start + shifts[name][value] - centre))
            else:
                table[name][value] = 0.0 if features[value].shown_in == 1.0 else None
    return table
