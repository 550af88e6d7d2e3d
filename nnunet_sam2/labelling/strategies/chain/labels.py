"""What a chain of images finds before any training: masks, where they come from, and how far to trust them.

Shape letters: N images of the chain, K objects, S model size, h w a quarter of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.prompting.support_slices import SupportSlices
from nnunet_sam2.labelling.strategies.chain.video import (
    ChainImage,
    carry_all,
    dice,
    masks_from_points,
    prompt_mask,
    spread_best,
)
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Support

POINT, CARRIED, HUMAN = "point", "carried", "human"

_ANCHORS_A_CASE = 8
"""Slices of a labelled volume that prompt, spread over those that show a class."""
_NEAREST_ANCHORS = 4
"""Prompted images, the most similar ones, that an image outside of the chain is shown with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ChainLabels:
    """Hold the masks of every image of a chain."""

    prompts_kss: Mapping[int, np.ndarray]
    """The prompted places with their masks."""
    probs: Sequence[torch.Tensor]
    """Probabilities (K, h, w) of each place, as far as the chain knows."""
    trust: Sequence[float]
    """How far to trust each place's masks, 0 to 1."""
    source: Sequence[str]
    """Where each place's masks come from: ``point``, ``carried`` or ``human``."""

    def record(self, chain: Sequence[ChainImage]) -> dict[str, Any]:
        """Return the prompted images as a JSON value."""
        return {"anchors": [list(chain[place].key) for place in self.prompts_kss]}


def labels_from_points(
    backend: Sam2Backend, chain: Sequence[ChainImage], *, anchors: int, propagate: bool
) -> ChainLabels:
    """Find one foreground without any label: each image by its own point, and by the masks carried along the chain.

    ``anchors`` images, whose masks agree best with their thresholded subjects, prompt the chain. Each image takes the
    one of its two masks that agrees better with its subject, and that agreement (Dice) is its trust: three ways that
    err for different reasons. Without ``propagate`` there is the point's mask alone.
    """

    def agreement(place: int, prob_khw: torch.Tensor) -> float:
        return dice(prob_khw[0].numpy() > 0.5, chain[place].subject_hw)

    probs = [masks_from_points(backend, image).half() for image in chain]
    trust = [agreement(place, prob_khw) for place, prob_khw in enumerate(probs)]
    source = [POINT] * len(chain)
    prompts: dict[int, np.ndarray] = {}
    if propagate:
        size = backend.spec.image_size
        masks = {place: prompt_mask(probs[place][0], size)[None] for place in spread_best(trust, anchors)}
        prompts = {place: mask_kss for place, mask_kss in masks.items() if mask_kss.any()}
    for place, carried_khw in (carry_all(backend, chain, prompts) if prompts else {}).items():
        if (carried := agreement(place, carried_khw)) > trust[place]:
            probs[place], trust[place], source[place] = carried_khw, carried, CARRIED
    return ChainLabels(prompts_kss=prompts, probs=probs, trust=trust, source=source)


def labels_from_supports(
    backend: Sam2Backend, chain: Sequence[ChainImage], supports: Sequence[Support], class_values: tuple[int, ...]
) -> ChainLabels:
    """Carry the human masks of labelled images along the chain, all classes at once.

    A mask is trusted by its mean probability over itself, the human ones wholly. Raises `InputError` where no labelled
    image of the chain shows any class.
    """
    if not supports:
        raise InputError("a chain of several classes needs labelled images to carry masks from; give --supports")
    prompts: dict[int, np.ndarray] = {}
    places = {image.key: place for place, image in enumerate(chain)}
    library = SupportSlices(supports, class_values)
    for s, support in enumerate(supports):
        showing = {n for k in range(len(class_values)) for other, n in library.showing(k) if other == s}
        shown = sorted(n for n in showing if (support.case_id, n) in places)
        for i in np.unique(np.linspace(0, len(shown) - 1, min(len(shown), _ANCHORS_A_CASE)).round().astype(int)):
            place = places[support.case_id, shown[i]]
            masks_kss = np.stack([library.mask(s, shown[i], k) for k in range(len(class_values))])
            prompts[place] = np.ascontiguousarray(masks_kss[..., ::-1]) if chain[place].flipped else masks_kss
    if not prompts:
        raise InputError(
            f"no image of the supports ({', '.join(s.case_id for s in supports)}) shows a class at "
            f"model size {backend.spec.image_size}; give other supports or a larger --image-size"
        )
    prompts = {place: prompts[place] for place in sorted(prompts)}
    side = backend.spec.image_size // 4
    probs = [torch.zeros(len(class_values), side, side, dtype=torch.float16) for _ in chain]
    trust, source = [0.0] * len(chain), [CARRIED] * len(chain)
    for place, carried_khw in carry_all(backend, chain, prompts).items():
        probs[place] = carried_khw
        inside = carried_khw.float()[carried_khw > 0.5]
        trust[place] = float(inside.mean()) if len(inside) else 0.0
    for place, masks_kss in prompts.items():
        probs[place] = torch.from_numpy(masks_kss[:, 2::4, 2::4].copy()).half()
        trust[place], source[place] = 1.0, HUMAN
    return ChainLabels(prompts_kss=prompts, probs=probs, trust=trust, source=source)


def carried_to(
    backend: Sam2Backend, image: ChainImage, chain: Sequence[ChainImage], prompts_kss: Mapping[int, np.ndarray]
) -> torch.Tensor:
    """Carry the masks of the most similar prompted images to one that is not of the chain, (K, h, w)."""
    likeness = {place: float(chain[place].descriptor_f @ image.descriptor_f) for place in prompts_kss}
    nearest = sorted(likeness, key=lambda place: likeness[place])[-_NEAREST_ANCHORS:]
    clip = [*(chain[place] for place in nearest), image]
    carried = carry_all(backend, clip, {i: prompts_kss[place] for i, place in enumerate(nearest)})
    return carried[len(nearest)].float()
