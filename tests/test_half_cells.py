"""The finer search among the quarters of a cell's neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.strategies.transfer.half_cells import (
    from_quarters,
    half_cell_features,
    into_quarters,
    nearest_quarters,
    nearest_quarters_slow,
    place_quarters,
)
from nnunet_sam2.labelling.strategies.transfer.strategy import Transfer, TransferOptions
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.support.cases import Support
from nnunet_sam2.volumes import Volume

SIZE = 128


def test_quarters_come_back_as_the_map_they_were() -> None:
    map_chw = torch.arange(3 * 8 * 8).reshape(3, 8, 8).float()
    quarters = into_quarters(map_chw)
    assert quarters.shape == (16, 4, 3)
    # The second cell of the first row covers rows 0 and 1, columns 2 and 3.
    assert quarters[1, :, 0].tolist() == [2.0, 3.0, 10.0, 11.0]
    torch.testing.assert_close(from_quarters(quarters), map_chw)


@pytest.mark.parametrize("count", [5, 60])
def test_the_blocked_search_finds_what_the_slow_one_finds(count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(70, 4, 12, generator=generator)
    memory = torch.randn(40, 4, 12, generator=generator)
    parents = torch.stack([torch.randperm(40, generator=generator)[:9] for _ in range(70)])
    scale = torch.rand(12, generator=generator) + 0.5
    fast = nearest_quarters(query, memory, parents, count, scale)
    slow = nearest_quarters_slow(query, memory, parents, count, scale)
    assert fast[0].shape == (70, 4, min(count, 36))
    torch.testing.assert_close(fast[0], slow[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(fast[1], slow[1])


def test_a_quarter_stands_a_quarter_of_a_cell_from_the_centre() -> None:
    placed = place_quarters(torch.zeros(1, 4, 2), torch.tensor([[0.5, 0.5, 0.2]]), grid=4)
    assert placed[0, :, 2:].tolist() == pytest.approx(
        np.array([[0.4375, 0.4375, 0.2], [0.4375, 0.5625, 0.2], [0.5625, 0.4375, 0.2], [0.5625, 0.5625, 0.2]])
    )


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=SIZE, threads=1)


def _striped(backend: MetaSam2Backend, case_id: str, first: int, seed: int) -> Support:
    """A case with a bright stripe of half a cell's width."""
    shape = (3, SIZE, SIZE)
    label = np.zeros(shape, np.uint8)
    label[:, :, first : first + 8] = 1
    image = label * 0.8 + np.random.default_rng(seed).normal(0, 0.02, shape)
    geometry = Geometry(shape_zyx=shape)
    volume = Volume(array_czyx=image[None].astype(np.float32), geometry=geometry)
    frames = Frames.from_volume(volume, size=SIZE, slice_axis=0)
    return Support(case_id=case_id, frames=frames, embeddings=backend.embed(frames), label_zyx=label, geometry=geometry)


def test_what_is_narrower_than_a_cell_is_found_in_its_place(backend: MetaSam2Backend) -> None:
    support, query = _striped(backend, "support", 48, 0), _striped(backend, "query", 48, 1)
    dice = {}
    for half_cells in (False, True):
        strategy = Transfer(TransferOptions(check_slices=0, half_cells=half_cells, edge_radius=0.0))
        (member,) = strategy.members(query.as_query(), [support], (1,), backend, np.random.default_rng(0))
        found, true = member.prob_kzyx[0] > 0.5, query.label_zyx == 1
        dice[half_cells] = 2 * (found & true).sum() / (found.sum() + true.sum())
    assert dice[True] > 0.9
    assert dice[True] > dice[False] + 0.2


def test_the_skip_features_are_twice_as_fine_as_the_embedding(backend: MetaSam2Backend) -> None:
    support = _striped(backend, "support", 48, 0)
    features = half_cell_features(support.embeddings, 0)
    channels = support.embeddings.top(0).shape[0]
    assert features.shape == ((SIZE // 16) ** 2, 4, channels + support.embeddings.high(0)[1].shape[0])
    # Each quarter's own skip features, not its cell's mean.
    assert not torch.allclose(features[:, 0, channels:], features[:, 1, channels:])
