"""Batches with a fixed number of pseudo-labelled cases."""

from __future__ import annotations

from typing import Any

import numpy as np
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunet_sam2.trainers.dataset import RoundDataset
from nnunet_sam2.trainers.transforms import carry_distrust, make_repeatable


class RoundDataLoader(nnUNetDataLoader):
    """Draw nnU-Net's batches from a `RoundDataset`; from a stock dataset exactly as the stock loader does."""

    def __init__(self, data: Any, *args: Any, transforms: Any = None, **kwargs: Any) -> None:
        if isinstance(data, RoundDataset) and transforms is not None:
            if data.repeatable:
                make_repeatable(transforms)
            if data.distrust_folder is not None:
                transforms = carry_distrust(transforms, data.n_maps)
        super().__init__(data, *args, transforms=transforms, **kwargs)

    def get_indices(self) -> Any:
        """Draw the cases of a batch, in random order: nnU-Net forces foreground on the last places of a batch."""
        data = self._data
        if not isinstance(data, RoundDataset) or data.pseudo_per_batch is None:
            return super().get_indices()
        if not data.pseudo_identifiers or not data.labelled_identifiers:
            return super().get_indices()
        n_pseudo = pseudo_in_batch(self.batch_size, data.pseudo_per_batch)
        if n_pseudo is None:
            n_pseudo = int(np.random.uniform() < data.pseudo_per_batch)
        cases = np.concatenate(
            (
                np.random.choice(data.labelled_identifiers, self.batch_size - n_pseudo),
                np.random.choice(data.pseudo_identifiers, n_pseudo),
            )
        )
        np.random.shuffle(cases)
        return cases


def pseudo_in_batch(batch_size: int, pseudo_per_batch: float) -> int | None:
    """Return how many cases of a batch are pseudo-labelled: the nearest number, but both kinds where both are wanted.

    None where a batch of one cannot hold both: then each batch is drawn with the fraction as its probability.
    """
    if pseudo_per_batch in (0.0, 1.0):
        return round(batch_size * pseudo_per_batch)
    if batch_size == 1:
        return None
    return min(max(round(batch_size * pseudo_per_batch), 1), batch_size - 1)
