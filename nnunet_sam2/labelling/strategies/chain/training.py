"""Strategy chain's self-training: the mask decoder alone learns from the masks that were found without labels.

Shape letters: P points, S model size, h w a quarter of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.labelling.prompting.adapt import TrainingOptions, mask_loss, train
from nnunet_sam2.labelling.prompting.prompts import seed_prompts, seeds
from nnunet_sam2.labelling.strategies.chain.images import cleaned
from nnunet_sam2.labelling.strategies.chain.labels import ChainLabels
from nnunet_sam2.labelling.strategies.chain.video import ImageChain
from nnunet_sam2.sam2.adaptation import TrainableSam2
from nnunet_sam2.sam2.protocol import Embeddings, Sam2Backend
from nnunet_sam2.support.augment import AugmentOptions, augment_image, augment_masks, draw_augmentation

_CORE_DEPTH = 0.5
"""Part of a mask's greatest depth from which on a pixel may serve as its point."""
_BATCH = 4
_FEWEST = 4
"""Images that are learnt from even where their trust is lower than asked for."""
_LEAST_TRUST = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """Hold one mask that the decoder is to answer one point with."""

    embeddings: Embeddings
    frame: int
    places_p2: np.ndarray
    """Where the positive point may be, (x, y) in pixels at model size; one is drawn for each step."""
    negatives_p2: np.ndarray
    """Points of other objects, (P, 2); may be none."""
    mask_hw: np.ndarray
    """The mask to answer, bool, at a quarter of the model size."""

    def prompt(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw the points: (xy_p2, positive_p)."""
        positive = self.places_p2[int(rng.integers(len(self.places_p2)))]
        points = np.concatenate([positive[None], self.negatives_p2]).astype(np.float32)
        return points, np.arange(len(points)) == 0


def core_places(mask_hw: np.ndarray, size: int) -> np.ndarray:
    """Return the places around a mask's deepest point that are at least half as deep, (P, 2) as (x, y) at ``size``."""
    from scipy.ndimage import distance_transform_edt

    depth_hw = distance_transform_edt(np.pad(mask_hw, 1))[1:-1, 1:-1]
    rows, columns = np.nonzero(depth_hw >= max(_CORE_DEPTH * float(depth_hw.max()), 1e-6))
    return np.stack([columns + 0.5, rows + 0.5], axis=1).astype(np.float32) * (size / mask_hw.shape[0])


def image_examples(
    embeddings: Embeddings, frame: int, masks_khw: np.ndarray, subject_hw: np.ndarray | None, size: int
) -> list[Example]:
    """Make an example of every mask of an image that is not empty.

    Its point lies deep in what no other mask covers, those of the other masks are negative ones. With ``subject_hw``
    there is one mask, and its point lies around the subject's automatic one as far as that is in the mask.
    """
    shown = [mask_hw for mask_hw in masks_khw if mask_hw.any()]
    scale = np.full(2, size / masks_khw.shape[-1], np.float32)
    placed = seeds(shown)
    found = []
    for i, ((points_p2, positive_p), mask_hw) in enumerate(
        zip(seed_prompts(placed, range(len(shown)), scale), shown, strict=True)
    ):
        others = [other for j, other in enumerate(shown) if j != i]
        own_hw = mask_hw & ~np.logical_or.reduce(others) if others and placed[i].exclusive else mask_hw
        places_p2 = core_places(own_hw, size)
        if subject_hw is not None and subject_hw.any():
            around_p2 = core_places(subject_hw, size)
            columns, rows = (around_p2 / scale).astype(int).T
            inside_p = mask_hw[rows, columns]
            places_p2 = around_p2[inside_p] if inside_p.any() else places_p2
        found.append(
            Example(
                embeddings=embeddings,
                frame=frame,
                places_p2=places_p2,
                negatives_p2=points_p2[~positive_p],
                mask_hw=mask_hw,
            )
        )
    return found


def chain_examples(
    chain: ImageChain,
    labels: ChainLabels,
    backend: Sam2Backend,
    *,
    by_points: bool,
    least_trust: float,
    images: int,
    variants: int,
    seed: int,
) -> list[Example]:
    """Make examples of at most ``images`` trusted images, spread over the chain, and of varied copies of each.

    Where fewer than four have ``least_trust``, the four most trusted ones are taken, but none below a half.
    """
    size = backend.spec.image_size
    masks = [np.stack([cleaned(mask_hw) for mask_hw in (prob_khw > 0.5).numpy()]) for prob_khw in labels.probs]
    shown = [place for place, masks_khw in enumerate(masks) if masks_khw.any()]
    best = sorted(shown, key=lambda place: -labels.trust[place])[:_FEWEST]
    lowest = min(least_trust, max(_LEAST_TRUST, min((labels.trust[place] for place in best), default=1.0)))
    trusted = [place for place in shown if labels.trust[place] >= lowest]
    picked = np.linspace(0, len(trusted) - 1, min(len(trusted), images)).round().astype(int)
    examples: list[Example] = []
    for place in (trusted[i] for i in dict.fromkeys(picked.tolist())):
        image = chain.images[place]
        subject_hw = image.subject_hw if by_points else None
        examples += image_examples(image.embeddings, image.frame, masks[place], subject_hw, size)
        for number in range(variants):
            variant = draw_augmentation(AugmentOptions(), np.random.default_rng([seed, place, number]))
            planes = augment_masks(np.concatenate([masks[place], image.subject_hw[None]]), variant)
            frames = Frames.from_images(augment_image(chain.pixels(place), variant)[None])
            examples += image_examples(backend.embed(frames), 0, planes[:-1], planes[-1] if by_points else None, size)
    return examples


def train_decoder(
    backend: Sam2Backend, examples: Sequence[Example], options: TrainingOptions
) -> tuple[Sam2Backend, dict[str, Any]]:
    """Adapt the mask decoder alone to examples; the adapted back end and a record.

    Image encoder and prompt encoder stay, and with them the stored embeddings, so that a step costs a few decoder
    passes. (So do the decoder's two projections of fine features, whose outputs are stored.)
    """
    if not examples:
        raise InputError(
            "the mask decoder has nothing to learn from: no mask could be trusted; try --set self_training=off"
        )
    sam = TrainableSam2(backend)
    parameters = sam.train_decoder_only()
    rng = np.random.default_rng([options.seed, 2])

    def step(number: int) -> torch.Tensor:
        chosen = rng.choice(len(examples), size=min(_BATCH, len(examples)), replace=False)
        losses = []
        for example in (examples[i] for i in chosen.tolist()):
            logits_khw = sam.decode(example.embeddings, example.frame, points=[example.prompt(rng)]).low_res_logits_khw
            target_khw = torch.from_numpy(example.mask_hw).float()[None].to(logits_khw.device)
            losses.append(mask_loss(logits_khw, target_khw))
        return torch.stack(losses).mean()

    record = train(backend, parameters, step, options, what="training the mask decoder")
    adapted = backend.adapted(sam.decoder_weights(), name="decoder")
    return adapted, {"kind": "mask decoder", "examples": len(examples), "model": adapted.spec.name, **record}
