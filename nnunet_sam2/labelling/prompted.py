"""The student's prediction prompts SAM 2's decoder, and is kept where the decoder would not improve it.

Shape letters: N slices, C channels (background first), K classes, h w pixels of a map at a quarter of the model size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import resize
from nnunet_sam2.labelling.decoding import PromptKinds, decode_map, put_in
from nnunet_sam2.labelling.fusion import as_probability, normalised
from nnunet_sam2.labelling.leave_one_out import DiceTable, best_choices
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.slice_check import SliceDice, check_slices
from nnunet_sam2.progress import track
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support

_STUDENT = "student"
_KINDS = {
    "box+points": PromptKinds(box=True, points=True, mask=False),
    "box+mask": PromptKinds(box=True, points=False, mask=True),
    "box+points+mask": PromptKinds(box=True, points=True, mask=True),
}
_SHARES = {"": 1.0, " mean": 0.5}
"""A choice is a kind of prompt, taken whole or averaged with the student's map."""


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

    @property
    def options(self) -> PromptedOptions:
        """Return the options."""
        return self._options

    def prepare(
        self, supports: Sequence[Support], class_values: tuple[int, ...], backend: Sam2Backend
    ) -> dict[str, Any]:
        """Try every kind of prompt on the supports that the student has predicted; see `Prepares`."""
        checked = [support for support in supports if support.student_prob_czyx is not None]
        self._rows = {
            support.case_id: self._check(support, class_values, backend)
            for support in track(checked, what="checking prompts", total=len(checked))
        }
        return {
            "prompt_check": {
                case_id: {name: {str(v): d for v, d in table.items()} for name, table in row.items()}
                for case_id, row in self._rows.items()
            }
        }

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
            self._rows, class_values, default=_STUDENT, without=query.case_id, least_gain=self._options.least_gain
        )
        if set(choices.values()) != {_STUDENT}:
            prob_czyx = self._redraw(query, prob_czyx, [choices[value] for value in class_values], backend)
        yield Member(
            name=self.name,
            prob_kzyx=prob_czyx[1:],
            background_zyx=prob_czyx[0],
            record={
                "choice": {str(value): choice for value, choice in choices.items()},
                "prompts": {name: asdict(kinds) for name, kinds in _KINDS.items()},
            },
        )

    def _redraw(self, query: Query, prob_czyx: np.ndarray, choice_k: Sequence[str], backend: Sam2Backend) -> np.ndarray:
        """Redraw at the decoder's resolution, and add only the change to the student's own map.

        So a voxel that the decoder leaves alone keeps the student's value, unblurred by the way there and back.
        """
        frames = query.frames

        def changes() -> Iterator[np.ndarray]:
            for n in range(len(frames)):
                before_chw = _at_model(frames.slices_first, prob_czyx, n, backend.spec.image_size // 4)
                after_chw = before_chw
                for name, kinds in _KINDS.items():
                    shares = {
                        k: share
                        for suffix, share in _SHARES.items()
                        for k, choice in enumerate(choice_k)
                        if choice == name + suffix
                    }
                    if shares:
                        decoded = decode_map(backend, query.embeddings, n, before_chw, kinds)
                        after_chw = put_in(after_chw, decoded, shares)
                yield (after_chw - before_chw).numpy()

        return normalised((prob_czyx + frames.to_volume(changes())).clip(0.0, 1.0))

    def _check(self, support: Support, class_values: tuple[int, ...], backend: Sam2Backend) -> dict[str, DiceTable]:
        if support.student_prob_czyx is None:
            raise ValueError(f"support {support.case_id} comes without a prediction of the student")
        prob_czyx = normalised(as_probability(support.student_prob_czyx))
        names = [_STUDENT, *(name + suffix for name in _KINDS for suffix in _SHARES)]
        scores = {name: SliceDice(class_values) for name in names}
        every = range(len(class_values))
        for n in check_slices(support, class_values, self._options.check_slices):
            before_chw = _at_model(support.frames.slices_first, prob_czyx, n, backend.spec.image_size // 4)
            scores[_STUDENT].add(support, n, before_chw)
            for name, kinds in _KINDS.items():
                decoded = decode_map(backend, support.embeddings, n, before_chw, kinds)
                for suffix, share in _SHARES.items():
                    scores[name + suffix].add(support, n, put_in(before_chw, decoded, dict.fromkeys(every, share)))
        return {name: score.table() for name, score in scores.items()}


def _at_model(slices_first: Any, prob_czyx: np.ndarray, n: int, side: int) -> torch.Tensor:
    slice_chw = np.stack([slices_first(prob_zyx)[n] for prob_zyx in prob_czyx])
    return torch.from_numpy(resize(slice_chw, (side, side)))
