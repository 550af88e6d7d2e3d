"""Checkpoints that are whole or not there, say what went into them, and let a killed training go on as if unharmed."""

from __future__ import annotations

import importlib.metadata
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunet_sam2 import __version__
from nnunet_sam2.errors import InputError
from nnunet_sam2.storage import file_hash, write_stream

PROVENANCE = "nnunet_sam2"
"""Key of a checkpoint that stock nnU-Net ignores: settings, cases, versions, state of the random generators."""


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically and read back: a kill or a full disk leaves the old file or the new one."""
    # Given a stream, torch does not put the file's name into the archive: the same checkpoint has the same bytes.
    write_stream(path, lambda stream: torch.save(checkpoint, stream))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of nnU-Net into the CPU's memory, tensors only when they are used; nothing in it is executed.

    Checkpoints hold numpy's numbers and arrays beside tensors; these are let through, and nothing else is. What nnU-Net
    itself loads, which executes whatever a file says, is read here before.
    """
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is refused: it is damaged, or holds more than tensors and numbers, which could run code when "
            f"loaded ({str(error).splitlines()[0][:120]}); remove it or name another"
        ) from None
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist") from None
    except Exception as error:
        raise InputError(f"{path} is not a readable checkpoint ({error}); remove it or name another") from None
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise InputError(f"{path} is no checkpoint of nnU-Net: it has no network_weights")
    return checkpoint


def _numpy_globals() -> list[Any]:
    """Return the functions and types by which pickles build numpy's numbers and arrays, by both names of the module."""
    rebuild: Any = np.zeros(1).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"} | {type(np.dtype("U1")), type(np.dtype("S1"))}
    names = [
        (function, f"numpy.{core}.multiarray.{function.__name__}")
        for function in (rebuild, scalar)
        for core in ("_core", "core")
    ]
    return [np.ndarray, np.dtype, *kinds, *names]


def versions() -> dict[str, str]:
    """Return the versions that a training depends on."""
    return {
        "nnunet_sam2": __version__,
        "nnunetv2": importlib.metadata.version("nnunetv2"),
        "torch": str(torch.__version__),
    }


def load_all_weights(network: nn.Module, path: Path) -> dict[str, str]:
    """Load every weight of a checkpoint, segmentation heads included, and return the file's path and hash.

    nnU-Net's own ``-pretrained_weights`` leaves the heads out: it is made for other label sets. Raises InputError
    where the checkpoint is of another network.
    """
    weights = read_checkpoint(path)["network_weights"]
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    own = network.state_dict()
    different = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    different += [name for name in weights if name not in own]
    if different:
        raise InputError(
            f"warm start from {path}: its network is another one, {len(different)} weights differ in name or shape, "
            f"the first is {different[0]}; use a checkpoint of the same plans and architecture"
        )
    network.load_state_dict(weights)
    return {"path": str(path), "sha256": file_hash(path)}
