"""Labelling from partly annotated supports: class by class from those that were annotated for it.

A location that a support's human left empty says that it is none of the annotated classes there, and nothing of the
others. Classes that the same supports answer for make a group; each group is labelled by the strategy as if there were
no other class, from its own supports, and the groups' maps are joined. Where all supports answer for all classes there
is one group, and all is as without this module.

Shape letters: C channels (background first), k classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nnunet_sam2.labelling.fusion import FusionOptions, as_probability, fuse
from nnunet_sam2.labelling.member import Member, PseudoLabel
from nnunet_sam2.labelling.quality.features import CaseFeatures
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.quality.probe import QualityProbe
from nnunet_sam2.labelling.strategy import Prepares, PreparesCohort, Strategy, WithoutOtherClasses
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support

ANSWERS_FOR = "answers_for"
"""Key of a member's record: the classes that it was made for, where it was not made for all."""

_LEAST_BACKGROUND = 1e-3
"""Background that a group leaves to the others at least: two groups that are both sure share a voxel."""


def class_groups(supports: Sequence[Support], class_values: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the classes in groups that the same supports are annotated for."""
    groups: dict[tuple[bool, ...], list[int]] = {}
    for value in class_values:
        groups.setdefault(tuple(support.answers_for(value) for support in supports), []).append(int(value))
    return [tuple(values) for values in groups.values()]


class GroupSupports:
    """Offer supports as a group of classes sees them, the same objects every time, so that what is kept of them holds.

    Labels of other groups' classes are background there; supports that are not annotated for the group are left out.
    """

    def __init__(self, class_values: Sequence[int]) -> None:
        self._values = tuple(class_values)
        # A support is kept beside its view, so that its id cannot be taken over by another.
        self._views: dict[tuple[int, tuple[int, ...]], tuple[Support, Support]] = {}

    def of(self, supports: Sequence[Support], group: tuple[int, ...]) -> list[Support]:
        """Return the supports that answer for a group, with its classes alone."""
        answering = [support for support in supports if support.answers_for(group[0])]
        if group == self._values:
            return answering
        for support in answering:
            if (id(support), group) not in self._views:
                self._views[id(support), group] = support, self._view(support, group)
        return [self._views[id(support), group][1] for support in answering]

    def _view(self, support: Support, group: tuple[int, ...]) -> Support:
        kept = [*group, *([] if support.ignore_value is None else [support.ignore_value])]
        label_zyx = np.where(np.isin(support.label_zyx, kept), support.label_zyx, 0).astype(support.label_zyx.dtype)
        student = _channels_of(support.student_prob_czyx, self._values, group)
        return replace(support, label_zyx=label_zyx, student_prob_czyx=student, annotated=None)


@dataclass(frozen=True, kw_only=True)
class _Part:
    values: tuple[int, ...]
    strategy: Strategy


class GroupLabeller:
    """Label queries by a strategy, group by group of classes that the same supports are annotated for."""

    def __init__(self, strategy: Strategy, supports: Sequence[Support], class_values: Sequence[int]) -> None:
        self._values = tuple(class_values)
        self._supports = list(supports)
        self._views = GroupSupports(self._values)
        groups = class_groups(supports, self._values)
        if groups == [self._values]:
            self._parts = [_Part(values=self._values, strategy=strategy)]
        else:
            self._parts = [_Part(values=group, strategy=_for_group(strategy)) for group in groups]

    def prepare(self, backend: Sam2Backend, cases: Sequence[Query] | None = None) -> dict[str, Any] | None:
        """Let the strategy check on the supports what it wants to know, and return a JSON record of what was found."""
        found: list[dict[str, Any] | None] = []
        for part in self._parts:
            supports = self._views.of(self._supports, part.values)
            if not supports and self._supports:
                found.append(None)
            elif isinstance(part.strategy, PreparesCohort):
                seen = list(map(Support.as_query, self._supports)) if cases is None else cases
                found.append(part.strategy.prepare_cohort(seen, supports, part.values, backend))
            elif isinstance(part.strategy, Prepares):
                found.append(part.strategy.prepare(supports, part.values, backend))
            else:
                found.append(None)
        if self._whole:
            return found[0]
        parts = zip(self._parts, found, strict=True)
        return {"groups": [{ANSWERS_FOR: list(part.values), "prepared": record} for part, record in parts]}

    def label(
        self,
        query: Query,
        supports: Sequence[Support],
        backend: Sam2Backend,
        rng: np.random.Generator,
        fusion: FusionOptions,
    ) -> PseudoLabel:
        """Label a query from ``supports``, some or all of those that were given before.

        A class that none of them answers for is nowhere, and ``unanswered`` in the record names it.
        """
        if self._whole:
            members = self._parts[0].strategy.members(query, supports, self._values, backend, rng)
            return fuse(members, self._values, fusion)
        found: dict[tuple[int, ...], PseudoLabel] = {}
        for part in self._parts:
            views = self._views.of(supports, part.values)
            uses_student = getattr(part.strategy, "uses_student", False) and query.student_prob_czyx is not None
            if views or uses_student:
                own = _channels_of(query.student_prob_czyx, self._values, part.values)
                members = part.strategy.members(replace(query, student_prob_czyx=own), views, part.values, backend, rng)
                found[part.values] = fuse(members, part.values, fusion)
        return joined(found, query, self._values, fusion)

    @property
    def _whole(self) -> bool:
        return len(self._parts) == 1 and self._parts[0].values == self._values


class GroupProbe:
    """Look at pseudo-labels like `QualityProbe`, each class by the labelled cases that are annotated for it."""

    def __init__(self, class_values: Sequence[int], options: QualityOptions | None = None) -> None:
        self._values = tuple(class_values)
        self._options = options
        self._views = GroupSupports(self._values)
        self._probes: dict[tuple[int, ...], QualityProbe] = {}

    def measure(self, query: Query, pseudo: PseudoLabel, supports: Sequence[Support]) -> CaseFeatures:
        """Return the features of every class; ``supports`` are labelled cases of other patients."""
        found: CaseFeatures = {}
        for group in class_groups(supports, self._values):
            probe = self._probes.setdefault(group, QualityProbe(group, self._options))
            found |= probe.measure(query, self._of_group(pseudo, group), self._views.of(supports, group))
        return {value: found[value] for value in self._values}

    def _of_group(self, pseudo: PseudoLabel, group: tuple[int, ...]) -> PseudoLabel:
        if group == self._values:
            return pseudo
        prob_czyx = _channels_of(pseudo.prob_czyx, self._values, group)
        label_zyx = np.where(np.isin(pseudo.label_zyx, group), pseudo.label_zyx, 0).astype(pseudo.label_zyx.dtype)
        return replace(pseudo, label_zyx=label_zyx, prob_czyx=prob_czyx)


def joined(
    found: Mapping[tuple[int, ...], PseudoLabel], query: Query, class_values: tuple[int, ...], fusion: FusionOptions
) -> PseudoLabel:
    """Join the groups' labels into one.

    A group's background is shared over the background and the classes of the other groups as these see them, so that
    a class has the probability of its own group times the background of all others, scaled to sum to one. A class so
    wins against the background where it does in its own group, and where two groups claim a voxel, the higher odds do.
    """
    shape_zyx = query.geometry.shape_zyx
    prob_czyx = np.zeros((len(class_values) + 1, *shape_zyx), np.float32)
    prob_czyx[0] = 1.0
    for group, pseudo in found.items():
        own_czyx = pseudo.prob_czyx
        others = [c for c in range(1, len(prob_czyx)) if class_values[c - 1] not in group]
        mine = [c for c in range(1, len(prob_czyx)) if class_values[c - 1] in group]
        left_zyx = own_czyx[0].clip(_LEAST_BACKGROUND)
        # The background so far is what the groups before have left.
        prob_czyx[mine] = prob_czyx[0].clip(_LEAST_BACKGROUND) * own_czyx[1:]
        prob_czyx[others] *= left_zyx
        prob_czyx[0] *= own_czyx[0]
    prob_czyx /= prob_czyx.sum(axis=0)
    pseudo = fuse([Member(name="groups", prob_kzyx=prob_czyx[1:], background_zyx=prob_czyx[0])], class_values, fusion)
    pseudo.record["members"] = [
        {**member, ANSWERS_FOR: list(group)} for group, one in found.items() for member in one.record["members"]
    ]
    agreement = {value: dice for one in found.values() for value, dice in one.record.get("agreement", {}).items()}
    if agreement:
        pseudo.record["agreement"] = agreement
    if unanswered := sorted(set(class_values) - {value for group in found for value in group}):
        pseudo.record["unanswered"] = unanswered
    return pseudo


def _for_group(strategy: Strategy) -> Strategy:
    """Return a strategy like the given one, which has looked at nothing yet."""
    if isinstance(strategy, WithoutOtherClasses):
        return strategy.without_other_classes()
    made: Any = type(strategy)
    fresh: Strategy = made(strategy.options)
    return fresh


def _channels_of(prob_czyx: Any, class_values: Sequence[int], group: Sequence[int]) -> Any:
    """Return background and a group's classes; the other classes count as background. None stays None."""
    if prob_czyx is None or tuple(group) == tuple(class_values):
        return prob_czyx
    kept_kzyx = as_probability(prob_czyx[[1 + class_values.index(value) for value in group]])
    own_czyx = np.concatenate([1.0 - kept_kzyx.sum(axis=0, keepdims=True), kept_kzyx]).clip(0.0, 1.0)
    return np.rint(own_czyx * 255.0).astype(np.uint8) if prob_czyx.dtype == np.uint8 else own_czyx.astype(np.float32)
