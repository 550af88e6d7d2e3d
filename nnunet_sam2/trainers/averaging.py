"""The moving mean of a network's weights: what validates, predicts and labels instead of the last step's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Hold the exponential moving mean of a network's weights (Polyak averaging; Tarvainen and Valpola, NIPS 2017).

    After step t = 0, 1, ... it is ``d mean + (1 - d) weights`` with ``d = min(decay, (1 + t) / (10 + t))``, so that a
    short schedule is not the mean of its beginning. A network's statistics, where it keeps any, are averaged alike;
    what is no floating-point number is the network's own.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        # A decoder that holds its encoder names each weight twice; these iterators do not.
        own = (*network.parameters(), *network.buffers())
        self._own = [tensor for tensor in own if tensor.is_floating_point()]
        self._mean: list[Tensor] = []
        self.restart()

    def restart(self, updates: int = 0) -> None:
        """Let the mean be the network's present weights, as after a number of updates."""
        self._mean = [own.detach().clone() for own in self._own]
        self.updates = updates

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's weights into the mean; to be called after each step of its optimizer."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._mean, self._own, 1 - decay)
        self.updates += 1

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give the network the mean as its weights inside the block; no number is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for n, own in enumerate(self._own):
            own.data, self._mean[n] = self._mean[n], own.data
