"""How SAM 2 and the student were fused before: mixed by quality times own confidence, to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nnunet_sam2.labelling.fusion import FusionOptions, as_probability, confidence_of, label_by_scores, normalised
from nnunet_sam2.labelling.leave_one_out import DiceTable


def former_student_dice(sam2_dice: float, agreement: float, validation: float | None, cases: int) -> float:
    """Take agreement times SAM 2's Dice as one validation case among those that there are."""
    guess = agreement * sam2_dice
    return guess if validation is None else (cases * validation + guess) / (cases + 1)


def former_fusion(
    prob_czyx: Mapping[str, np.ndarray],
    class_values: tuple[int, ...],
    quality: Mapping[str, DiceTable],
    options: FusionOptions,
) -> np.ndarray:
    """Mix the sources' distributions by (1 / (1 - Dice))^2 and each source's own confidence; return the label."""
    maps = {name: normalised(as_probability(array)) for name, array in prob_czyx.items()}
    weights = _weights(quality, class_values)
    seen_kzyx = np.maximum.reduce([array[1:] for array in maps.values()]) + np.float32(1e-6)
    seen_kzyx /= seen_kzyx.sum(axis=0, keepdims=True)
    mixed_czyx = np.zeros_like(next(iter(maps.values())))
    for name, array in maps.items():
        weight_zyx = np.tensordot(weights[name], seen_kzyx, axes=1)
        mixed_czyx += (weight_zyx * (0.05 + 0.95 * confidence_of(array.max(axis=0))))[None] * array
    return label_by_scores(normalised(mixed_czyx), class_values, options).label_zyx


def _weights(quality: Mapping[str, DiceTable], class_values: Sequence[int]) -> dict[str, np.ndarray]:
    raw = {}
    for name, table in quality.items():
        known = [dice for dice in table.values() if dice is not None]
        default = float(np.mean(known)) if known else 0.5
        dice_k = np.array([default if (dice := table.get(v)) is None else dice for v in class_values])
        raw[name] = (1.0 / (1.0 - dice_k.clip(0.0, 0.98))) ** 2 * (dice_k > 0.02)
    total_k = np.sum(list(raw.values()), axis=0)
    return {
        name: np.where(total_k > 0, weight_k / np.where(total_k > 0, total_k, 1.0), 1.0 / len(raw)).astype(np.float32)
        for name, weight_k in raw.items()
    }
