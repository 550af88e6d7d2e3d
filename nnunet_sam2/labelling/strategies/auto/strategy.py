"""Auto: label transfer on whole slices says where to look, transfer between close-ups says what is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from nnunet_sam2.frames import view_axes
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import FusionOptions, fuse
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.strategies.auto.intensity import contrast_like
from nnunet_sam2.labelling.strategies.auto.views import Views
from nnunet_sam2.labelling.strategies.auto.zoom import MOST_OF_A_SLICE, box_around, close_up, labelled_part, put_back
from nnunet_sam2.labelling.strategies.transfer.strategy import TransferOptions
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support

MARGINS_OF_ONE_VIEW = (0.1, 0.25)
MARGINS_OF_SEVERAL = (0.1,)
"""How much is seen around the labels, one close-up each: two where there is one view, so that the cost stays alike."""


@dataclass(frozen=True, kw_only=True)
class AutoOptions:
    """Say from how many sides, and from how near, a volume is labelled."""

    views: str = "auto"
    """``auto``: along all three axes where the voxels are about as long as wide, else along the slices; ``one``."""
    zoom: str = "on"
    """``on``: labels are transferred between close-ups of the part that the labels fill; ``off``: on whole slices."""
    intensities: str = "checked"
    """``checked``: a query whose intensities are foreign to the supports is matched to them; ``as they are``: never."""
    decoder: str = "checked"
    """As in `TransferOptions`."""
    check_slices: int = 24
    """As in `TransferOptions`, for each view and each close-up."""

    def __post_init__(self) -> None:
        if self.views not in ("auto", "one"):
            raise ValueError(f"views={self.views}: choose auto or one")
        if self.zoom not in ("on", "off"):
            raise ValueError(f"zoom={self.zoom}: choose on or off")
        if self.intensities not in ("checked", "as they are"):
            raise ValueError(f"intensities={self.intensities}: choose checked or as they are")
        self.transfer_options()

    def transfer_options(self) -> TransferOptions:
        """Return the options of each view's transfer."""
        return TransferOptions(decoder=self.decoder, check_slices=self.check_slices)


class Auto:
    """Label a query by `Transfer` between close-ups, along each axis that shows it well; fusion averages the members.

    A first transfer on whole slices finds the part of the query that the labels fill. The query is cut to it, the
    supports to what their own labels fill, and both are encoded again at the model's full size: structures that were a
    cell of the embedding wide are several wide now, and places correspond whatever lies around. Isotropic volumes are
    labelled along all three axes; anisotropic ones and pictures along one, but at two margins. Where the first
    transfer finds nothing, or the labels fill the slices anyway, whole slices are taken. Needs no video memory.
    """

    name: ClassVar[str] = "auto"
    needs_memory: ClassVar[bool] = False

    def __init__(self, options: AutoOptions | None = None) -> None:
        self._options = options or AutoOptions()
        self._forget()

    @property
    def options(self) -> AutoOptions:
        """Return the options."""
        return self._options

    def prepare(
        self, supports: Sequence[Support], class_values: tuple[int, ...], backend: Sam2Backend
    ) -> dict[str, Any]:
        """Choose each view's recipe and decoder on labelled cases, each left out in turn; see `Prepares`."""
        self._forget()
        axes = sorted({axis for support in supports for axis in self._axes(support)})
        own = sorted({support.frames.slice_axis for support in supports})
        record = self._whole.prepare(supports, class_values, backend, axes=own if self._options.zoom == "on" else axes)
        for margin in self._margins(axes):
            near = self._close_ups(supports, margin, class_values, backend)
            if near:
                found = self._near(margin).prepare(near, class_values, backend, axes=axes)
                record |= {f"{name}, margin {margin:g}": entry for name, entry in found.items()}
        return record

    def members(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> Iterator[Member]:
        """Yield one member for each view and margin; see `Strategy.members`. Nothing is drawn from ``rng``."""
        contrast: dict[str, Any] = {}
        if self._options.intensities == "checked" and supports:
            query, contrast = contrast_like(query, supports, class_values, backend)
        for member in self._looks(query, supports, class_values, backend, rng):
            yield replace(member, record={**member.record, "intensities": contrast})

    def _looks(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> Iterator[Member]:
        axes = self._axes(query)
        given = (supports, class_values, backend, rng)
        if self._options.zoom == "off":
            for member in self._whole.members(query, *given, axes=axes):
                yield replace(member, name=f"{self.name}:{member.name}")
            return
        first = list(self._whole.members(query, *given, axes=axes[:1]))
        single = single_component_classes([support.label_zyx for support in supports], class_values)
        found_first = fuse(first, class_values, FusionOptions(single_component_classes=single))
        shown = [set(np.unique(support.label_zyx).tolist()) & set(class_values) for support in supports]
        always = set(class_values).intersection(*(values for values in shown if values))
        where_zyx = labelled_part(found_first.label_zyx, found_first.prob_czyx, class_values, expected=always)
        found = False
        for margin in self._margins(axes):
            near = self._close_ups(supports, margin, class_values, backend)
            box = box_around(where_zyx, margin=margin) if near else None
            if box is None or box.share_of_slice(query.geometry.shape_zyx, axes[0]) > MOST_OF_A_SLICE:
                continue
            found = True
            part = close_up(query, box, backend)
            for member in self._near(margin).members(part, near, class_values, backend, rng, axes=axes):
                record = {"margin": margin, "box_zyx": [list(box.start_zyx), list(box.stop_zyx)], **member.record}
                name = f"{self.name}:{member.name}, margin {margin:g}"
                yield put_back(replace(member, name=name, record=record), box, query)
        if not found:
            others = self._whole.members(query, *given, axes=axes[1:])
            for member in (*first, *others):
                yield replace(member, name=f"{self.name}:{member.name}")

    def _axes(self, case: Query | Support) -> tuple[int, ...]:
        own = case.frames.slice_axis
        return view_axes(case.geometry, own) if self._options.views == "auto" else (own,)

    def _margins(self, axes: Sequence[int]) -> tuple[float, ...]:
        if self._options.zoom == "off":
            return ()
        return MARGINS_OF_ONE_VIEW if len(axes) == 1 else MARGINS_OF_SEVERAL

    def _near(self, margin: float) -> Views:
        return self._by_margin.setdefault(margin, Views(self._options.transfer_options()))

    def _close_ups(
        self, supports: Sequence[Support], margin: float, class_values: tuple[int, ...], backend: Sam2Backend
    ) -> list[Support]:
        """Return the supports as what their labels fill, the same objects every time, less those that show no class."""
        near = []
        for support in supports:
            key = (id(support), margin)
            if key not in self._parts:
                box = box_around(np.isin(support.label_zyx, class_values), margin=margin)
                # The support is kept beside its part, so that its id cannot be taken over by another.
                self._parts[key] = (support, None if box is None else close_up(support, box, backend))
            part = self._parts[key][1]
            if part is not None:
                near.append(part)
        return near

    def _forget(self) -> None:
        self._whole = Views(self._options.transfer_options())
        self._by_margin: dict[float, Views] = {}
        self._parts: dict[tuple[int, float], tuple[Support, Support | None]] = {}
