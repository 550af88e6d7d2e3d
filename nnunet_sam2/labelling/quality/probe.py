"""A pseudo-label held against the labelled cases: reverse propagation, and a second opinion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnunet_sam2.labelling.member import PseudoLabel
from nnunet_sam2.labelling.quality.cells import CellDice, LabelledCells, likeness, relabel
from nnunet_sam2.labelling.quality.features import (
    CaseFeatures,
    Features,
    confidence_features,
    member_features,
    shape_features,
)
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.support.cases import Query, Support

_DECIMALS = 6


class QualityProbe:
    """Look at pseudo-labels of one cohort; what it learns of a labelled case is kept for the next query.

    *Reverse propagation* (RCA: Valindria et al., TMI 2017; with SAM 2: RevSAM2 and In-Context RCA, arXiv 2503.04522):
    the query with its pseudo-label becomes the only support, and known labelled cases are labelled by it and scored.
    *Agreement*: what each labelled case alone would have made of the query, compared with the pseudo-label. Both by
    label transfer between embeddings on few slices, so that they cost a small part of a label, need no video memory
    and mean the same for every strategy.
    """

    def __init__(self, class_values: Sequence[int], options: QualityOptions | None = None) -> None:
        self._values = tuple(class_values)
        self._options = options or QualityOptions()
        self._known: dict[int, LabelledCells] = {}
        self._shapes: dict[int, tuple[Support, dict[int, dict[str, float]]]] = {}

    def measure(self, query: Query, pseudo: PseudoLabel, supports: Sequence[Support]) -> CaseFeatures:
        """Return the features of every class; ``supports`` are labelled cases of other patients."""
        mine = LabelledCells(_as_support(query, pseudo.label_zyx), self._values)
        references = self._references(mine, supports) if (pseudo.label_zyx > 0).any() else []
        reverse: list[dict[str, float]] = [{} for _ in self._values]
        agreement: list[dict[str, float]] = [{} for _ in self._values]
        for reference in references:
            name = reference.support.case_id
            back, forth = self._compare(mine, reference), self._compare(reference, mine)
            reference.forget()
            for k in range(len(self._values)):
                if (dice := back.soft(k)) is not None:
                    reverse[k][name] = round(dice, _DECIMALS)
                if (dice := forth.hard(k)) is not None:
                    agreement[k][name] = round(dice, _DECIMALS)
        of_members = member_features(pseudo, self._values)
        features: CaseFeatures = {}
        for k, value in enumerate(self._values):
            voxels = int(np.count_nonzero(pseudo.label_zyx == value))
            more: dict[str, Any] = {}
            if voxels:
                seen: dict[str, float | None] = {
                    **confidence_features(pseudo.label_zyx, pseudo.prob_czyx, k + 1, value),
                    **of_members[value],
                }
                more = {key: None if x is None else round(x, _DECIMALS) for key, x in seen.items()}
                more |= {"reverse": reverse[k], "agreement": agreement[k], "typical": self._typical(value, supports)}
            features[value] = Features(voxels=voxels, shown_in=_share_with(value, supports), **more)
        return features

    def _references(self, mine: LabelledCells, supports: Sequence[Support]) -> list[LabelledCells]:
        known = [self._cells(support) for support in supports]
        if len(known) > self._options.references:
            likenesses = [likeness(mine, cells) for cells in known]
            order = sorted(range(len(known)), key=lambda i: (-likenesses[i], known[i].support.case_id))
            known = [known[i] for i in order[: self._options.references]]
        return known

    def _cells(self, support: Support) -> LabelledCells:
        # The entry holds the support, so that its id cannot be taken over by another.
        found = self._known.get(id(support))
        if found is None:
            found = self._known[id(support)] = LabelledCells(support, self._values)
        return found

    def _typical(self, value: int, supports: Sequence[Support]) -> dict[str, float]:
        """Return the mean shape features of a class in the labelled cases that show it; empty where none does."""
        known = [shapes[value] for support in supports if value in (shapes := self._shapes_of(support))]
        return {name: round(float(np.mean([one[name] for one in known])), _DECIMALS) for name in (known or [{}])[0]}

    def _shapes_of(self, support: Support) -> dict[int, dict[str, float]]:
        # As in `_cells`, the entry holds the support.
        if id(support) not in self._shapes:
            masks = {value: support.label_zyx == value for value in self._values}
            found = {value: shape_features(mask_zyx) for value, mask_zyx in masks.items() if mask_zyx.any()}
            self._shapes[id(support)] = support, found
        return self._shapes[id(support)][1]

    def _compare(self, source: LabelledCells, target: LabelledCells) -> CellDice:
        """Label slices of ``target`` from ``source`` and compare them with the target's own label."""
        dice = CellDice(len(self._values))
        for n in target.checked(self._values, self._options.slices_of(len(target.embeddings))):
            prob_chw = relabel(source, target, n)
            if prob_chw is not None:
                dice.add(prob_chw, target.halves(n))
        return dice


def _as_support(query: Query, label_zyx: np.ndarray) -> Support:
    return Support(
        case_id=query.case_id,
        frames=query.frames,
        embeddings=query.embeddings,
        label_zyx=label_zyx,
        geometry=query.geometry,
    )


def _share_with(value: int, supports: Sequence[Support]) -> float:
    shown = [bool((support.label_zyx == value).any()) for support in supports]
    return round(sum(shown) / len(shown), _DECIMALS) if shown else 0.0
