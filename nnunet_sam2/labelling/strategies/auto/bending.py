"""Supports bent onto a query by what a first look has found there, and where their cells lie then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nnunet_sam2.labelling.member import PseudoLabel
from nnunet_sam2.labelling.strategies.auto.alignment import Alignment, Part
from nnunet_sam2.labelling.strategies.auto.registration import bend, coarse_features
from nnunet_sam2.labelling.strategies.auto.views import PlacesAlong
from nnunet_sam2.labelling.strategies.auto.zoom import Box, CloseUps
from nnunet_sam2.support.cases import Query, Support


@dataclass(frozen=True, kw_only=True, eq=False)
class Aligned:
    """Hold supports with an alignment each to one query, and tell where parts of them lie in parts of it."""

    supports: Sequence[Support]
    alignments: Sequence[Alignment]
    query: Query

    def bent(self, seen: PseudoLabel, class_values: Sequence[int]) -> Aligned:
        """Return the supports bent onto what was seen of the classes in the query."""
        mine = coarse_features(self.query.frames, list(seen.prob_czyx[1:]))
        bent = [
            bend(start, coarse_features(support.frames, [support.label_zyx == v for v in class_values]), mine)
            for support, start in zip(self.supports, self.alignments, strict=True)
        ]
        return Aligned(supports=self.supports, alignments=bent, query=self.query)

    def whole(self) -> PlacesAlong:
        """Return where the supports' cells lie in the query, whole volumes both."""
        return _places(self.supports, self.alignments, [Part()] * len(self.supports), Part())

    def within(self, parts: Sequence[Support], cut: CloseUps, box: Box) -> PlacesAlong:
        """Return where the cells of ``parts``, cut from some of the supports by ``cut``, lie in a box of the query."""
        by_case = {support.case_id: (support, a) for support, a in zip(self.supports, self.alignments, strict=True)}
        known = [by_case[part.case_id] for part in parts]
        bounds = [
            Part.of(cut.box_of(part), support.geometry.shape_zyx)
            for part, (support, _) in zip(parts, known, strict=True)
        ]
        return _places(parts, [a for _, a in known], bounds, Part.of(box, self.query.geometry.shape_zyx))


def _places(
    parts: Sequence[Support], alignments: Sequence[Alignment], bounds: Sequence[Part], within: Part
) -> PlacesAlong:
    def along(axis: int) -> list[torch.Tensor]:
        return [
            alignment.cells(
                bound,
                within,
                slice_axis=axis,
                slices=part.geometry.shape_zyx[axis],
                grid=int(part.embeddings.top(0).shape[-1]),
            )
            for part, alignment, bound in zip(parts, alignments, bounds, strict=True)
        ]

    return along
