"""Auto: label transfer on whole slices says where to look, transfer between close-ups says what is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar, TypeVar

import numpy as np

from nnunet_sam2.geometry import view_axes
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import FusionOptions, fuse
from nnunet_sam2.labelling.leave_one_out import dice_by_class, patients_by_case, scans_of
from nnunet_sam2.labelling.member import Member, PseudoLabel
from nnunet_sam2.labelling.strategies.auto.bending import Aligned
from nnunet_sam2.labelling.strategies.auto.even_odds import at_even_odds
from nnunet_sam2.labelling.strategies.auto.field_of_view import LEAST_SLICES, Ground, common_ground
from nnunet_sam2.labelling.strategies.auto.groups import expected_box, read_in, thin_groups
from nnunet_sam2.labelling.strategies.auto.intensity import contrast_like
from nnunet_sam2.labelling.strategies.auto.options import AutoOptions
from nnunet_sam2.labelling.strategies.auto.scan import Scan, bodies_correspond
from nnunet_sam2.labelling.strategies.auto.subject import (
    may_be_subject,
    subject_dice,
    subject_member,
    transfer_went_astray,
)
from nnunet_sam2.labelling.strategies.auto.views import Views
from nnunet_sam2.labelling.strategies.auto.zoom import (
    Box,
    CloseUps,
    box_around,
    close_up,
    is_whole,
    labelled_part,
    put_back,
)
from nnunet_sam2.labelling.strategies.transfer.memory import Place
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support

_Known = TypeVar("_Known")

ONE_VIEW, SEVERAL_VIEWS = (0.1, 0.25), (0.25,)
"""How much is seen around the labels, one close-up each: two where there is one view, so that the cost stays alike."""

LARGEST_OF_ONE_VIEW, LARGEST_OF_SEVERAL = 0.9, 0.5
"""Part of a slice's area from which on a close-up is no use: with several views, a border that is blurred in one is
sharp in another anyway, and what surrounds the labels says more than a little magnification."""

LITTLE_NEARER = 0.5
"""Part of a slice's area above which the first look counts as much as all close-ups together: they gain less there, and
where box and subject do not fit they lose more."""

NEAR = Place(position_weight=4.0, slice_weight=4.0)
"""Weights of position where supports were bent onto the query: what lies apart then is something else."""

GROUP_MARGIN, GROUP_SHARE = 0.25, 2.0 / 3.0
"""How much is seen around a group of thin classes, and its look's share in them beside the look at all classes."""


class Auto:
    """Label a query by `Transfer` between close-ups, along each axis that shows it well; fusion averages the members.

    A first transfer on whole slices finds the part of the query that the labels fill. The query is cut to it, the
    supports to what their own labels fill, and both are encoded again at the model's full size: structures that were a
    cell of the embedding wide are several wide now, and places correspond whatever lies around. Isotropic volumes are
    labelled along all three axes; anisotropic ones and pictures along one, but at two margins. Where the first
    transfer finds nothing, or the labels fill the slices anyway, whole slices are taken. A query of another contrast
    than the supports' is brought to theirs before (`contrast_like`). Close-ups that do worse than whole slices on
    labelled cases, each patient left out in turn, are left out. In volumes the supports are bent onto what the first
    transfer found (`bend`), so that places mean anatomy, and classes too thin for a look at all of them together have
    nearer ones in groups. Needs no video memory.
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
        if all(self._aligns(support) for support in supports):
            scans, correspond = self._scans_of(supports, class_values)
            if correspond:
                supports = [self._parts.cut(s, scan.body, backend) for s, scan in zip(supports, scans, strict=True)]
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
        """Look at what query and supports both show of the body, then put the members back on the query's grid."""
        if not self._aligns(query):
            yield from self._nearer(query, supports, class_values, backend, rng, ground=None)
            return
        scans, correspond = self._scans_of(supports, class_values)
        ground = common_ground(query, supports, scans, class_values, within_bodies=correspond)
        parts = [self._parts.cut(support, box, backend) for support, box in zip(supports, ground.supports, strict=True)]
        whole = is_whole(ground.query, query.geometry.shape_zyx)
        part = query if whole else close_up(query, ground.query, backend)
        for member in self._nearer(part, parts, class_values, backend, rng, ground=ground):
            member = replace(member, record=_moved({**member.record, "ground": ground.record}, ground.query.start_zyx))
            yield member if whole else put_back(member, ground.query, query)

    def _nearer(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
        *,
        ground: Ground | None,
    ) -> Iterator[Member]:
        axes, given = self._axes(query), (supports, class_values, backend, rng)
        own = scans_of(query, self._patients)
        near = {
            margin: parts
            for margin, parts in self._close_ups(supports, axes, class_values, backend).items()
            if self._helps(margin, axes[0], class_values, without=own)
        }
        start = None if ground is None else Aligned(supports=supports, alignments=ground.alignments, query=query)
        shifted = start if ground is not None and ground.shift_mm is not None else None
        places = None if shifted is None else shifted.whole()
        first = list(self._whole.members(query, *given, axes=axes[:1], places=places))
        seen = self._seen(first, supports, class_values)
        bent = None if start is None or not seen.label_zyx.any() else start.bent(seen, class_values)
        where_zyx = _where(seen, supports, class_values) if near else None
        del seen
        boxes = {} if where_zyx is None else {margin: box_around(where_zyx, margin=margin) for margin in near}
        shares: list[float] = []
        looks: list[Member] = []
        for margin, box in boxes.items():
            share = 1.0 if box is None else box.share_of_slice(query.geometry.shape_zyx, axes[0])
            if box is None or share > LARGEST_OF_ONE_VIEW:
                continue
            shares.append(share)
            views, parts = self._near(margin), near[margin]
            for member in self._look(views, query, box, parts, bent, axes, class_values, backend, rng):
                record = {"margin": margin, **member.record}
                member = replace(member, name=f"{self.name}:{member.name}, margin {margin:g}", record=record)
                looks.append(put_back(member, box, query))
        if shares and min(shares) > LITTLE_NEARER:
            weight_k = np.full(len(class_values), float(len(shares)))
            looks += [replace(member, name=f"{self.name}:{member.name}", weight_k=weight_k) for member in first]
        if not shares and bent is None:
            others = self._whole.members(query, *given, axes=axes[1:], places=places)
            looks += [replace(member, name=f"{self.name}:{member.name}") for member in chain(first, others)]
        elif not shares and bent is not None:
            # The labels fill what is seen already: a second look at all of it, by supports that are bent onto it.
            again = self._whole.members(query, *given, axes=axes, places=bent.whole(), weights=NEAR)
            looks += [replace(member, name=f"{self.name}:{member.name}") for member in again]
        del first
        if bent is not None and self._options.zoom == "on":
            largest = near[max(near)] if near else supports
            looks = self._with_groups(looks, largest, bent, axes, class_values, backend, rng)
        yield from looks

    def _look(
        self,
        views: Views,
        query: Query,
        box: Box,
        parts: Sequence[Support],
        bent: Aligned | None,
        axes: Sequence[int],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> Iterator[Member]:
        """Yield the members of one close-up, on its own grid."""
        places, weights = (None, None) if bent is None else (bent.within(parts, self._parts, box), NEAR)
        part = close_up(query, box, backend)
        for member in views.members(part, parts, class_values, backend, rng, axes=axes, places=places, weights=weights):
            bounds = [list(box.start_zyx), list(box.stop_zyx)]
            yield replace(member, record={"box_zyx": bounds, "supports_bent": bent is not None, **member.record})

    def _with_groups(
        self,
        looks: list[Member],
        parts: Sequence[Support],
        bent: Aligned,
        axes: Sequence[int],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> list[Member]:
        """Return the members with a nearer look, along one axis, at each group of thin classes read into them."""
        groups = self._once(thin_groups, parts, class_values, parts, class_values)
        if not groups:
            return looks
        label_zyx = self._seen(looks, bent.supports, class_values).label_zyx
        records: list[dict[str, Any]] = []
        for values in groups:
            found_zyx = np.isin(label_zyx, values)
            box = expected_box(values, bent.supports, bent.alignments, found_zyx, margin=GROUP_MARGIN)
            near = self._parts.of(bent.supports, values, backend, margin=GROUP_MARGIN, largest=1.0)
            if box is None or not near:
                continue
            at = [class_values.index(value) for value in values]
            for nearer in self._look(self._thin, bent.query, box, near, bent, axes[:1], class_values, backend, rng):
                looks = [read_in(member, nearer, box, at, GROUP_SHARE) for member in looks]
                records.append({"classes": list(values), "box_zyx": nearer.record["box_zyx"], "share": GROUP_SHARE})
        looks = [replace(member, record={**member.record, "groups": records}) for member in looks]
        return at_even_odds(looks, class_values, rough=[value for values in groups for value in values])

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
        # Supports are kept beside what is known of them, so that their ids cannot be taken over by others.
        self._known: dict[tuple[Any, ...], tuple[tuple[Support, ...], Any]] = {}
        self._thin = Views(replace(self._options.transfer_options(), decoder="off", check_slices=0))

    def _aligns(self, case: Query | Support) -> bool:
        return self._options.alignment == "on" and len(case.frames) >= LEAST_SLICES

    def _seen(self, members: Sequence[Member], supports: Sequence[Support], class_values: Sequence[int]) -> PseudoLabel:
        """Return what members make of a query so far."""
        labels_zyx = [support.label_zyx for support in supports]
        single = self._once(single_component_classes, supports, class_values, labels_zyx, class_values)
        return fuse(members, tuple(class_values), FusionOptions(single_component_classes=single))

    def _scans_of(self, supports: Sequence[Support], class_values: tuple[int, ...]) -> tuple[list[Scan], bool]:
        """Return the supports' scans, and whether places within their bodies correspond."""
        scans = [self._once(Scan.of, [s], (), s.frames, s.embeddings) for s in supports]
        return scans, self._once(bodies_correspond, supports, class_values, scans, supports, class_values)

    def _once(
        self, find: Callable[..., _Known], supports: Sequence[Support], class_values: Sequence[int], *given: Any
    ) -> _Known:
        """Return what ``find`` says of supports and classes, asked once for all queries."""
        key = (find, tuple(id(support) for support in supports), tuple(class_values))
        if key not in self._known:
            self._known[key] = tuple(supports), find(*given)
        found: _Known = self._known[key][1]
        return found


def _where(found: PseudoLabel, supports: Sequence[Support], class_values: tuple[int, ...]) -> np.ndarray:
    """Return where a first transfer has found the classes, bool."""
    shown = [set(np.unique(support.label_zyx).tolist()) & set(class_values) for support in supports]
    always = set(class_values).intersection(*(values for values in shown if values))
    return labelled_part(found.label_zyx, found.prob_czyx, class_values, expected=always)


def _moved(record: dict[str, Any], start_zyx: Sequence[int]) -> dict[str, Any]:
    """Return a record of a part that begins at ``start_zyx`` with its boxes in voxels of the whole."""
    moved = dict(record)
    if "box_zyx" in record:
        moved["box_zyx"] = [[a + b for a, b in zip(end, start_zyx, strict=True)] for end in record["box_zyx"]]
    if "groups" in record:
        moved["groups"] = [_moved(group, start_zyx) for group in record["groups"]]
    return moved
