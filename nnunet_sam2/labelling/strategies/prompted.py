"""The student's prediction prompts SAM 2's decoder, and is kept where the decoder would not improve it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.fusion import as_probability, normalised
from nnunet_sam2.labelling.leave_one_out import DiceTable, best_choices, patients_by_case, scans_of
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.prompting.decoding import PromptKinds, decode_map
from nnunet_sam2.labelling.prompting.redraw import Redraw, check_redraws, redraw_volume, rows_json
from nnunet_sam2.labelling.slice_check import check_slices
from nnunet_sam2.progress import track
from nnunet_sam2.sam2.protocol import Embeddings, Sam2Backend
from nnunet_sam2.support.cases import Query, Support

_STUDENT = "student"
_KINDS = {
    "box+points": PromptKinds(box=True, points=True, mask=False),
    "box+mask": PromptKinds(box=True, points=False, mask=True),
    "box+points+mask": PromptKinds(box=True, points=True, mask=True),
}


@dataclass(frozen=True, kw_only=True)
class PromptedOptions:
    """Say how far the decoder is tried and trusted."""

    check_slices: int = 12
    """Slices of each labelled case on which the kinds of prompt are tried."""
    least_gain: float = 0.002
    """Mean Dice that a class must gain on labelled cases before the decoder redraws it."""

    def __post_init__(self) -> None:
        if self.check_slices < 1:
            raise ValueError(f"check_slices={self.check_slices} must be at least 1")
        if not self.least_gain >= 0:
            raise ValueError(f"least_gain={self.least_gain} must not be negative")


class Prompted:
    """Redraw the student's prediction with SAM 2's decoder, class by class where that helps on labelled cases.

    Prompts of a slice are each class's box, its deepest point with the other classes' as negative ones, and the
    student's logits (after Keuth et al., ADSMI 2024, and SAM2-SGP; a mask prompt alone was ruinous in trials, so a box
    is always among them). Which of them, and whether to average with the student's map, is chosen on the supports that
    come with a student's prediction; without such, the student's map stays as it is.
    """

    name: ClassVar[str] = "prompted"
    needs_memory: ClassVar[bool] = False
    uses_student: ClassVar[bool] = True

    def __init__(self, options: PromptedOptions | None = None) -> None:
        self._options = options or PromptedOptions()
        self._rows: dict[str, dict[str, DiceTable]] = {}
        self._patients: dict[str, str] = {}

    @property
    def options(self) -> PromptedOptions:
        """Return the options."""
        return self._options

    def prepare(
        self, supports: Sequence[Support], class_values: tuple[int, ...], backend: Sam2Backend
    ) -> dict[str, Any]:
        """Try every kind of prompt on the supports that the student has predicted; see `Prepares`."""
        self._patients = patients_by_case(supports)
        checked = [support for support in supports if support.student_prob_czyx is not None]
        self._rows = {
            support.case_id: self._check(support, class_values, backend)
            for support in track(checked, what="checking prompts", total=len(checked))
        }
        return {"prompt_check": rows_json(self._rows)}

    def members(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> Iterator[Member]:
        """Yield the one member; see `Strategy.members`. Nothing is drawn from ``rng``."""
        if query.student_prob_czyx is None:
            raise InputError(f"case {query.case_id} has no prediction of the student to prompt with")
        prob_czyx = normalised(as_probability(query.student_prob_czyx))
        choices = best_choices(
            self._rows,
            class_values,
            default=_STUDENT,
            without=scans_of(query, self._patients),
            least_gain=self._options.least_gain,
        )
        redraws = _redraws(backend, query.embeddings)
        prob_czyx = redraw_volume(query.frames, prob_czyx, [choices[value] for value in class_values], redraws)
        yield Member(
            name=self.name,
            prob_kzyx=prob_czyx[1:],
            background_zyx=prob_czyx[0],
            record={
                "choice": {str(value): choice for value, choice in choices.items()},
                "prompts": {name: asdict(kinds) for name, kinds in _KINDS.items()},
            },
        )

    def _check(self, support: Support, class_values: tuple[int, ...], backend: Sam2Backend) -> dict[str, DiceTable]:
        if support.student_prob_czyx is None:
            raise ValueError(f"support {support.case_id} comes without a prediction of the student")
        return check_redraws(
            support,
            normalised(as_probability(support.student_prob_czyx)),
            class_values,
            _redraws(backend, support.embeddings),
            check_slices(support, class_values, self._options.check_slices),
            default=_STUDENT,
        )


def _redraws(backend: Sam2Backend, embeddings: Embeddings) -> dict[str, Redraw]:
    def by(kinds: PromptKinds) -> Redraw:
        return lambda n, prob_chw: decode_map(backend, embeddings, n, prob_chw, kinds)

    return {name: by(kinds) for name, kinds in _KINDS.items()}
