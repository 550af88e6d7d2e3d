"""SAM 2 checkpoints: read without running anything in them, recognised by their shapes, refused by name."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.sam2.config import ModelConfig, config_names, load_config
from nnunet_sam2.storage import file_hash

_STEM = "image_encoder.trunk.patch_embed.proj.weight"
_BLOCK = re.compile(r"image_encoder\.trunk\.blocks\.(\d+)\.")
_VERSION_2_1 = "no_obj_embed_spatial"
_WAY_OUT = "give a SAM 2 checkpoint of Meta's release (.pt) or one converted to .safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """Hold the weights of a file, by Meta's key names, float32."""

    path: Path
    sha256: str
    state: dict[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Text pairs from the header of a safetensors file: ``config`` names an architecture, ``origin`` the source."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a .safetensors or .pt checkpoint; nothing stored in it is executed.

    Raises `InputError` for a missing, truncated or foreign file, a pickle that holds more than tensors, and weights
    that are not finite.
    """
    if not path.is_file():
        raise InputError(f"no SAM 2 checkpoint at {path}; {_WAY_OUT}")
    with path.open("rb") as handle:
        head = handle.read(512)
    metadata: Mapping[str, str] = {}
    if head[:2] == b"PK" or head[:1] == b"\x80":
        state = _read_torch(path)
    elif head[8:9] == b"{":
        state, metadata = _read_safetensors(path)
    else:
        raise InputError(f"{path} is not a checkpoint but {_what(head)}; {_WAY_OUT}")
    if _STEM not in state:
        raise InputError(f"{path} holds no SAM 2 image encoder ({len(state)} tensors, none named {_STEM}); {_WAY_OUT}")
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in sorted(state.items())}
    broken = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise InputError(
            f"{path} holds NaN or infinite weights, first in {broken[0]}; the file is damaged, get it anew"
        )
    return Checkpoint(path=path, sha256=file_hash(path), state=state, metadata=metadata)


def recognise(checkpoint: Checkpoint) -> ModelConfig:
    """Find the architecture that a checkpoint belongs to, by its header or by its shapes.

    An image-only checkpoint does not tell 2.0 from 2.1; the two agree in every image part.
    """
    named = checkpoint.metadata.get("config")
    if named in config_names():
        return load_config(str(named))
    embed_dim = int(checkpoint.state[_STEM].shape[0])
    blocks = {int(found[1]) for key in checkpoint.state if (found := _BLOCK.match(key))}
    is_2_1 = _VERSION_2_1 in checkpoint.state
    for name in config_names():
        config = load_config(name)
        same_trunk = config.trunk.embed_dim == embed_dim and sum(config.trunk.stages) == len(blocks)
        if same_trunk and (config.version == "2.1") is (is_2_1 or config.seed is not None):
            return config
    raise InputError(
        f"{checkpoint.path} is a SAM 2 of no known size (embedding {embed_dim}, {len(blocks)} blocks); "
        f"known are {', '.join(config_names())}"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is a damaged safetensors file ({error}); get it anew") from None


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    try:
        value: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or "Unsupported" in str(error) or "WeightsUnpickler" in str(error):
            raise InputError(
                f"{path} is refused: it holds Python objects beside tensors, which could run code when loaded; "
                f"save its tensors alone, as .safetensors"
            ) from None
        raise InputError(f"{path} is a damaged checkpoint ({_first_line(error)}); get it anew") from None
    except Exception as error:  # torch reports damaged archives by many types
        raise InputError(f"{path} is a damaged checkpoint ({_first_line(error)}); get it anew") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(value, Mapping) and isinstance(value.get(wrapper), Mapping):
            value = value[wrapper]
    if not isinstance(value, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        raise InputError(f"{path} holds no table of weights; {_WAY_OUT}")
    return {str(key).removeprefix("module."): tensor for key, tensor in value.items()}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def _what(head: bytes) -> str:
    start = head.lstrip().lower()
    if not head:
        return "empty"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        return "a web page (the download failed or wanted a login)"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (fetch the file itself with: git lfs pull)"
    return "a file of another kind"
