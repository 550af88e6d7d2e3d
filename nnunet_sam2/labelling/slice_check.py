"""Dice over a few slices of a labelled case: a cheap check before a whole volume is labelled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nnunet_sam2.labelling.leave_one_out import DiceTable
from nnunet_sam2.planes import resize
from nnunet_sam2.support.cases import Support


def check_slices(support: Support, class_values: Sequence[int], count: int) -> list[int]:
    """Choose at most ``count`` slices, spread evenly over those from the first to the last that shows a class.

    One empty slice on either side is among them, where there is one, so that drawing past an organ's end is seen.
    """
    shown = np.flatnonzero(np.isin(support.frames.slices_first(support.label_zyx), list(class_values)).any(axis=(1, 2)))
    if not len(shown):
        return []
    low, high = max(0, int(shown[0]) - 1), min(len(support.frames) - 1, int(shown[-1]) + 1)
    return sorted({round(float(n)) for n in np.linspace(low, high, min(count, high - low + 1))})


class SliceDice:
    """Add up overlaps slice by slice, on the voxels of the volume's own grid that a human has judged."""

    def __init__(self, class_values: Sequence[int]) -> None:
        self._values = tuple(class_values)
        self._both = np.zeros(len(self._values), np.int64)
        self._sizes = np.zeros(len(self._values), np.int64)

    def add(self, support: Support, index: int, prob_chw: torch.Tensor) -> None:
        """Compare the arg-max of a slice's map, background first, with the human label."""
        truth_hw = support.frames.slices_first(support.label_zyx)[index]
        channel_hw = resize(prob_chw.numpy(), support.frames.slice_shape_hw).argmax(axis=0)
        judged_hw = np.ones_like(truth_hw, bool) if support.ignore_value is None else truth_hw != support.ignore_value
        for k, value in enumerate(self._values):
            mine, theirs = (channel_hw == k + 1) & judged_hw, truth_hw == value
            self._both[k] += np.count_nonzero(mine & theirs)
            self._sizes[k] += np.count_nonzero(mine) + np.count_nonzero(theirs)

    def table(self) -> DiceTable:
        """Return Dice for each class value; None where neither side has the class."""
        return {
            value: 2.0 * int(both) / int(size) if size else None
            for value, both, size in zip(self._values, self._both, self._sizes, strict=True)
        }
