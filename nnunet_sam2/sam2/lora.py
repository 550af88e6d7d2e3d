"""LoRA on the image encoder: low-rank changes of queries and values, trained apart and then added to the weights."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from nnunet_sam2.errors import InputError

_PARTS = ("q", "k", "v")


class SplitProjection(torch.nn.Module):
    """Compute Hiera's joint projection of queries, keys and values by three layers, so that each can be adapted."""

    def __init__(self, joint: torch.nn.Linear) -> None:
        super().__init__()
        for name, weight, bias in zip(_PARTS, joint.weight.chunk(3), joint.bias.chunk(3), strict=True):
            layer = torch.nn.Linear(joint.in_features, weight.shape[0], device=weight.device, dtype=weight.dtype)
            layer.load_state_dict({"weight": weight, "bias": bias})
            self.add_module(name, layer.requires_grad_(False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the joint layer returns: queries, keys and values side by side."""
        return torch.cat([self.get_submodule(name)(x) for name in _PARTS], dim=-1)


def require_peft() -> None:
    """Raise `InputError` where the package that LoRA comes from is not installed."""
    if find_spec("peft") is None:
        raise InputError("LoRA needs the peft package: pip install 'nnunet_sam2[lora]'")


def add_lora(model: Any, *, rank: int, seed: int) -> list[torch.nn.Parameter]:
    """Put LoRA on q and v of every Hiera block, over their full width, and return what is to be trained.

    The rest of the model is left without gradients. SAM2-SGP's code adapts only as many channels as a block takes in,
    which is half of q and half of v where a stage doubles them. Raises `InputError` where `peft` is not installed.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    trunk = model.image_encoder.trunk
    for block in trunk.blocks:
        block.attn.qkv = SplitProjection(block.attn.qkv)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=r"blocks\.\d+\.attn\.qkv\.[qv]", bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, trunk)
    return [parameter for parameter in trunk.parameters() if parameter.requires_grad]


def merged_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the joint projections' weights with what LoRA has learnt, under the names of the unadapted model."""
    changed = {}
    for number, block in enumerate(model.image_encoder.trunk.blocks):
        rows = []
        for name in _PARTS:
            layer = block.attn.qkv.get_submodule(name)
            weight = layer.weight.detach()
            if hasattr(layer, "get_delta_weight"):
                weight = weight + layer.get_delta_weight("default").detach()
            rows.append(weight)
        changed[f"image_encoder.trunk.blocks.{number}.attn.qkv.weight"] = torch.cat(rows)
    return changed
