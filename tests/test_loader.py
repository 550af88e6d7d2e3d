"""The mix of a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunet_sam2.trainers.dataset import RoundDataset
from nnunet_sam2.trainers.loader import RoundDataLoader, pseudo_in_batch

LABEL_MANAGER = SimpleNamespace(all_labels=[0, 1], has_ignore_label=False)


def loader(batch_size: int, *, pseudo: str = "pqr", share: float | None = 0.5, kind: Any = RoundDataLoader) -> Any:
    stock = SimpleNamespace(identifiers=list("abpqr"))
    data = RoundDataset(stock, pseudo_cases=tuple(pseudo), pseudo_per_batch=share)
    return kind(data, batch_size, (8, 8, 8), (8, 8, 8), LABEL_MANAGER)


@pytest.mark.parametrize(
    ("batch_size", "share", "expected"),
    [(2, 0.5, 1), (10, 0.3, 3), (2, 0.1, 1), (2, 0.9, 1), (10, 0.01, 1), (4, 0.0, 0), (4, 1.0, 4), (1, 0.5, None)],
)
def test_the_nearest_number_but_both_kinds(batch_size: int, share: float, expected: int | None) -> None:
    assert pseudo_in_batch(batch_size, share) == expected


def test_every_batch_has_the_ratio_in_changing_order() -> None:
    np.random.seed(0)
    batches = [list(loader(4).get_indices()) for _ in range(60)]
    places = np.array([[case in "pqr" for case in batch] for batch in batches])
    assert (places.sum(1) == 2).all()
    # nnU-Net forces foreground on the last place: both kinds have to come there
    assert 15 < places[:, -1].sum() < 45
    assert {case for batch in batches for case in batch} == set("abpqr")


def test_a_batch_of_one_keeps_the_ratio_on_average() -> None:
    np.random.seed(0)
    one = loader(1, share=0.25)
    drawn = [one.get_indices()[0] in "pqr" for _ in range(400)]
    assert 0.18 < np.mean(drawn) < 0.32


@pytest.mark.parametrize(("pseudo", "share"), [("pqr", None), ("", 0.5), ("abpqr", 0.5)])
def test_without_a_ratio_or_with_one_kind_the_draw_is_stock(pseudo: str, share: float | None) -> None:
    drawn = []
    for kind in (RoundDataLoader, nnUNetDataLoader):
        np.random.seed(1)
        drawn.append([list(loader(3, pseudo=pseudo, share=share, kind=kind).get_indices()) for _ in range(5)])
    assert drawn[0] == drawn[1]
