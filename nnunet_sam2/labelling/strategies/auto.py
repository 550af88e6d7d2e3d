"""Auto: label transfer from every side that shows the volume well, fused by what each is worth on labelled cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from nnunet_sam2.frames import view_axes
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.strategies.transfer.strategy import Transfer, TransferOptions
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support


@dataclass(frozen=True, kw_only=True)
class AutoOptions:
    """Say from how many sides a volume is labelled."""

    views: str = "auto"
    """``auto``: along all three axes where the voxels are about as long as wide, else along the slices; ``one``."""
    decoder: str = "checked"
    """As in `TransferOptions`."""
    check_slices: int = 24
    """As in `TransferOptions`, for each view."""

    def __post_init__(self) -> None:
        if self.views not in ("auto", "one"):
            raise ValueError(f"views={self.views}: choose auto or one")
        self.transfer_options()

    def transfer_options(self) -> TransferOptions:
        """Return the options of each view's transfer."""
        return TransferOptions(decoder=self.decoder, check_slices=self.check_slices)


class Auto:
    """Label a query by `Transfer` along each axis that shows it well; one member a view, averaged by fusion.

    What looks alike from one side is told apart from another, and a boundary that lies between two slices of one view
    is seen within the slices of the next. Anisotropic volumes and pictures have one view, and the label is that of
    `Transfer`. Needs no video memory.
    """

    name: ClassVar[str] = "auto"
    needs_memory: ClassVar[bool] = False

    def __init__(self, options: AutoOptions | None = None) -> None:
        self._options = options or AutoOptions()
        self._transfers: dict[int, Transfer] = {}
        self._views: dict[tuple[str, int], Support] = {}

    @property
    def options(self) -> AutoOptions:
        """Return the options."""
        return self._options

    def prepare(
        self, supports: Sequence[Support], class_values: tuple[int, ...], backend: Sam2Backend
    ) -> dict[str, Any]:
        """Choose each view's recipe and decoder on labelled cases, each left out in turn; see `Prepares`."""
        self._transfers, self._views = {}, {}
        axes = sorted({axis for support in supports for axis in self._axes(support)})
        return {
            f"axis {axis}": self._transfer(axis).prepare(
                self._seen_along(supports, axis, backend), class_values, backend
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
    ) -> Iterator[Member]:
        """Yield one member a view; see `Strategy.members`. Nothing is drawn from ``rng``."""
        for axis in self._axes(query):
            seen = self._seen_along(supports, axis, backend)
            view = _query_along(query, axis, backend)
            for member in self._transfer(axis).members(view, seen, class_values, backend, rng):
                yield replace(member, name=f"{self.name}:axis {axis}", record={"view": axis, **member.record})

    def _axes(self, case: Query | Support) -> tuple[int, ...]:
        own = case.frames.slice_axis
        return view_axes(case.geometry, own) if self._options.views == "auto" else (own,)

    def _transfer(self, axis: int) -> Transfer:
        return self._transfers.setdefault(axis, Transfer(self._options.transfer_options()))

    def _seen_along(self, supports: Sequence[Support], axis: int, backend: Sam2Backend) -> list[Support]:
        """Return the supports along an axis, the same objects every time, so that their memory is built once."""
        seen = []
        for support in supports:
            key = (support.embeddings.key, axis)
            if key not in self._views:
                frames = support.frames if support.frames.slice_axis == axis else support.frames.along(axis)
                embeddings = support.embeddings if frames is support.frames else backend.embed(frames)
                self._views[key] = replace(support, frames=frames, embeddings=embeddings)
            seen.append(self._views[key])
        return seen


def _query_along(query: Query, axis: int, backend: Sam2Backend) -> Query:
    if axis == query.frames.slice_axis:
        return query
    frames = query.frames.along(axis)
    return replace(query, frames=frames, embeddings=backend.embed(frames))
