"""Strategy guided: support memories give a first mask, and the first mask guides a second pass.

Shape letters: N slices, F features of a slice, K classes, S model size, h w a quarter of it, H W a slice in voxels.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.leave_one_out import (
    DiceTable,
    best_choices,
    patients_by_case,
    places_of_patient,
    scans_of,
    several_patients,
)
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.option_checks import at_least, one_of, within
from nnunet_sam2.labelling.prompting.adapt import TrainingOptions
from nnunet_sam2.labelling.prompting.redraw import rows_json
from nnunet_sam2.labelling.prompting.support_slices import Found, SupportSlices
from nnunet_sam2.labelling.slice_check import SliceDice, check_slices
from nnunet_sam2.labelling.strategies.guided.lora import train_lora
from nnunet_sam2.labelling.strategies.guided.passes import (
    FIRST,
    SECOND,
    GuidedPasses,
    Remembered,
    SliceAnswer,
    label_slice,
    masks_at_model_size,
)
from nnunet_sam2.labelling.strategies.transfer.memory import slice_descriptors
from nnunet_sam2.planes import resize
from nnunet_sam2.progress import track
from nnunet_sam2.sam2.lora import require_peft
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support

_MEAN = "mean"
_SHARES = {FIRST: 0.0, _MEAN: 0.5, SECOND: 1.0}
"""How far a class goes from its first mask to its second, by the name of the choice."""

_CHECKED_CASES = 8
_LEAST_GAIN = 0.002
_SURE = 0.8
"""Mean probability over its own mask from which on a labelled slice is remembered."""
_KEPT_ADAPTATIONS = 2


@dataclass(frozen=True, kw_only=True)
class GuidedOptions:
    """Say what is remembered, how the first mask guides the second, and whether the encoder is adapted."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "supports_per_slice": 4,
            "least_presence": 0.0,
            "previous_slices": 16,
            "order": "forward",
            "threshold": 0.6224593,
            "padding": 0.0,
            "gate_floor": 0.0,
            "second_pass": "always",
            "lora_rank": 16,
        }
    }
    """``paper``: SAM2-SGP as it is described for volumes, LoRA included."""

    supports_per_slice: int = 4
    """Support slices that a query slice is compared with memory of, the most similar ones."""
    temperature: float = 0.05
    """Of the softmax that turns similarities into votes on whether a class is there; small: the best one decides."""
    least_presence: float = 0.25
    """Part of the vote that the found slices showing a class must have for it to be asked for."""
    previous_slices: int = 2
    """Slices of the query, labelled just before, that join the memory of the supports."""
    order: str = "outward"
    """``outward``: from the slice that resembles the supports most to both ends; ``forward``: from the first one."""
    threshold: float = 0.5
    """Probability from which on a pixel belongs to the first mask's box."""
    padding: float = 0.05
    """How far the box reaches beyond the first mask on each side, as a part of the box's own side."""
    gate_floor: float = 0.1
    """What the gate lets through where the first mask is sure that nothing is; 1 opens it everywhere."""
    second_pass: str = "checked"
    """``checked``: first mask, second or their mean, a class, by what labelled cases say; ``always``; or ``off``."""
    check_slices: int = 24
    """Slices of labelled cases, all together, on which that is checked."""
    lora_rank: int = 0
    """Rank of LoRA on queries and values of the image encoder; 0 leaves the encoder as it is."""
    lora_steps: int = 200
    lora_learning_rate: float = 1e-3
    lora_seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "supports_per_slice", "check_slices")
        at_least(self, 0, "previous_slices", "lora_rank")
        within(self, 1, "least_presence", "threshold", "padding", "gate_floor")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        one_of(self, order=("outward", "forward"), second_pass=("checked", "always", "off"))
        if self.lora_rank:
            self.training()

    def passes(self) -> GuidedPasses:
        """Return how the first mask prompts the second."""
        return GuidedPasses(threshold=self.threshold, padding=self.padding, gate_floor=self.gate_floor)

    def training(self) -> TrainingOptions:
        """Return how LoRA is trained."""
        return TrainingOptions(steps=self.lora_steps, learning_rate=self.lora_learning_rate, seed=self.lora_seed)


class Guided:
    """Label each slice by support memories, then again guided by what came out (SAM2-SGP).

    The most similar support slices are remembered with their masks; SAM 2's memory attention and its decoder, without
    any prompt, give the first mask of each class. Its box and its logits prompt a second pass over the same features,
    in which the decoder's tokens read the image in proportion to the first mask (`sam2.gate`). Labelled slices of the
    query join the memory. Different from the released code: supports are found by rank, not drawn; masks enter memory
    as masks, not as logits of 0 and 1; the gate has an effect; an empty first mask asks for nothing; slices without
    the class are labelled too. LoRA, where asked for, learns from both masks, and never from a case that is labelled
    with it.
    """

    name: ClassVar[str] = "guided"
    needs_memory: ClassVar[bool] = True

    def __init__(self, options: GuidedOptions | None = None) -> None:
        self._options = options or GuidedOptions()
        self._rows: dict[str, dict[str, DiceTable]] = {}
        self._patients: dict[str, str] = {}
        self._library: tuple[tuple[Any, ...], SupportSlices] | None = None
        self._adaptations: OrderedDict[tuple[Any, ...], _Adapted] = OrderedDict()

    @property
    def options(self) -> GuidedOptions:
        """Return the options."""
        return self._options

    def check(self, case_id: str, slices: int) -> None:
        """Refuse LoRA where `peft` is not installed; see `Limits`."""
        if self._options.lora_rank:
            require_peft()

    def prepare(
        self, supports: Sequence[Support], class_values: tuple[int, ...], backend: Sam2Backend
    ) -> dict[str, Any]:
        """Check on labelled cases, each patient left out in turn, which of the two masks to take; see `Prepares`.

        The encoder is not adapted for the check: it would have to be once for each case.
        """
        self._rows, self._patients = {}, patients_by_case(supports)
        if self._options.second_pass == "checked" and several_patients(supports):
            library = self._library_of(supports, class_values)
            chosen = np.linspace(0, len(supports) - 1, min(_CHECKED_CASES, len(supports))).round().astype(int)
            checked = list(dict.fromkeys(chosen.tolist()))
            for s in track(checked, what="checking the second pass", total=len(checked)):
                self._rows[supports[s].case_id] = self._check(s, library, len(checked), backend)
        return {"second_pass_check": rows_json(self._rows)}

    def members(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> Iterator[Member]:
        """Yield the one member; see `Strategy.members`. Nothing is drawn from ``rng``.

        Raises `InputError` where no support shows any class at model size.
        """
        if not supports:
            raise InputError(f"case {query.case_id} has no support to remember")
        adapted = self._adapted(supports, class_values, backend)
        if adapted is not None:
            backend, supports = adapted.backend, adapted.supports
            query = dataclasses.replace(query, embeddings=backend.embed(query.frames))
        library = self._library_of(supports, class_values)
        absent = [value for k, value in enumerate(class_values) if not library.showing(k)]
        if len(absent) == len(class_values):
            raise InputError(
                f"no slice of the supports ({', '.join(s.case_id for s in supports)}) shows a class at model size "
                f"{query.frames.size}; give other supports or a larger --image-size"
            )
        choices = self._choices(class_values, scans_of(query, self._patients))
        share_k11 = torch.tensor([_SHARES[choices[value]] for value in class_values])[:, None, None]
        prob_kzyx, records = self._walk(query, library, share_k11, backend)
        yield Member(
            name=self.name,
            prob_kzyx=prob_kzyx,
            record={
                "supports": [support.case_id for support in supports],
                "absent_in_all_supports": absent,
                "choice": {str(value): choice for value, choice in choices.items()},
                "adaptation": adapted.record if adapted is not None else None,
                "slices": records,
            },
        )

    def _walk(
        self, query: Query, library: SupportSlices, share_k11: torch.Tensor, backend: Sam2Backend
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Label all slices; probabilities (K, Z, Y, X) and a record of each slice."""
        options, frames = self._options, query.frames
        found = [
            library.find(descriptor_f, options.supports_per_slice, options.temperature)
            for descriptor_f in slice_descriptors(query.embeddings)
        ]
        start = 0 if options.order == "forward" else _most_alike(found, library)
        prob_knhw = np.zeros((len(share_k11), len(frames), *frames.slice_shape_hw), np.float32)
        records: dict[int, dict[str, Any]] = {}
        remembered: dict[int, Remembered] = {}
        reach = options.previous_slices
        for n, step in [*((n, 1) for n in range(start, len(found))), *((n, -1) for n in range(start - 1, -1, -1))]:
            answer = label_slice(
                backend,
                query,
                n,
                library,
                found[n],
                options.passes(),
                least_presence=options.least_presence,
                previous=[remembered[i] for i in range(n - step * reach, n, step) if i in remembered],
            )
            prob_khw = _mixed(answer, share_k11)
            prob_knhw[:, n] = resize(prob_khw.numpy(), frames.slice_shape_hw)
            records[n] = answer.record
            if reach:
                remembered[n] = Remembered(index=n, masks_kss=masks_at_model_size(prob_khw, frames.size, _SURE))
                # The way back begins beside the start.
                kept = {*range(n - reach, n + reach + 1), *range(start, start + reach)}
                remembered = {i: slice_ for i, slice_ in remembered.items() if i in kept}
        return frames.slices_back(prob_knhw), [records[n] for n in sorted(records)]

    def _check(self, s: int, library: SupportSlices, cases: int, backend: Sam2Backend) -> dict[str, DiceTable]:
        """Compare the masks on slices of a support, remembered without its patient and without its other slices."""
        support, options = library.supports[s], self._options
        query, values, own = support.as_query(), library.class_values, places_of_patient(library.supports, s)
        descriptors_nf = slice_descriptors(support.embeddings)
        scores = {name: SliceDice(values) for name in _SHARES}
        for n in check_slices(support, values, max(3, options.check_slices // cases)):
            found = library.find(descriptors_nf[n], options.supports_per_slice, options.temperature, without=own)
            answer = label_slice(
                backend, query, n, library, found, options.passes(), least_presence=options.least_presence
            )
            for name, share in _SHARES.items():
                prob_khw = _mixed(answer, torch.full((len(values), 1, 1), share))
                background_hw = 1.0 - prob_khw.amax(dim=0, keepdim=True)
                scores[name].add(support, n, torch.cat([background_hw, prob_khw]))
        return {name: score.table() for name, score in scores.items()}

    def _choices(self, class_values: tuple[int, ...], own: Set[str]) -> dict[int, str]:
        if self._options.second_pass == "off":
            return dict.fromkeys(class_values, FIRST)
        return best_choices(self._rows, class_values, default=SECOND, without=own, least_gain=_LEAST_GAIN)

    def _adapted(
        self, supports: Sequence[Support], class_values: tuple[int, ...], backend: Sam2Backend
    ) -> _Adapted | None:
        """Train LoRA on these supports, or find it trained; a query is never among them."""
        if not self._options.lora_rank:
            return None
        key = _key(supports, class_values)
        if key not in self._adaptations:
            adapted, record = train_lora(
                backend,
                supports,
                class_values,
                self._options.passes(),
                self._options.training(),
                rank=self._options.lora_rank,
            )
            encoded = [dataclasses.replace(s, embeddings=adapted.embed(s.frames)) for s in supports]
            self._adaptations[key] = _Adapted(
                of=tuple(supports), backend=adapted, supports=encoded, record={**record, "model": adapted.spec.name}
            )
            while len(self._adaptations) > _KEPT_ADAPTATIONS:
                self._adaptations.popitem(last=False)
        return self._adaptations[key]

    def _library_of(self, supports: Sequence[Support], class_values: tuple[int, ...]) -> SupportSlices:
        # The library holds the supports, so that their ids cannot be taken over by others.
        key = _key(supports, class_values)
        if self._library is None or self._library[0] != key:
            self._library = (key, SupportSlices(supports, class_values))
        return self._library[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Adapted:
    """Hold an adapted back end and the supports as it encodes them."""

    of: tuple[Support, ...]
    """The supports that it was trained on; held, so that their ids stay theirs."""
    backend: Sam2Backend
    supports: list[Support]
    record: dict[str, Any]


def _most_alike(found: Sequence[Sequence[Found]], library: SupportSlices) -> int:
    """Return the query slice that resembles a support slice with a class most; the first where none does."""
    shown = range(len(library.class_values))
    likeness = [
        max((f.similarity for f in at if any(library.shows(f.support, f.index, k) for k in shown)), default=-np.inf)
        for at in found
    ]
    return int(np.argmax(likeness))


def _mixed(answer: SliceAnswer, share_k11: torch.Tensor) -> torch.Tensor:
    return answer.first_khw + share_k11 * (answer.second_khw - answer.first_khw)


def _key(supports: Sequence[Support], class_values: tuple[int, ...]) -> tuple[Any, ...]:
    return (class_values, *(id(support) for support in supports))
