"""What a person's decisions make of a round's label, on arrays alone.

Shape letters: C channels (background first), z y x voxels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np


def freeze_classes(
    label_zyx: np.ndarray,
    confidence_zyx: np.ndarray,
    prob_czyx: np.ndarray,
    class_values: Sequence[int],
    frozen: Mapping[int, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Put classes where a person has seen them, with full confidence, and nowhere else.

    ``frozen`` maps a class value to its mask (z, y, x); where masks overlap, the highest value wins. Elsewhere a voxel
    that has lost its class goes to the most probable of what is left by ``prob_czyx``, background and the classes that
    nobody decided about, with its probability among these as confidence; the others keep label and confidence.
    Where all classes are frozen, nothing is left to doubt. Returns label and confidence; the arguments are not changed.
    """
    label_zyx, confidence_zyx = label_zyx.copy(), confidence_zyx.astype(np.float32, copy=True)
    values = np.array([0, *class_values])
    left = np.array([value not in frozen for value in values])
    lost_zyx = np.isin(label_zyx, list(frozen))
    if lost_zyx.any():
        prob_left_cn = prob_czyx[:, lost_zyx][left].astype(np.float32)
        total_n = prob_left_cn.sum(axis=0)
        best_n = prob_left_cn.argmax(axis=0)
        chosen_n = np.take_along_axis(prob_left_cn, best_n[None], axis=0)[0]
        label_zyx[lost_zyx] = values[left][best_n]
        # Where nothing else was probable at all, nothing else is known either.
        confidence_zyx[lost_zyx] = np.divide(chosen_n, total_n, out=np.zeros_like(chosen_n), where=total_n > 0)
    if left.sum() == 1:
        confidence_zyx[:] = 1.0
    for value, mask_zyx in frozen.items():
        label_zyx[mask_zyx] = value
        confidence_zyx[mask_zyx] = 1.0
    return label_zyx, confidence_zyx


def without_rejected(
    label_zyx: np.ndarray,
    confidence_zyx: np.ndarray,
    prob_czyx: np.ndarray,
    class_values: Sequence[int],
    rejected: Collection[int],
    *,
    doubted: float,
    keep_zyx: np.ndarray | None = None,
) -> np.ndarray:
    """Return the confidence with 0 where a rejected class is, or may be with a probability of ``doubted``.

    Such voxels are neither class nor background. Voxels of ``keep_zyx``, where another class was accepted, stay.
    """
    confidence_zyx = confidence_zyx.astype(np.float32, copy=True)
    for k, value in enumerate(class_values):
        if value in rejected:
            here_zyx = (label_zyx == value) | (prob_czyx[k + 1] >= doubted)
            confidence_zyx[here_zyx if keep_zyx is None else here_zyx & ~keep_zyx] = 0.0
    return confidence_zyx
