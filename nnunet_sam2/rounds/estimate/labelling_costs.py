"""From SAM 2's probe to what labelling a case of a given size costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_sam2.cohort.cohort import Case
from nnunet_sam2.geometry import IDENTITY_DIRECTION, Geometry
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.rounds.estimate.costs import Cost
from nnunet_sam2.rounds.estimate.sizes import cells, voxels, walked_axes, walked_slices
from nnunet_sam2.support.showing import shown_geometry

_EMBEDDINGS_IN_MEMORY = 2**30
_MAPS_PER_CASE = 4
"""Probability maps of all classes that a case's fusion holds at once, float32."""


@dataclass(frozen=True, kw_only=True)
class LabellingCosts:
    """Answer what SAM 2's part of a run costs, from the probe's ``answer``."""

    answer: dict[str, Any]
    slice_axis: int
    several_views: bool
    direction: tuple[float, ...] = IDENTITY_DIRECTION
    """The direction next to which all cases are brought (`cohort_direction`); ``slice_axis`` counts in it."""
    supports: Sequence[Case]
    classes: int
    memory_entries: int | None
    """Support locations that the strategy compares a slice with at most, however many there are; None: with all."""

    @property
    def start(self) -> Cost:
        """Return what it takes until SAM 2 is loaded."""
        return Cost.of(self.answer, "start")

    def encode(self, case: Case) -> Cost:
        """Return what reading a case and encoding its slices costs, the first time."""
        return Cost.of(self.answer, "encoding") * (self._own_slices(case) / self.answer["encoded_slices"])

    def load(self, cases: Sequence[Case]) -> Cost:
        """Return what it costs to find kept embeddings again."""
        slices = sum(self._own_slices(case) for case in cases)
        return Cost.of(self.answer, "reading") * (slices / self.answer["support_slices"])

    def prepare(self, supports: Sequence[Case], *, again: bool = False) -> Cost:
        """Return what a strategy's checks on the supports cost.

        They look at a number of slices that does not grow with the supports; what grows is what they encode of them.
        ``again`` leaves that out: it is kept.
        """
        measured = Cost.of(self.answer, "prepare")
        slice_cost = Cost.of(self.answer, "encoding") * (1.0 / self.answer["encoded_slices"])
        if again:
            return measured.less(slice_cost * self._looked_at(self.answer["support_slices"]))
        more = sum(self._own_slices(case) for case in supports) - self.answer["support_slices"]
        return measured + slice_cost * max(0.0, self._looked_at(more))

    def label(self, case: Case, supports: Sequence[Case]) -> Cost:
        """Return what the members of a case and their fusion cost."""
        ratio = self._walked(self._shown(case).shape_zyx) / self._probed_slices
        return (Cost.of(self.answer, "labels") + self._per_support_slice * self._more_slices(supports)) * ratio

    def judge(self, case: Case) -> Cost:
        """Return what looking at a finished label costs: some slices, a bounded number."""
        looked_at = QualityOptions().slices_of
        probed = sum(looked_at(shape[self.slice_axis]) for shape in self.answer["query_shapes_zyx"])
        return Cost.of(self.answer, "quality") * (looked_at(self._own_slices(case)) / probed)

    def write(self, case: Case) -> Cost:
        """Return what a case's label, confidence and probabilities cost to write and hash."""
        return Cost.of(self.answer, "writing") * (voxels(case) / self.answer["written_voxels"])

    def refine_prepare(self, supports: int) -> Cost:
        """Return what the check of a student's prompts on the validation cases costs."""
        return Cost.of(self.answer, "refine_prepare") * max(1, supports)

    def refine(self, case: Case) -> Cost:
        """Return what labelling a case from a student's prompts costs."""
        probed = self._walked(self.answer["refined_shape_zyx"])
        return Cost.of(self.answer, "refine") * (self._walked(self._shown(case).shape_zyx) / probed)

    def memory_bytes(self, cases: Sequence[Case], channels: int) -> int:
        """Return the most memory of the labelling process: its embeddings, the supports, and the largest case."""
        a_slice = self.answer["encoded_bytes"] / self.answer["encoded_slices"]
        kept = min(_EMBEDDINGS_IN_MEMORY, a_slice * sum(self._own_slices(case) for case in cases))
        supports = sum(voxels(case) for case in self.supports) * (4 * channels + 1)
        largest = max(voxels(case) for case in cases) * (self.classes + 1) * 4 * _MAPS_PER_CASE
        return int(self.answer["memory_bytes"] + kept + supports + largest)

    def _own_slices(self, case: Case) -> int:
        return int(self._shown(case).shape_zyx[self.slice_axis])

    def _shown(self, case: Case) -> Geometry:
        return shown_geometry(case.geometry, self.direction)

    def _walked(self, shape_zyx: Sequence[int]) -> int:
        axes = walked_axes(self._shown(self.supports[0]), self.slice_axis, several_views=self.several_views)
        return walked_slices(shape_zyx, axes)

    def _looked_at(self, slices: float) -> float:
        views = len(walked_axes(self._shown(self.supports[0]), self.slice_axis, several_views=self.several_views))
        return slices * max(views, 2 if self.several_views else 1)

    @property
    def _probed_slices(self) -> int:
        return sum(self._walked(shape) for shape in self.answer["query_shapes_zyx"])

    @property
    def _per_support_slice(self) -> Cost:
        """Return what the probed labels cost more for each support slice."""
        slices = self.answer["support_slices"] - self.answer["fewer_slices"]
        if not slices:
            return Cost()
        growth = Cost.of(self.answer, "labels_again").less(Cost.of(self.answer, "labels_from_fewer"))
        return growth * (1.0 / slices)

    def _more_slices(self, supports: Sequence[Case]) -> int:
        """Count the support slices that a query slice is compared with beyond those of the probe."""
        slices = sum(self._own_slices(case) for case in supports)
        if self.memory_entries is not None:
            slices = min(slices, self.memory_entries // cells(self.answer["image_size"]))
        return max(0, slices - self.answer["support_slices"])
