"""Strategy chain: the images of a cohort as one pseudo-video, and a mask decoder that trains itself on what it finds.

Shape letters: N images of the chain, K classes, S model size, h w a quarter of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.leave_one_out import (
    DiceTable,
    best_choices,
    of_other_patients,
    patients_by_case,
    scans_of,
    several_patients,
)
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.option_checks import at_least, one_of, within
from nnunet_sam2.labelling.prompting.adapt import TrainingOptions
from nnunet_sam2.labelling.prompting.redraw import rows_json
from nnunet_sam2.labelling.strategies.chain.answers import CHAIN, TRAINED, ChainState, answer, check_ways
from nnunet_sam2.labelling.strategies.chain.images import THRESHOLDS
from nnunet_sam2.labelling.strategies.chain.labels import labels_from_points, labels_from_supports
from nnunet_sam2.labelling.strategies.chain.training import chain_examples, train_decoder
from nnunet_sam2.labelling.strategies.chain.video import ImageChain
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support

_CHECKED_CASES = 16
_CHECKED_CHAINS = 2
"""Labelled cases that are checked where supports prompt: each wants a chain of its own, prompted by other patients."""
_LEAST_GAIN = 0.002
_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class ChainOptions:
    """Say how images are prompted, chained and learnt from."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"seeds": "points", "anchors": 1, "threshold": "otsu", "self_training": "always"}
    }
    """``paper``: as far as the method is known; its numbers (rounds, losses, thresholds) are published nowhere."""

    seeds: str = "auto"
    """``points``: one automatic point an image, no label is used, one foreground; ``supports``: human masks of labelled
    images prompt the chain, all classes; ``auto``: points for single images with one class, else supports."""
    threshold: str = "triangle"
    """What parts subject and background: ``triangle``, ``otsu`` or ``li``."""
    laterality: bool = True
    """Mirror single images whose subject lies on the right; slices of volumes are never mirrored."""
    artefacts: bool = True
    """Paint over what is bright in a single image and not the subject."""
    propagate: bool = True
    """Carry masks along the chain by SAM 2's video memory; without, every image is prompted by its own point alone."""
    anchors: int = 3
    """Images that prompt the chain with the masks of their points."""
    self_training: str = "checked"
    """``checked``: the way to the mask (thresholded subject, point, chain, trained decoder) that labelled images
    favour, the trained decoder where nothing can be checked; ``always``: the trained decoder; ``off``: the chain."""
    training_images: int = 64
    """Images, spread over the chain, that the decoder learns from."""
    variants: int = 1
    """Varied copies of each of them."""
    least_trust: float = 0.9
    """Agreement (Dice) of mask and thresholded subject that an image must have to be learnt from; where supports
    prompt, the mask's mean probability."""
    steps: int = 100
    learning_rate: float = 1e-4
    training_seed: int = 0

    def __post_init__(self) -> None:
        one_of(
            self,
            seeds=("auto", "points", "supports"),
            threshold=THRESHOLDS,
            self_training=("checked", "always", "off"),
        )
        at_least(self, 1, "anchors", "training_images")
        at_least(self, 0, "variants")
        within(self, 1, "least_trust")
        if self.seeds == "supports" and not self.propagate:
            raise ValueError("seeds=supports carries masks from image to image and cannot do without propagate")
        self.training()

    def training(self) -> TrainingOptions:
        """Return how the decoder is trained."""
        return TrainingOptions(steps=self.steps, learning_rate=self.learning_rate, seed=self.training_seed)


class Chain:
    """Label single images as frames of one video (after the SAM 2 self-training for mammograms, ICIP 2025).

    Every image is mirrored to one side, cleared of artefacts and prompted by one automatic point. Ordered by
    appearance, the images make a pseudo-video, through which SAM 2's memory carries the masks of a few; the masks train
    the mask decoder alone, which then answers each image's point. No label is needed for one foreground, such as the
    breast; with several classes, or volumes, labelled images prompt the chain instead. The image of a case may be part
    of the chain that labels it, its human label never is.
    """

    name: ClassVar[str] = "chain"
    without_memory: ClassVar[str] = "--set propagate=no"
    """How to use the strategy with a checkpoint that holds no video memory."""

    def __init__(self, options: ChainOptions | None = None) -> None:
        self._options = options or ChainOptions()
        self._chain: ImageChain | None = None
        self._prepared = False
        self._states: OrderedDict[tuple[int, ...], ChainState] = OrderedDict()
        self._rows: dict[str, dict[str, DiceTable]] = {}
        self._patients: dict[str, str] = {}

    @property
    def options(self) -> ChainOptions:
        """Return the options."""
        return self._options

    @property
    def needs_memory(self) -> bool:
        """Say whether masks are carried from image to image."""
        return self._options.propagate

    def without_other_classes(self) -> Chain:
        """Return a chain that labelled images prompt: a point finds one foreground, whatever class is asked for."""
        if self._options.seeds == "points" or not self._options.propagate:
            raise InputError(
                "strategy chain finds one foreground by points, the cohort has several classes; let labelled images "
                "prompt (--set seeds=supports), which cannot do without propagate"
            )
        return Chain(replace(self._options, seeds="supports"))

    def prepare_cohort(
        self,
        cases: Sequence[Query],
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
    ) -> dict[str, Any]:
        """Chain all images; see `PreparesCohort`. Labels are looked at to choose the way to the mask, if at all."""
        chain = self._survey(cases, backend)
        self._prepared, self._rows, self._patients = True, {}, patients_by_case(supports)
        by_points = self._by_points(chain, class_values)
        if self._options.self_training == "checked" and (by_points or several_patients(supports)):
            count = _CHECKED_CASES if by_points else _CHECKED_CHAINS
            chosen = np.linspace(0, len(supports) - 1, min(count, len(supports))).round().astype(int)
            for s in dict.fromkeys(chosen.tolist()):
                others = of_other_patients(supports[s], supports)
                state = self._state(chain, () if by_points else others, class_values, backend)
                self._rows[supports[s].case_id] = check_ways(supports[s], chain, state, class_values, backend)
        return {
            "seeds": "points" if by_points else "supports",
            "images": len(chain),
            "check": rows_json(self._rows),
        }

    def members(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> Iterator[Member]:
        """Yield the one member; see `Strategy.members`. Nothing is drawn from ``rng``.

        Without a cohort (`prepare_cohort`), the chain is made of the supports and the query.
        """
        chain = self._chain
        if chain is None or not self._prepared:
            chain = self._survey([*(support.as_query() for support in supports), query], backend)
        by_points = self._by_points(chain, class_values)
        state = self._state(chain, () if by_points else supports, class_values, backend)
        choices = self._choices(state, class_values, scans_of(query, self._patients))
        records: list[dict[str, Any]] = []

        def maps() -> Iterator[torch.Tensor]:
            for n in range(len(query.frames)):
                answers, record = answer(query, n, chain, state, class_values, backend, [*choices.values()])
                records.append(record)
                yield torch.stack([answers[choices[value]][k] for k, value in enumerate(class_values)])

        yield Member(
            name=self.name,
            prob_kzyx=query.frames.to_volume(maps()),
            record={
                "seeds": "points" if by_points else "supports",
                "supports": [] if by_points else [support.case_id for support in supports],
                "images": len(chain),
                "choice": {str(value): choice for value, choice in choices.items()},
                **state.record,
                "slices": records,
            },
        )

    def _by_points(self, chain: ImageChain, class_values: tuple[int, ...]) -> bool:
        kind = self._options.seeds
        if kind == "auto":
            kind = "points" if chain.single and len(class_values) == 1 else "supports"
        if kind == "points" and len(class_values) != 1:
            raise InputError(
                f"strategy chain finds one foreground by points, the cohort has classes "
                f"{', '.join(map(str, class_values))}; let labelled images prompt (--set seeds=supports) or give a "
                f"cohort of one class"
            )
        if kind == "supports" and not self._options.propagate:
            raise InputError(
                "strategy chain carries the masks of several classes, or of volumes, from labelled images; that "
                "cannot do without propagate"
            )
        return kind == "points"

    # -- the chain ----------------------------------------------------------------------------------------------------

    def _survey(self, cases: Sequence[Query], backend: Sam2Backend) -> ImageChain:
        options = self._options
        self._chain = ImageChain(
            cases,
            backend,
            threshold=options.threshold,
            laterality=options.laterality,
            artefacts=options.artefacts,
        )
        self._states.clear()
        return self._chain

    def _state(
        self,
        chain: ImageChain,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
    ) -> ChainState:
        """Find the chain's masks with these prompts and train on them, or find it done."""
        key = tuple(id(support) for support in supports)
        if key not in self._states:
            by_points = self._by_points(chain, class_values)
            if by_points:
                labels = labels_from_points(
                    backend, chain.images, anchors=self._options.anchors, propagate=self._options.propagate
                )
            else:
                labels = labels_from_supports(backend, chain.images, supports, class_values)
            adapted, training = None, None
            if self._options.self_training != "off":
                examples = chain_examples(
                    chain,
                    labels,
                    backend,
                    by_points=by_points,
                    least_trust=self._options.least_trust,
                    images=self._options.training_images,
                    variants=self._options.variants,
                    seed=self._options.training_seed,
                )
                if examples or self._options.self_training == "always":
                    adapted, training = train_decoder(backend, examples, self._options.training())
            self._states[key] = ChainState(
                supports=tuple(supports),
                labels=labels,
                by_points=by_points,
                backend=adapted,
                record={**labels.record(chain.images), "self_training": training},
            )
            while len(self._states) > _KEPT:
                self._states.popitem(last=False)
        return self._states[key]

    def _choices(self, state: ChainState, class_values: tuple[int, ...], own: Set[str]) -> dict[int, str]:
        """Choose the way to the mask, a class; where nothing could be checked, as published."""
        checked = self._options.self_training == "checked"
        # A point says little of an organ among others: from supports, the carried masks stand until they are beaten.
        trained = state.backend is not None and (state.by_points or not checked)
        return best_choices(
            self._rows,
            class_values,
            default=TRAINED if trained else CHAIN,
            without=own,
            least_gain=_LEAST_GAIN,
        )
