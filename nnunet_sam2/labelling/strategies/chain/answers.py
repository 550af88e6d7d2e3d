"""One image of strategy chain, answered in several ways, and what each is worth on labelled images.

Shape letters: K classes, h w a quarter of the model size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nnunet_sam2.labelling.leave_one_out import DiceTable
from nnunet_sam2.labelling.prompting.prompts import seed_prompts, seeds, voxel_places
from nnunet_sam2.labelling.slice_check import SliceDice, check_slices
from nnunet_sam2.labelling.strategies.chain.images import cleaned
from nnunet_sam2.labelling.strategies.chain.labels import ChainLabels, carried_to
from nnunet_sam2.labelling.strategies.chain.video import ChainImage, ImageChain, masks_from_points
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support

SUBJECT, POINT, CHAIN, TRAINED = "subject", "point", "chain", "trained"
"""Ways to a mask: the thresholded subject (the classical answer, for comparison), the image's own point alone, the
masks of the chain, the trained decoder's answer to the point."""

_CHECKED_SLICES = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class ChainState:
    """Hold what a chain found with one set of prompts, and the decoder that learnt from it."""

    supports: tuple[Support, ...]
    """The labelled cases that prompted it; held, so that their ids stay theirs."""
    labels: ChainLabels
    by_points: bool
    backend: Sam2Backend | None
    """With the trained decoder; None where nothing was trained."""
    record: dict[str, Any]


def answer(
    query: Query,
    n: int,
    chain: ImageChain,
    state: ChainState,
    class_values: tuple[int, ...],
    backend: Sam2Backend,
    ways: Sequence[str],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Find an image's masks in the asked ways, (K, h, w), as the image was; and a record of the prompts.

    The trained decoder is prompted by the image's automatic point; where supports prompt the chain, by the deepest
    point of each class's carried mask that no other class covers.
    """
    place = chain.place(query, n)
    image = chain.see(query, n, backend) if place is None else chain.images[place]
    record = {"slice": n, **image.record, "place": place}
    if place is None:
        chain_khw = _outside(image, chain, state, backend)
    else:
        chain_khw = state.labels.probs[place].float()
        record["trust"] = round(state.labels.trust[place], 3)
        record["chain_mask"] = state.labels.source[place]
        record["neighbours"] = [list(chain.images[i].key) for i in (place - 1, place + 1) if 0 <= i < len(chain)]
    answers = {CHAIN: chain_khw}
    if POINT in ways and state.by_points:
        answers[POINT] = masks_from_points(backend, image)
    if SUBJECT in ways and state.by_points:
        answers[SUBJECT] = torch.from_numpy(image.subject_hw)[None].float()
    if TRAINED in ways and state.backend is not None:
        shown, points = _points(image, chain_khw, by_points=state.by_points)
        if not state.by_points:
            record["class_points"] = {
                str(class_values[k]): voxel_places(_as_was(xy_p2[0], image, query), query.frames)
                for k, (xy_p2, _) in zip(shown, points, strict=True)
            }
        answers[TRAINED] = torch.zeros_like(chain_khw)
        if shown:
            decoded = state.backend.decode(image.embeddings, image.frame, points=points)
            answers[TRAINED][shown] = torch.sigmoid(decoded.low_res_logits_khw.float()).cpu()
    if image.flipped:
        answers = {way: prob_khw.flip(-1) for way, prob_khw in answers.items()}
    return {way: answers[way] for way in ways if way in answers}, record


def check_ways(
    support: Support, chain: ImageChain, state: ChainState, class_values: tuple[int, ...], backend: Sam2Backend
) -> dict[str, DiceTable]:
    """Return each way's Dice on a labelled case that the chain was not prompted with."""
    ways = [CHAIN]
    ways += [SUBJECT, POINT] if state.by_points else []
    ways += [TRAINED] if state.backend is not None else []
    scores = {way: SliceDice(class_values) for way in ways}
    query = support.as_query()
    for n in check_slices(support, class_values, _CHECKED_SLICES):
        answers, _ = answer(query, n, chain, state, class_values, backend, ways)
        for way, prob_khw in answers.items():
            background_hw = 1.0 - prob_khw.amax(dim=0, keepdim=True)
            scores[way].add(support, n, torch.cat([background_hw, prob_khw]))
    return {way: score.table() for way, score in scores.items()}


def _points(
    image: ChainImage, chain_khw: torch.Tensor, *, by_points: bool
) -> tuple[list[int], list[tuple[np.ndarray, np.ndarray]]]:
    """Return which classes to ask for and their points."""
    if by_points:
        return [0], [(image.point_xy[None], np.array([True]))]
    masks = [cleaned(mask_hw) for mask_hw in (chain_khw > 0.5).numpy()]
    shown = [k for k, mask_hw in enumerate(masks) if mask_hw.any()]
    return shown, seed_prompts(seeds([masks[k] for k in shown]), shown, np.full(2, 4.0, np.float32))


def _outside(image: ChainImage, chain: ImageChain, state: ChainState, backend: Sam2Backend) -> torch.Tensor:
    """Find the masks of an image that is not of the chain: carried from its prompted images, or by its point."""
    if state.labels.prompts_kss:
        return carried_to(backend, image, chain.images, state.labels.prompts_kss)
    return masks_from_points(backend, image)


def _as_was(xy: np.ndarray, image: ChainImage, query: Query) -> np.ndarray:
    return np.array([query.frames.size - xy[0], xy[1]]) if image.flipped else xy
