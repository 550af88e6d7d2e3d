"""Auto: label transfer on whole slices says where to look, transfer between close-ups says what is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import numpy as np

from nnunet_sam2.geometry import view_axes
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import FusionOptions, fuse
from nnunet_sam2.labelling.leave_one_out import dice_by_class, patients_by_case, scans_of
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.strategies.auto.intensity import contrast_like
from nnunet_sam2.labelling.strategies.auto.subject import (
    may_be_subject,
    subject_dice,
    subject_member,
    transfer_went_astray,
)
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

LITTLE_NEARER = 0.5
"""Part of a slice's area above which the first look counts as much as all close-ups together: they gain less there, and
where box and subject do not fit they lose more."""


@dataclass(frozen=True, kw_only=True)
class AutoOptions:
    """Say from how many sides, and from how near, a volume is labelled."""

    views: str = "auto"
    """``auto``: along all three axes where the voxels are about as long as wide, else along the slices; ``one``."""
    zoom: str = "on"
    """``on``: labels are transferred between close-ups of the part that the labels fill; ``off``: on whole slices."""
    intensities: str = "checked"
    """``checked``: a query whose intensities are foreign to the supports is matched to them; ``as they are``: never."""
    subject: str = "checked"
    """``checked``: in single pictures of one class, the subject parted from the background by its intensity stands in
    for a transfer that contradicts it, where human labels are the subject; ``off``: never."""
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
        if self.subject not in ("checked", "off"):
            raise ValueError(f"subject={self.subject}: choose checked or off")
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
    than the supports' is brought to theirs before (`contrast_like`). Close-ups that do worse than whole slices on
    labelled cases, each patient left out in turn, are left out. Needs no video memory.
    """

    name: ClassVar[str] = "auto"
    needs_memory: ClassVar[bool] = False

    def __init__(self, options: AutoOptions | None = None) -> None:
        self._options = options or AutoOptions()
        self._subject_dice: dict[str, float] = {}
        self._patients: dict[str, str] = {}
        self._forget()

    @property
    def options(self) -> AutoOptions:
        """Return the options."""
        return self._options

    def prepare(
        self, supports: Sequence[Support], class_values: tuple[int, ...], backend: Sam2Backend
    ) -> dict[str, Any]:
        """Choose each view's recipe and decoder on labelled cases, each patient left out in turn; see `Prepares`."""
        self._forget()
        self._patients = patients_by_case(supports)
        wanted = self._options.subject == "checked"
        if wanted and all(may_be_subject(support, class_values) for support in supports):
            self._subject_dice = subject_dice(supports, class_values[0])
        axes = sorted({axis for support in supports for axis in self._axes(support)})
        own = sorted({support.frames.slice_axis for support in supports})
        near = self._close_ups(supports, axes, class_values, backend)
        record = self._whole.prepare(supports, class_values, backend, axes=own if near else axes)
        for margin, parts in near.items():
            found = self._near(margin).prepare(parts, class_values, backend, axes=axes)
            record |= {f"{name}, margin {margin:g}": entry for name, entry in found.items()}
        if self._subject_dice:
            record["subject"] = {case_id: round(dice, 4) for case_id, dice in self._subject_dice.items()}
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
        looks = self._looks(query, supports, class_values, backend, rng)
        for member in self._checked_by_subject(looks, query, class_values):
            yield replace(member, record={**member.record, "intensities": contrast})

    def _checked_by_subject(
        self, looks: Iterator[Member], query: Query, class_values: tuple[int, ...]
    ) -> Iterator[Member]:
        """Yield the members, or a single picture's subject in their place where they went astray."""
        if not self._subject_dice or not may_be_subject(query, class_values):
            yield from looks
            return
        members, subject = list(looks), subject_member(query)
        label_zyx = fuse(iter(members), class_values).label_zyx
        subject_zyx = np.where(subject.prob_kzyx[0] > 0.5, class_values[0], 0)
        agreement = dice_by_class(label_zyx, subject_zyx, class_values)[class_values[0]] or 0.0
        if transfer_went_astray(agreement, self._subject_dice, without=scans_of(query, self._patients)):
            record = {**subject.record, "agreement_with_transfer": round(agreement, 4)}
            yield replace(subject, name=f"{self.name}:subject", record=record)
        else:
            yield from members

    def _looks(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> Iterator[Member]:
        axes, given = self._axes(query), (supports, class_values, backend, rng)
        own = scans_of(query, self._patients)
        near = {
            margin: parts
            for margin, parts in self._close_ups(supports, axes, class_values, backend).items()
            if self._helps(margin, axes[0], class_values, without=own)
        }
        first = list(self._whole.members(query, *given, axes=axes[:1]))
        where_zyx = _where(first, supports, class_values) if near else None
        boxes = {} if where_zyx is None else {margin: box_around(where_zyx, margin=margin) for margin in near}
        shares = []
        for margin, box in boxes.items():
            share = 1.0 if box is None else box.share_of_slice(query.geometry.shape_zyx, axes[0])
            if box is None or share > LARGEST_OF_ONE_VIEW:
                continue
            shares.append(share)
            part = close_up(query, box, backend)
            for member in self._near(margin).members(part, near[margin], class_values, backend, rng, axes=axes):
                record = {"margin": margin, "box_zyx": [list(box.start_zyx), list(box.stop_zyx)], **member.record}
                name = f"{self.name}:{member.name}, margin {margin:g}"
                yield put_back(replace(member, name=name, record=record), box, query)
        if shares and min(shares) > LITTLE_NEARER:
            for member in first:
                weight_k = np.full(len(class_values), float(len(shares)))
                yield replace(member, name=f"{self.name}:{member.name}", weight_k=weight_k)
        if not shares:
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

    def _helps(self, margin: float, axis: int, class_values: tuple[int, ...], *, without: Set[str]) -> bool:
        """Say whether close-ups did no worse than whole slices on the labelled cases; yes where nothing was checked."""
        whole = self._whole.checked_dice(class_values, axis=axis, without=without)
        near = self._near(margin).checked_dice(class_values, axis=axis, without=without)
        return whole is None or near is None or near >= whole

    def _near(self, margin: float) -> Views:
        return self._by_margin.setdefault(margin, Views(self._options.transfer_options()))

    def _forget(self) -> None:
        self._whole = Views(self._options.transfer_options())
        self._subject_dice = {}
        self._patients = {}
        self._by_margin: dict[float, Views] = {}
        self._parts = CloseUps()


def _where(members: Sequence[Member], supports: Sequence[Support], class_values: tuple[int, ...]) -> np.ndarray:
    """Return where a first transfer has found the classes, bool."""
    single = single_component_classes([support.label_zyx for support in supports], class_values)
    found = fuse(members, class_values, FusionOptions(single_component_classes=single))
    shown = [set(np.unique(support.label_zyx).tolist()) & set(class_values) for support in supports]
    always = set(class_values).intersection(*(values for values in shown if values))
    return labelled_part(found.label_zyx, found.prob_czyx, class_values, expected=always)
