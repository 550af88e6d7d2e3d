"""The moving mean of the weights: by hand, in the place of the network's own, past skipped steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_sam2.trainers.averaging import WeightAverage


class Shared(nn.Module):
    """A network that holds one of its parts twice, as nnU-Net's decoder holds its encoder, and keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2))
        self.decoder = nn.ModuleDict({"encoder": self.encoder, "head": nn.Conv1d(2, 1, 1)})


def copies(network: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in network.state_dict().items()}


def train(network: nn.Module, average: WeightAverage, steps: int) -> list[dict[str, np.ndarray]]:
    """Take steps of an optimizer that updates the mean, and return the weights after each."""
    optimizer = torch.optim.SGD(network.parameters(), 0.5, momentum=0.9)
    optimizer.register_step_post_hook(lambda *_: average.update())
    taken = []
    for _ in range(steps):
        optimizer.zero_grad()
        hidden = network.encoder(torch.randn(2, 1, 5))
        network.decoder["head"](hidden).square().mean().backward()
        optimizer.step()
        taken.append(copies(network))
    return taken


def test_it_is_the_mean_that_one_computes_by_hand() -> None:
    torch.manual_seed(0)
    network = Shared()
    expected = copies(network)
    average = WeightAverage(network, decay=0.3)
    taken = train(network, average, 6)
    for t, weights in enumerate(taken):
        decay = min(0.3, (1 + t) / (10 + t))
        for name, value in weights.items():
            floating = np.issubdtype(value.dtype, np.floating)
            expected[name] = decay * expected[name] + (1 - decay) * value if floating else value
    with average.in_use():
        for name, value in copies(network).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
    for name, value in copies(network).items():
        np.testing.assert_array_equal(value, taken[-1][name])
    assert not np.allclose(expected["encoder.0.weight"], taken[-1]["encoder.0.weight"], atol=1e-4)


def test_the_network_has_its_own_weights_back_after_an_error() -> None:
    network = nn.Linear(2, 2)
    average = WeightAverage(network, decay=0.9)
    nn.init.zeros_(network.weight)
    seen = []

    def fail() -> None:
        seen.append(bool(network.weight.any()))
        raise KeyError

    with pytest.raises(KeyError), average.in_use():
        fail()
    assert seen == [True]
    assert not network.weight.any()


def test_a_step_that_the_gradient_scaler_skips_is_not_averaged() -> None:
    network = nn.Linear(2, 1)
    average = WeightAverage(network, decay=0.9)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    optimizer.register_step_post_hook(lambda *_: average.update())
    scaler = torch.amp.GradScaler("cpu")
    for factor, updates in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale((network(torch.ones(1, 2)) * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert average.updates == updates
