"""Views: a volume transferred along several axes; what looks alike from one side is told apart from another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.strategies.transfer.memory import Place
from nnunet_sam2.labelling.strategies.transfer.strategy import Transfer, TransferOptions
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support

ENTRIES, LEAST_SLICES = 16384, 40
"""Support locations that a slice of a view is compared with, and the slices that they make up at least: with more of
them labels of hippocampus (three supports) stay the same to the third decimal of Dice, at half the search's time."""

PlacesAlong = Callable[[int], Sequence[torch.Tensor]]
"""Takes a slice axis; returns for each support where its cells lie in the query, as `Alignment.cells` does."""


def entries_at_most(options: TransferOptions, locations: int) -> int:
    """Return how many support locations a slice of a view is compared with at most, where a slice has ``locations``."""
    return min(options.memory_entries, max(ENTRIES, LEAST_SLICES * locations))


class Views:
    """Label a query by `Transfer` along each of some axes; one member an axis."""

    def __init__(self, options: TransferOptions) -> None:
        self._options = options
        self._transfers: dict[int, Transfer] = {}
        # The support is kept beside its view, so that its id cannot be taken over by another.
        self._seen: dict[tuple[int, int], tuple[Support, Support]] = {}

    def prepare(
        self,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        *,
        axes: Sequence[int],
    ) -> dict[str, Any]:
        """Choose each view's recipe and decoder on labelled cases, each patient left out in turn."""
        self._bound(supports)
        return {
            f"axis {axis}": self._transfer(axis).prepare(
                self._supports_along(supports, axis, backend), class_values, backend
            )
            for axis in axes
        }

    def members(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
        *,
        axes: Sequence[int],
        places: PlacesAlong | None = None,
        weights: Place | None = None,
    ) -> Iterator[Member]:
        """Yield one member an axis, named by it; for ``places`` and ``weights`` see `Transfer.members`."""
        self._bound(supports)
        for axis in axes:
            seen = self._supports_along(supports, axis, backend)
            along = _along(query, axis, backend)
            placed = None if places is None else places(axis)
            for member in self._transfer(axis).members(
                along, seen, class_values, backend, rng, places=placed, weights=weights
            ):
                yield replace(member, name=f"axis {axis}", record={"view": axis, **member.record})

    def checked_dice(
        self, class_values: tuple[int, ...], *, axis: int, without: Set[str] = frozenset()
    ) -> float | None:
        """Return the mean Dice over classes and checked cases along an axis; None where nothing was checked."""
        known = [d for d in self._transfer(axis).checked_dice(class_values, without=without).values() if d is not None]
        return float(np.mean(known)) if known else None

    def _bound(self, supports: Sequence[Support]) -> None:
        if supports:
            locations = int(supports[0].embeddings.top(0).shape[1:].numel())
            entries = entries_at_most(self._options, locations)
            self._options = replace(self._options, memory_entries=entries)

    def _transfer(self, axis: int) -> Transfer:
        return self._transfers.setdefault(axis, Transfer(self._options))

    def _supports_along(self, supports: Sequence[Support], axis: int, backend: Sam2Backend) -> list[Support]:
        """Return the supports along an axis, the same objects every time, so that their memory is built once."""
        seen = []
        for support in supports:
            key = (id(support), axis)
            if key not in self._seen:
                self._seen[key] = (support, _along(support, axis, backend))
            seen.append(self._seen[key][1])
        return seen


def _along(case: Any, axis: int, backend: Sam2Backend) -> Any:
    if axis == case.frames.slice_axis:
        return case
    frames = case.frames.along(axis)
    return replace(case, frames=frames, embeddings=backend.embed(frames))
