"""What a prompted frame leaves in SAM 2's memory, kept for all videos that it stands in.

Shape letters: M prompted frames, P locations of a frame, D features of a memory, C features of a pointer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Memory = tuple[torch.Tensor, torch.Tensor]
"""Spatial features (1, D, h, w) and object pointer (1, C)."""
Kept = TypeVar("Kept")


class Latest(Generic[Kept]):
    """Keep what was used last, up to a size."""

    def __init__(self, limit_mb: int, size: Callable[[Kept], int]) -> None:
        self._limit_bytes = limit_mb * 2**20
        self._size = size
        self._kept: OrderedDict[object, Kept] = OrderedDict()
        self._bytes = 0

    def get(self, key: object) -> Kept | None:
        """Return what was kept under ``key``, or None."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: object, value: Kept) -> None:
        """Keep a value; the one put last always stays."""
        self._kept[key] = value
        self._bytes += self._size(value)
        while self._bytes > self._limit_bytes and len(self._kept) > 1:
            self._bytes -= self._size(self._kept.popitem(last=False)[1])


def memory_bytes(memory: Memory) -> int:
    """Return how much a prompted frame's memory takes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in memory)
