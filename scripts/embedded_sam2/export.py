"""The weights as they are shipped: safetensors, half precision, read back and compared."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nnunet_sam2.sam2.config import ModelConfig
from nnunet_sam2.storage import atomic_path

LIMIT_BYTES = 12_000_000


def write_weights(model: torch.nn.Module, config: ModelConfig, path: Path) -> str:
    """Write a model in half precision with the name of its architecture; return one line for the log."""
    state = {key: tensor.detach().cpu().half().contiguous() for key, tensor in sorted(model.state_dict().items())}
    overflown = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if overflown:
        raise SystemExit(f"{overflown[0]} does not fit half precision; nothing is written")
    metadata = {
        "config": config.name,
        "origin": f"{config.title}: features distilled from Meta's SAM 2 Hiera-tiny (Apache-2.0) on synthetic images, "
        "memory and decoder trained on synthetic clips",
        "licence": "Apache-2.0",
    }
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata=metadata)
        if any(not torch.equal(state[key], value) for key, value in load_file(temporary).items()):
            raise SystemExit(f"{path} does not read back as written")
    size = path.stat().st_size
    if size > LIMIT_BYTES:
        raise SystemExit(f"{path} has {size} bytes, more than the {LIMIT_BYTES} that may be shipped")
    parameters = sum(tensor.numel() for tensor in state.values())
    return f"{path}: {parameters / 1e6:.2f} million parameters, {size / 1e6:.2f} MB"
