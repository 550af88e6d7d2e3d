"""Reduced precision on processors that multiply bfloat16 in hardware: a training step takes half the time there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def is_reduced(precision: str, device: torch.device) -> bool:
    """Say whether a training on ``device`` computes in bfloat16; accelerators have nnU-Net's own mixed precision."""
    return device.type == "cpu" and (precision == "bfloat16" or (precision == "auto" and has_matrix_units()))


def has_matrix_units() -> bool:
    """Say whether this processor multiplies bfloat16 matrices in hardware (AMX); torch alone may know."""
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(ask and ask())


@contextmanager
def computing(*, reduced: bool) -> Iterator[None]:
    """Compute convolutions in bfloat16 inside the block; weights, their gradients and the loss stay float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=reduced):
        yield


@contextmanager
def in_full() -> Iterator[None]:
    """Compute in float32 inside the block, whatever is set around it on the CPU: sums over voxels need it."""
    with torch.autocast("cpu", enabled=False):
        yield
