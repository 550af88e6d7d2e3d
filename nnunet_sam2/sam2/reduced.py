"""Linear layers that multiply in bfloat16, in the place of a model's own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn.functional import linear


class ReducedLinear(torch.nn.Module):
    """Multiply as a linear layer does, with factors in bfloat16; the answer is in bfloat16 too."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(layer.weight.detach().to(torch.bfloat16), requires_grad=False)
        self.bias = torch.nn.Parameter(layer.bias.detach().to(torch.bfloat16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product."""
        # In rows, for on a permuted view the product is several times slower.
        return linear(x.contiguous().to(torch.bfloat16), self.weight, self.bias)


def with_reduced_linears(module: Any) -> Any:
    """Return a module that shares all weights with ``module`` but those of its linear layers, which are rounded."""
    if isinstance(module, torch.nn.Linear):
        return ReducedLinear(module)
    twin = copy.copy(module)
    twin._modules = {name: child and with_reduced_linears(child) for name, child in module._modules.items()}
    return twin


def with_reduced_memory_encoder(model: Any) -> Any:
    """Return a SAM 2 whose memory encoder's linear layers multiply in bfloat16; all else is shared with ``model``.

    The memories are rounded to bfloat16 in the end anyway. Convolutions stay as they are: in bfloat16 the processor is
    slower at those with few channels.
    """
    twin = copy.copy(model)
    encoder = copy.copy(model.memory_encoder)
    encoder._modules = {**encoder._modules, "fuser": with_reduced_linears(model.memory_encoder.fuser)}
    twin._modules = {**model._modules, "memory_encoder": encoder}
    return twin
