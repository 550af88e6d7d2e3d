"""SAM 2 checkpoints: read without running anything in them, recognised by their shapes, refused by name."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import pickletools
import re
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.sam2.config import ModelConfig, config_names, load_config
from nnunet_sam2.storage import atomic_path, file_hash

_STEM = "image_encoder.trunk.patch_embed.proj.weight"
_BLOCK = re.compile(r"image_encoder\.trunk\.blocks\.(\d+)\.")
_VERSION_2_1 = "no_obj_embed_spatial"
_METADATA = "nnunet_sam2"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself reads no longer header."""
_WAY_OUT = "give a SAM 2 checkpoint of Meta's release (.pt) or one converted to .safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """Hold the weights of a file, by Meta's key names, float32."""

    path: Path
    sha256: str
    state: dict[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Text pairs from the header of a safetensors file: ``config`` names an architecture, ``origin`` the source."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTensors:
    """Hold the tensors of a checkpoint file as they are stored, and the text pairs of its header."""

    state: dict[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a .safetensors or .pt checkpoint; nothing stored in it is executed.

    Raises `InputError` for a missing, truncated or foreign file, a pickle that holds more than tensors, and weights
    that are not finite.
    """
    stored = read_tensors(path)
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in stored.state.items()}
    return Checkpoint(path=path, sha256=file_hash(path), state=state, metadata=stored.metadata)


def read_tensors(path: Path) -> StoredTensors:
    """Read a checkpoint as `read_checkpoint` does, with its tensors as they are stored, sorted by name."""
    is_safetensors = check_file_kind(path) == "safetensors"
    state, metadata = _read_safetensors(path) if is_safetensors else (_read_torch(path), {})
    if _STEM not in state:
        raise InputError(f"{path} holds no SAM 2 image encoder ({len(state)} tensors, none named {_STEM}); {_WAY_OUT}")
    state = dict(sorted(state.items()))
    for key, tensor in state.items():
        if unfit := _unfit(key, tensor):
            raise InputError(f"{path} holds {unfit} in {key}; weights are plain floats of 16 to 64 bits, save them so")
    broken = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise InputError(
            f"{path} holds NaN or infinite weights, first in {broken[0]}; the file is damaged, get it anew"
        )
    beyond = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor.float()).all())]
    if beyond:
        raise InputError(
            f"{path} holds weights beyond the range of 32 bit floats, first in {beyond[0]}; they would become "
            "infinite, get the file anew"
        )
    return StoredTensors(state=state, metadata=metadata)


def _unfit(key: str, tensor: torch.Tensor) -> str | None:
    """Say what makes a tensor none that weights are: checked before anything computes with it."""
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "a sparse or nested tensor"
    if tensor.device.type != "cpu":
        return f"a tensor without values ({tensor.device.type})"
    if tensor.dtype not in _FLOATS:
        return f"{str(tensor.dtype).removeprefix('torch.')} values"
    if any(step == 0 and length > 1 for step, length in zip(tensor.stride(), tensor.shape, strict=True)):
        return "one value that stands for many (stride 0)"
    if tensor.ndim == 0 or (key == _STEM and tensor.ndim != 4):
        return f"a tensor of {tensor.ndim} axes"
    return None


def check_file_kind(path: Path) -> str:
    """Return archive, pickle or safetensors; raise `InputError` for a file that is none of them or is cut off.

    Nothing in the file is decoded for this beyond an archive's list of contents and a safetensors header.
    """
    if not path.is_file():
        raise InputError(f"no SAM 2 checkpoint at {path}; {_WAY_OUT}")
    head = _head(path)
    kind = _kind(head)
    if kind == "archive":
        _check_archive(path)
    elif kind == "safetensors":
        _check_length(path)
    if kind is None:
        raise InputError(f"{path} is not a checkpoint but {_what(head)}; {_WAY_OUT}")
    return kind


def foreign_kind(path: Path) -> str | None:
    """Say what a file is that does not begin as a checkpoint does; None for one that does."""
    head = _head(path)
    return None if _kind(head) is not None else _what(head)


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Compute the sha256 of weights: names, types, shapes and bytes, whatever the file that they came from."""
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def write_safetensors(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as they are and text about them, atomically and read back; same input, same bytes.

    Raises `StageError` where what was written reads back differently.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        # One entry holds everything, because safetensors does not keep several in a fixed order.
        try:
            save_file(_apart(state), temporary, metadata={_METADATA: json.dumps(dict(metadata), sort_keys=True)})
        except SafetensorError as error:
            raise StageError(f"{path} could not be written ({error}); make room or name another folder") from None
        # safetensors lets the owner alone read; a folder that is shared wants what the user's umask says.
        temporary.chmod(stat.S_IMODE(mode))
        written, _ = _read_safetensors(temporary)
        if digest(written) != digest(state):
            raise StageError(f"{path}: what was written reads back differently; check the disk")


def recognise(checkpoint: Checkpoint) -> ModelConfig:
    """Find the architecture that a checkpoint belongs to, by its header or by its shapes.

    An image-only checkpoint does not tell 2.0 from 2.1; the two agree in every image part. Raises `InputError` for an
    unknown size, and where the header names an architecture that the shapes contradict.
    """
    embed_dim = int(checkpoint.state[_STEM].shape[0])
    blocks = len({int(found[1]) for key in checkpoint.state if (found := _BLOCK.match(key))})
    is_2_1 = _VERSION_2_1 in checkpoint.state
    fitting = [
        config
        for config in map(load_config, config_names())
        if config.trunk.embed_dim == embed_dim and sum(config.trunk.stages) == blocks
    ]
    shown = f"embedding {embed_dim}, {blocks} blocks"
    named = checkpoint.metadata.get("config")
    if named in config_names():
        if load_config(str(named)) in fitting:
            return load_config(str(named))
        other = " or ".join(config.name for config in fitting) or "no known size"
        raise InputError(
            f"{checkpoint.path} says in its header that it is {named}, but its weights are those of {other} ({shown}); "
            f"it was written with a wrong config"
        )
    for config in fitting:
        if (config.version == "2.1") is (is_2_1 or config.seed is not None):
            return config
    raise InputError(f"{checkpoint.path} is a SAM 2 of no known size ({shown}); known are {', '.join(config_names())}")


def _apart(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy the tensors that are views or share their memory, as those of a .pt may; safetensors takes whole ones."""
    seen: set[int] = set()
    apart = {}
    for key, tensor in state.items():
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        if not whole or tensor.data_ptr() in seen:
            tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        seen.add(tensor.data_ptr())
        apart[key] = tensor
    return apart


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            return handle.read(512)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _kind(head: bytes) -> str | None:
    if head[:4] == b"PK\x03\x04":
        return "archive"
    # Before the pickle's mark, for that can be the first byte of the header's length as well.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return "safetensors"
    return "pickle" if head[:1] == b"\x80" else None


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path} is damaged: it is cut off, for the end of its archive is missing "
            f"({path.stat().st_size} bytes are there); get it anew"
        )
    with zipfile.ZipFile(path) as archive:
        inside = {name.rpartition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in inside:
        raise InputError(f"{path} is a TorchScript program, not a table of weights; {_WAY_OUT}")
    if "data.pkl" not in inside:
        raise InputError(f"{path} is a zip archive of something else than weights; {_WAY_OUT}")


def _check_length(path: Path) -> None:
    """Hold the length that a safetensors header announces against the file's."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = handle.read(length)
    whole = 8 + length
    if len(header) == length:
        try:
            whole += max(item["data_offsets"][1] for key, item in json.loads(header).items() if key != "__metadata__")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise InputError(f"{path} is a damaged safetensors file (unreadable header); get it anew") from None
    if size < whole:
        raise InputError(f"{path} is damaged: it is cut off, {size} of at least {whole} bytes are there; get it anew")


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            metadata: dict[str, str] = handle.metadata() or {}
            state = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} is a damaged safetensors file ({_first_line(error)}); get it anew") from None
    packed = metadata.pop(_METADATA, None)
    if packed is not None:
        try:
            metadata.update({str(key): str(value) for key, value in json.loads(packed).items()})
        except (ValueError, AttributeError, RecursionError):
            raise InputError(f"{path} has a damaged header entry {_METADATA}; get it anew") from None
    return state, metadata


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    try:
        value: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or _names_code(path):
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


def _names_code(path: Path) -> bool:
    """Say whether a pickle that is no archive calls for functions beside torch's; it is listed, not run."""
    with path.open("rb") as handle:
        return _lists_code(handle)


def _lists_code(stream: IO[bytes]) -> bool:
    while True:
        try:
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                    return True
                if operation.name == "GLOBAL" and not str(argument).startswith(("torch", "collections ")):
                    return True
        except Exception:  # the end, or bytes that are no pickle
            return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def _what(head: bytes) -> str:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head:
        return "empty"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        return "a web page (the download failed or wanted a login)"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (fetch the file itself with: git lfs pull)"
    if _lists_code(io.BytesIO(head)):
        return "a pickle that names functions, which could run code when loaded"
    if start.startswith(b"{"):
        return "JSON text (perhaps a server's error message)"
    return "a file of another kind"
