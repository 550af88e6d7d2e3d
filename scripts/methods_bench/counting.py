"""A back end that counts what it is asked for: slices to encode, slices of objects that read the memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.backend import MetaSam2Backend
from nnunet_sam2.sam2.cache import EmbeddingCache
from nnunet_sam2.sam2.protocol import Embeddings


@dataclass
class Counts:
    """Hold running sums; `spent` takes the difference of two readings."""

    slices_to_encode: int = 0
    """Slices whose embeddings were asked for, each once a cell, whether they were encoded now or found on disk."""
    slices_encoded: int = 0
    """Slices that the image encoder did for them."""
    training_slices: int = 0
    """Slices that went through the image encoder in training (LoRA)."""
    memory_reads: int = 0
    """Slices that went through memory attention, once for every object."""
    embed_wall: float = 0.0
    """Seconds between asking for embeddings and having them."""
    embed_cpu: float = 0.0
    encoder_wall: float = 0.0
    """Seconds within the image encoder of `slices_encoded`."""


@dataclass
class Counter:
    """Count for one model and for all copies that are made of it."""

    counts: Counts = field(default_factory=Counts)
    seen: set[str] = field(default_factory=set)
    embedding: bool = False
    entered: float = 0.0

    def new_cell(self) -> None:
        """Forget which embeddings were asked for before."""
        self.seen.clear()

    def reading(self) -> dict[str, Any]:
        """Return the sums so far."""
        return asdict(self.counts)


def spent(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was counted between two readings."""
    return {name: after[name] - before[name] for name in after}


class CountingBackend(MetaSam2Backend):
    """Answer as the back end inside does, and count."""

    def __init__(
        self, inner: MetaSam2Backend, counter: Counter | None = None, *, cache: EmbeddingCache | None = None
    ) -> None:
        self.__dict__.update(inner.__dict__)
        self._cache = cache or self._cache
        self.counter = counter or Counter()
        if counter is None:
            _hook(inner._model, self.counter)

    def embed(self, frames: Frames) -> Embeddings:
        """Encode or find the frames' embeddings, and count them the first time in a cell."""
        counter = self.counter
        wall, cpu = time.monotonic(), time.process_time()
        counter.embedding = True
        try:
            embeddings = super().embed(frames)
        finally:
            counter.embedding = False
            counter.counts.embed_wall += time.monotonic() - wall
            counter.counts.embed_cpu += time.process_time() - cpu
        self.ask(embeddings)
        return embeddings

    def ask(self, embeddings: Embeddings) -> None:
        """Count the slices of embeddings that are there already, the first time in a cell."""
        if embeddings.key not in self.counter.seen:
            self.counter.seen.add(embeddings.key)
            self.counter.counts.slices_to_encode += len(embeddings)

    def adapted(self, changed: Mapping[str, torch.Tensor], *, name: str) -> CountingBackend:
        """Return a back end with some weights replaced that counts on; the copied model keeps its hooks."""
        return CountingBackend(super().adapted(changed, name=name), self.counter)


def _hook(model: Any, counter: Counter) -> None:
    # Functions, not methods: a copied model then counts in the same counter.
    def enter(module: Any, given: Any) -> None:
        counter.entered = time.monotonic()

    def leave(module: Any, given: Any, answer: Any) -> None:
        slices = int(given[0].shape[0])
        if counter.embedding:
            counter.counts.slices_encoded += slices
            counter.counts.encoder_wall += time.monotonic() - counter.entered
        else:
            counter.counts.training_slices += slices

    def remembered(module: Any, given: Any, answer: Any) -> None:
        # The last step of memory attention, whoever calls its layers; objects come first there.
        counter.counts.memory_reads += int(given[0].shape[0])

    register: Callable[..., Any] = model.image_encoder.register_forward_hook
    model.image_encoder.register_forward_pre_hook(enter)
    register(leave)
    if model.memory_attention.batch_first is not True:
        raise SystemExit("memory attention is not batch first here: objects cannot be counted")
    model.memory_attention.norm.register_forward_hook(remembered)
