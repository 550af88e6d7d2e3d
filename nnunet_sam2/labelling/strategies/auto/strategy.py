"""Auto: label transfer on whole slices says where to look, transfer between close-ups says what is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import numpy as np

from nnunet_sam2.frames import view_axes
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import FusionOptions, fuse
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.strategies.auto.intensity import contrast_like
from nnunet_sam2.labelling.strategies.auto.views import Views
from nnunet_sam2.labelling.strategies.auto.zoom import CloseUps, box_around, close_up, labelled_part, put_back
from nnunet_sam2.labelling.strategies.transfer.strategy import TransferOptions
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support

ONE_VIEW, SEVERAL_VIEWS = (0.1, 0.25), (0.25,)
"""How much is seen around the labels, one close-up each: two where there is one view, so that the cost stays alike."""

LARGEST_OF_ONE_VIEW, LARGEST_OF_SEVERAL = 0.9, 0.5
"""Part of a slice's area from which on a close-up is no use: with several views, a border that is blurred in one is
sharp in another anyway, and what surrounds the labels says more than a little magnification."""


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
    transfer finds nothing, or the labels fill the slices anyway, whole slices are taken. A query of another contrast
    than the supports' is brought to theirs before (`contrast_like`). Needs no video memory.
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
        near = self._close_ups(supports, axes, class_values, backend)
        record = self._whole.prepare(supports, class_values, backend, axes=own if near else axes)
        for margin, parts in near.items():
            found = self._near(margin).prepare(parts, class_values, backend, axes=axes)
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
        axes, given = self._axes(query), (supports, class_values, backend, rng)
        near = self._close_ups(supports, axes, class_values, backend)
        first = list(self._whole.members(query, *given, axes=axes[:1]))
        where_zyx = _where(first, supports, class_values) if near else None
        boxes = {} if where_zyx is None else {margin: box_around(where_zyx, margin=margin) for margin in near}
        found = False
        for margin, box in boxes.items():
            if box is None or box.share_of_slice(query.geometry.shape_zyx, axes[0]) > LARGEST_OF_ONE_VIEW:
                continue
            found = True
            part = close_up(query, box, backend)
            for member in self._near(margin).members(part, near[margin], class_values, backend, rng, axes=axes):
                record = {"margin": margin, "box_zyx": [list(box.start_zyx), list(box.stop_zyx)], **member.record}
                name = f"{self.name}:{member.name}, margin {margin:g}"
                yield put_back(replace(member, name=name, record=record), box, query)
        if not found:
            others = self._whole.members(query, *given, axes=axes[1:])
            for member in chain(first, others):
                yield replace(member, name=f"{self.name}:{member.name}")

    def _axes(self, case: Query | Support) -> tuple[int, ...]:
        own = case.frames.slice_axis
        return view_axes(case.geometry, own) if self._options.views == "auto" else (own,)

    def _close_ups(
        self, supports: Sequence[Support], axes: Sequence[int], class_values: tuple[int, ...], backend: Sam2Backend
    ) -> dict[float, list[Support]]:
        """Return the supports' close-ups by margin; margins that bring nothing nearer are left out."""
        if self._options.zoom == "off":
            return {}
        one = len(axes) == 1
        largest = LARGEST_OF_ONE_VIEW if one else LARGEST_OF_SEVERAL
        near = {
            margin: self._parts.of(supports, class_values, backend, margin=margin, largest=largest)
            for margin in (ONE_VIEW if one else SEVERAL_VIEWS)
        }
        return {margin: parts for margin, parts in near.items() if parts}

    def _near(self, margin: float) -> Views:
        return self._by_margin.setdefault(margin, Views(self._options.transfer_options()))

    def _forget(self) -> None:
        self._whole = Views(self._options.transfer_options())
        self._by_margin: dict[float, Views] = {}
        self._parts = CloseUps()


def _where(members: Sequence[Member], supports: Sequence[Support], class_values: tuple[int, ...]) -> np.ndarray:
    """Return where a first transfer has found the classes, bool."""
    single = single_component_classes([support.label_zyx for support in supports], class_values)
    found = fuse(members, class_values, FusionOptions(single_component_classes=single))
    shown = [set(np.unique(support.label_zyx).tolist()) & set(class_values) for support in supports]
    always = set(class_values).intersection(*(values for values in shown if values))
    return labelled_part(found.label_zyx, found.prob_czyx, class_values, expected=always)
