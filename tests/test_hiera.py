"""The image encoder that keeps its position embedding."""

from __future__ import annotations

import copy

import pytest
import torch
from sam2.modeling.backbones.hieradet import Hiera

from nnunet_sam2.sam2.config import UNTRAINED, load_config
from nnunet_sam2.sam2.hiera import KeptHiera
from nnunet_sam2.sam2.model import build_untrained


@pytest.fixture(scope="module")
def trunk() -> KeptHiera:
    found = build_untrained(load_config(UNTRAINED), 128).image_encoder.trunk
    assert isinstance(found, KeptHiera)
    return found


def test_the_kept_position_is_sam2s_own_at_every_size(trunk: KeptHiera) -> None:
    with torch.no_grad():
        for size in ((32, 32), (64, 64), (32, 32)):
            assert torch.equal(trunk._get_pos_embed(size), Hiera._get_pos_embed(trunk, size))
        assert trunk._get_pos_embed((32, 32)) is trunk._get_pos_embed((32, 32))


def test_weights_that_change_change_the_position(trunk: KeptHiera) -> None:
    changed = copy.deepcopy(trunk)
    with torch.no_grad():
        before = trunk._get_pos_embed((32, 32))
        changed._get_pos_embed((32, 32))
        changed.load_state_dict({name: 2 * tensor for name, tensor in trunk.state_dict().items()})
        torch.testing.assert_close(changed._get_pos_embed((32, 32)), 2 * before)
        assert torch.equal(trunk._get_pos_embed((32, 32)), before)


def test_where_gradients_are_asked_for_they_reach_the_weights(trunk: KeptHiera) -> None:
    with torch.no_grad():
        trunk._get_pos_embed((32, 32))
    trained = copy.deepcopy(trunk).requires_grad_(True)
    trained._get_pos_embed((32, 32)).sum().backward()
    assert trained.pos_embed.grad is not None
