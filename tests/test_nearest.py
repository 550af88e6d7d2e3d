"""Nearest labels against their slow twin, and the edge filter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_sam2.labelling.strategies.transfer import nearest as nearest_module
from nnunet_sam2.labelling.strategies.transfer.nearest import nearest, nearest_slow, smallest, snap_to_edges, vote


def _vectors(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 7, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("entries", [5, 700, 2050])
def test_the_blocked_search_finds_what_the_slow_one_finds(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_module, "_BLOCK_DISTANCES", 5000)
    query, memory = _vectors(30, 1), _vectors(entries, 2)
    excess, numbers = nearest(query, memory, 9)
    slow_excess, slow_numbers = nearest_slow(query, memory, 9)
    assert torch.equal(numbers, slow_numbers)
    torch.testing.assert_close(excess, slow_excess, rtol=1e-4, atol=1e-4)


def test_grouped_smallest_is_topk() -> None:
    values = torch.randn(20, 4096, generator=torch.Generator().manual_seed(3))
    found, indices = smallest(values, 8)
    assert torch.equal(found, values.topk(8, dim=1, largest=False).values)
    assert torch.equal(torch.gather(values, 1, indices), found)


def test_votes_fall_with_distance_and_do_not_depend_on_its_scale() -> None:
    excess = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.1, 1.0]])
    labels = torch.eye(3)[None].expand(2, -1, -1)
    shares = vote(excess, labels, 0.5)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2))
    assert (shares.diff(dim=1) < 0).all()
    torch.testing.assert_close(vote(excess * 1e-3, labels, 0.5), shares)
    torch.testing.assert_close(shares[0, 0] / shares[0, 2], torch.tensor(np.exp(2.0), dtype=torch.float32))


def test_equal_neighbours_vote_equally() -> None:
    torch.testing.assert_close(vote(torch.zeros(1, 4), torch.eye(4)[None], 0.1), torch.full((1, 4), 0.25))


def _blurred_step() -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.zeros(48, 48)
    image[:, 20:] = 0.8
    ramp = ((torch.arange(48) - 10) / 24.0).clamp(0, 1).expand(48, -1)
    return torch.stack([1 - ramp, ramp]), image


def test_the_edge_filter_moves_a_blurred_border_to_the_edge() -> None:
    prob, image = _blurred_step()
    assert int((prob[1] > prob[0]).sum(dim=1)[0]) == 25
    snapped = snap_to_edges(prob, image, radius=8, softness=1e-3)
    assert ((snapped[1] > snapped[0]).sum(dim=1) == 28).all()
    torch.testing.assert_close(snapped.sum(dim=0), torch.ones(48, 48))
    assert snapped.min() >= 0


def test_on_a_flat_image_the_edge_filter_only_smooths() -> None:
    prob, _ = _blurred_step()
    snapped = snap_to_edges(prob, torch.full((48, 48), 0.3), radius=3, softness=1e-3)
    assert (snapped - prob).abs().max() < 0.1


@pytest.mark.parametrize("radius", [1, 4, 30])
def test_window_means_by_products_are_those_of_pooling(radius: int) -> None:
    planes = torch.rand(3, 1, 24, 31, generator=torch.Generator().manual_seed(5))
    padded = torch.nn.functional.pad(planes, (radius,) * 4, mode="replicate")
    pooled = torch.nn.functional.avg_pool2d(padded, 2 * radius + 1, stride=1)
    torch.testing.assert_close(nearest_module._box(planes, radius), pooled, rtol=1e-4, atol=1e-5)


def test_a_constant_map_stays_as_it_is() -> None:
    _, image = _blurred_step()
    prob = torch.stack([torch.full((48, 48), 0.7), torch.full((48, 48), 0.3)])
    torch.testing.assert_close(snap_to_edges(prob, image, radius=5, softness=1e-3), prob, atol=1e-4, rtol=1e-4)
