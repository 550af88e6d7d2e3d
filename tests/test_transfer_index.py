"""The approximate index of large memories against the exact search."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.fusion import fuse
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.strategies.transfer import memory as memory_module
from nnunet_sam2.labelling.strategies.transfer.memory import Place, SupportMemory, slice_features
from nnunet_sam2.labelling.strategies.transfer.nearest import nearest
from nnunet_sam2.labelling.strategies.transfer.strategy import Transfer, TransferOptions
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.support.cases import Support
from nnunet_sam2.support.library import load_support

pytest.importorskip("faiss", reason="pip install 'nnunet_sam2[index]'")
from nnunet_sam2.labelling.strategies.transfer.index import ApproximateNearest

NEIGHBOURS = 60


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("embedded", device="cpu", image_size=128, threads=1)


@pytest.fixture(scope="module")
def supports(tiny_dataset: DatasetFolders, backend: MetaSam2Backend) -> list[Support]:
    cohort = Cohort.load(tiny_dataset.raw)
    return [load_support(cohort, case, backend, slice_axis=0) for case in cohort.labelled]


def _recall(found: torch.Tensor, exact: torch.Tensor) -> float:
    pairs = zip(found.tolist(), exact.tolist(), strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs]))


def test_nearly_all_neighbours_of_embeddings_are_found(
    supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> None:
    memory, place = SupportMemory(supports[1:], values), Place(position_weight=1.5, slice_weight=1.0)
    query = torch.cat([slice_features(supports[0].embeddings, n) for n in range(0, 12, 3)])
    exact_mf, _ = memory.rows(memory.slices)
    scale = place.scale(query.shape[1])
    excess, exact = nearest(query * scale, exact_mf * scale, 9)
    found_excess, found = memory.search_all(query, place, 9)
    assert _recall(found, exact) > 0.9
    assert (found_excess >= 0).all()
    assert (found_excess.diff(dim=1) >= -1e-5).all()
    # Where the nearest is the same, distances are those of the exact search but for the 16 bits.
    same = found[:, 0] == exact[:, 0]
    assert (found_excess[same][:, -1] >= excess[same][:, -1] - 0.02).all()


def test_slices_that_were_let_go_are_not_read_again_to_say_whose_rows_are_whose(
    supports: list[Support], values: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SupportMemory(supports, values)
    rows = [len(memory.rows([number])[0]) for number in memory.slices]
    monkeypatch.setattr(memory_module, "_KEPT_LOCATIONS", 0)
    owners = memory.owners(memory.slices)
    of_slices = [s for s, support in enumerate(supports) for _ in support.frames.slices_first(support.label_zyx)]
    assert owners.tolist() == [s for s, count in zip(of_slices, rows, strict=True) for _ in range(count)]
    monkeypatch.setattr(memory_module, "slice_features", lambda *anything: pytest.fail("read again"))
    assert torch.equal(memory.owners(memory.slices), owners)


def test_a_large_clustered_memory_is_searched_in_a_small_part_with_little_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(200, 32, generator=generator)

    def draw(count: int) -> torch.Tensor:
        chosen = torch.randint(len(centres), (count,), generator=generator)
        return centres[chosen] + 0.7 * torch.randn(count, 32, generator=generator)

    parts = [draw(5000) for _ in range(8)]
    query = draw(200)
    index = ApproximateNearest(lambda: parts, 40000)
    assert len(index) == 40000
    _, exact = nearest(query, torch.cat(parts), NEIGHBOURS)
    _, found = index.nearest(query, NEIGHBOURS)
    assert _recall(found, exact) > 0.95


def test_more_neighbours_than_the_lists_hold_are_filled_up_by_known_entries() -> None:
    entries = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))
    excess, numbers = ApproximateNearest(lambda: [entries], 300).nearest(entries[:5], 1000)
    assert numbers.shape == (5, 300)
    assert ((numbers >= 0) & (numbers < 300)).all()
    assert torch.isfinite(excess).all()


def test_labels_by_the_index_are_as_good_as_by_the_exact_search(
    supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> None:
    dice = {}
    for above in (0, 1):
        strategy = Transfer(TransferOptions(check_slices=0, index_above=above))
        rng = np.random.default_rng(0)
        pseudo = fuse(strategy.members(supports[0].as_query(), supports[1:], values, backend, rng), values)
        dice[above] = dice_by_class(pseudo.label_zyx, supports[0].label_zyx, values)[values[0]] or 0.0
    assert dice[0] > 0.4
    assert dice[1] > dice[0] - 0.03


def test_an_index_that_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"nnunet_sam2\[index\]"):
        TransferOptions(index_above=10**6)
    TransferOptions()
