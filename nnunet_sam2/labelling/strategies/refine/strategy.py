"""Strategy refine: a prediction's best component prompts SAM 2 twice, first by its box, then by points and logits.

Shape letters: C channels (background first), K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.fusion import as_probability, normalised
from nnunet_sam2.labelling.leave_one_out import (
    DiceTable,
    best_choices,
    held_out,
    of_other_patients,
    patients_by_case,
    scans_of,
)
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.option_checks import at_least, one_of, within
from nnunet_sam2.labelling.prompting.decoding import put_in
from nnunet_sam2.labelling.prompting.prompts import ELEMENTS, MORPHOLOGIES
from nnunet_sam2.labelling.prompting.redraw import check_redraws, redraw_volume, rows_json
from nnunet_sam2.labelling.slice_check import check_slices
from nnunet_sam2.labelling.strategies.refine.passes import PassOptions, TwoPasses, kept_components
from nnunet_sam2.labelling.strategies.transfer.strategy import Transfer, TransferOptions
from nnunet_sam2.progress import track
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support

_BEFORE, _TWO_PASSES = "before", "two passes"
_LEAST_SHOWING = 0.5
"""Part of the supports that must show a class before it is taken for missed, and not for absent."""
_CHECKED_WITHOUT_STUDENT = 4
"""Labelled cases that transfer labels for the check: each costs as much as a query."""


@dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """Say how prompts are drawn from the prediction, and how far SAM 2's answers are trusted."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "accept": "always",
            "component": "confident",
            "least_share": 0.0,
            "padding": 0.0,
            "morphology": "dilate",
            "element": "square",
            "radius": 8.0,
            "bring_back": False,
        }
    }
    """``paper``: the prompts that Keuth et al. (ADSMI 2024) report as their best."""

    accept: str = "checked"
    """``checked``: classes that gain by it on labelled cases are redrawn, none where nothing can be checked;
    ``always``: all are, as published."""
    component: str = "auto"
    """Which 3D components of a class prompt: ``confident``, the one with the highest mean probability; ``all``;
    ``auto``: the confident one of classes that are one piece in the labelled cases, all of others."""
    least_share: float = 0.1
    """Part of the largest component's voxels that a component must have to be kept: single voxels are easily sure."""
    padding: float = 0.05
    """How far a box reaches beyond its piece on each side, as a part of the box's own side."""
    morphology: str = "none"
    """What is done to a piece before it prompts: none, dilate, erode, open or close."""
    element: str = "square"
    """Of the morphology: ``square`` or ``disk``."""
    radius: float = 0.0
    """Of the morphology's element, in pixels at model size."""
    keep_box: bool = False
    """Give the box in the second pass as well; as published it is left out there."""
    bring_back: bool = True
    """Take classes that the student misses in the whole case from the supports."""
    check_slices: int = 12
    """Slices of each labelled case on which the passes are tried."""
    least_gain: float = 0.002
    """Mean Dice that a class must gain on labelled cases before it is redrawn."""

    def __post_init__(self) -> None:
        one_of(
            self,
            accept=("checked", "always"),
            component=("auto", "confident", "all"),
            morphology=MORPHOLOGIES,
            element=ELEMENTS,
        )
        within(self, 1, "least_share", "padding")
        within(self, np.inf, "radius", "least_gain")
        at_least(self, 1, "check_slices")
        if (self.morphology == "none") != (self.radius == 0):
            raise ValueError(
                f"morphology={self.morphology} with radius={self.radius:g} would have no effect; set both or none"
            )

    def passes(self) -> PassOptions:
        """Return what the two passes need to know."""
        return PassOptions(
            padding=self.padding,
            morphology=self.morphology,
            element=self.element,
            radius=self.radius,
            keep_box=self.keep_box,
        )


class Refine:
    """Redraw a prediction by two passes of SAM 2's decoder (Keuth et al., "SAM Carries the Burden", ADSMI 2024).

    For each class, the component with the highest mean probability gives a padded box for the first pass; its deepest
    point that no other class covers, the other classes' such points and the first answer's logits prompt the second.
    The prediction is the student's; without a student (a first round, or labelling without one) it is what `Transfer`
    makes of the supports, and the record says so. Classes that the student misses come back from the supports. Each
    class is redrawn only where labelled cases gain by it, unless the published rule is asked for.
    """

    name: ClassVar[str] = "refine"
    needs_memory: ClassVar[bool] = False
    uses_student: ClassVar[bool] = True
    student_optional: ClassVar[bool] = True

    def __init__(self, options: RefineOptions | None = None) -> None:
        self._options = options or RefineOptions()
        self._supports: Sequence[Support] = ()
        self._patients: dict[str, str] = {}
        self._student_rows: dict[str, dict[str, DiceTable]] = {}
        self._transfer_rows: dict[str, dict[str, DiceTable]] | None = None
        self._transfer: Transfer | None = None

    @property
    def options(self) -> RefineOptions:
        """Return the options."""
        return self._options

    def prepare(
        self, supports: Sequence[Support], class_values: tuple[int, ...], backend: Sam2Backend
    ) -> dict[str, Any]:
        """Try the passes on the supports that the student has predicted; see `Prepares`."""
        self._supports, self._patients = supports, patients_by_case(supports)
        self._transfer, self._transfer_rows = None, None
        self._student_rows = {}
        if self._options.accept == "checked":
            checked = [support for support in supports if support.student_prob_czyx is not None]
            for support in track(checked, what="checking prompts", total=len(checked)):
                prob_czyx = normalised(as_probability(np.asarray(support.student_prob_czyx)))
                self._student_rows[support.case_id] = self._check(support, prob_czyx, supports, class_values, backend)
        return {"prompt_check": rows_json(self._student_rows)}

    def members(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> Iterator[Member]:
        """Yield the one member; see `Strategy.members`. Nothing is drawn from ``rng``."""
        record: dict[str, Any] = {"supports": [support.case_id for support in supports]}
        if query.student_prob_czyx is not None:
            prob_czyx = normalised(as_probability(query.student_prob_czyx))
            record["start"] = "student"
            prob_czyx, record["brought_back"] = self._bring_back(query, prob_czyx, supports, class_values, backend, rng)
            rows = self._student_rows
        elif supports:
            prob_czyx = self._from_supports(query, supports, class_values, backend, rng)
            record["start"] = "transfer"
            rows = self._rows_of_transfer(supports, class_values, backend, rng)
        else:
            raise InputError(
                f"case {query.case_id} has neither a prediction of the student nor a support to start from; "
                f"give --student FOLDER or --supports"
            )
        own = scans_of(query, self._patients or patients_by_case(supports))
        choices = self._choices(rows, class_values, own)
        passes, record["components"] = self._passes(query, prob_czyx, supports, class_values, backend)
        prob_czyx = redraw_volume(
            query.frames, prob_czyx, [choices[value] for value in class_values], {_TWO_PASSES: passes}
        )
        record["choice"] = {str(value): choice for value, choice in choices.items()}
        record["unchecked"] = self._options.accept == "checked" and not set(rows) - own
        record["prompts"] = passes.explained
        yield Member(name=self.name, prob_kzyx=prob_czyx[1:], background_zyx=prob_czyx[0], record=record)

    def _choices(
        self, rows: Mapping[str, Mapping[str, DiceTable]], class_values: tuple[int, ...], own: Set[str]
    ) -> dict[int, str]:
        if self._options.accept == "always":
            return dict.fromkeys(class_values, _TWO_PASSES)
        return best_choices(rows, class_values, default=_BEFORE, without=own, least_gain=self._options.least_gain)

    def _passes(
        self,
        query: Query,
        prob_czyx: np.ndarray,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
    ) -> tuple[TwoPasses, dict[str, Any]]:
        options = self._options
        confident_k = [options.component == "confident"] * len(class_values)
        if options.component == "auto":
            single = single_component_classes([support.label_zyx for support in supports], class_values)
            confident_k = [value in single for value in class_values]
        kept_kzyx, records = kept_components(prob_czyx, confident_k, least_share=options.least_share)
        passes = TwoPasses(
            backend=backend,
            embeddings=query.embeddings,
            frames=query.frames,
            kept_kzyx=kept_kzyx,
            class_values=class_values,
            options=options.passes(),
        )
        return passes, {str(value): record for value, record in zip(class_values, records, strict=True)}

    def _check(
        self,
        support: Support,
        prob_czyx: np.ndarray,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
    ) -> dict[str, DiceTable]:
        others = of_other_patients(support, supports)
        passes, _ = self._passes(support.as_query(), prob_czyx, others, class_values, backend)
        slices = check_slices(support, class_values, self._options.check_slices)
        return check_redraws(support, prob_czyx, class_values, {_TWO_PASSES: passes}, slices, default=_BEFORE)

    def _from_supports(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Label a case by transfer, (C, Z, Y, X)."""
        if self._transfer is None:
            self._transfer = Transfer(TransferOptions(decoder="off"))
            self._transfer.prepare(self._supports or supports, class_values, backend)
        (member,) = self._transfer.members(query, supports, class_values, backend, rng)
        if member.background_zyx is None:
            raise ValueError("transfer gives the background a probability of its own")
        return normalised(np.concatenate([member.background_zyx[None], member.prob_kzyx]))

    def _rows_of_transfer(
        self,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> dict[str, dict[str, DiceTable]]:
        """Check the passes on labelled cases that transfer labelled from other patients, once for all queries."""
        if self._options.accept != "checked":
            return {}
        if self._transfer_rows is None:
            self._transfer_rows = {}
            pairs = list(held_out(self._supports or supports))[:_CHECKED_WITHOUT_STUDENT]
            for support, others in track(pairs, what="checking prompts", total=len(pairs)):
                prob_czyx = self._from_supports(support.as_query(), others, class_values, backend, rng)
                self._transfer_rows[support.case_id] = self._check(support, prob_czyx, others, class_values, backend)
        return self._transfer_rows

    def _bring_back(
        self,
        query: Query,
        prob_czyx: np.ndarray,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, list[int]]:
        """Put in what transfer finds of classes that the student misses and most supports show; and say which."""
        if not (self._options.bring_back and supports):
            return prob_czyx, []
        found = np.unique(prob_czyx.argmax(axis=0))
        missed = [
            k
            for k, value in enumerate(class_values)
            if k + 1 not in found and np.mean([(s.label_zyx == value).any() for s in supports]) >= _LEAST_SHOWING
        ]
        if not missed:
            return prob_czyx, []
        transferred_czyx = self._from_supports(query, supports, class_values, backend, rng)
        seen = np.unique(transferred_czyx.argmax(axis=0))
        back = {k: torch.from_numpy(transferred_czyx[k + 1]) for k in missed if k + 1 in seen}
        merged = put_in(torch.from_numpy(prob_czyx), back, dict.fromkeys(back, 1.0))
        return merged.numpy(), [class_values[k] for k in back]
