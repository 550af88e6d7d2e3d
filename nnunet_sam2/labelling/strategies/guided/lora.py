"""Strategy guided's adaptation of the image encoder: LoRA, trained on labelled cases alone by both of its passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.leave_one_out import places_of_patient
from nnunet_sam2.labelling.prompting.adapt import TrainingOptions, mask_loss, target_like, train
from nnunet_sam2.labelling.prompting.support_slices import SupportSlices
from nnunet_sam2.labelling.strategies.guided.passes import GuidedPasses, second_prompts
from nnunet_sam2.sam2.adaptation import TrainableSam2
from nnunet_sam2.sam2.lora import add_lora, merged_weights
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.augment import AugmentOptions, augment_image, augment_masks, draw_augmentation
from nnunet_sam2.support.cases import Support

_CANDIDATES = 4
"""Support slices, the most similar ones, from which one is drawn to be remembered in a step."""
_EPOCHS = 100
"""SAM2-SGP's epochs, over which the first mask's part of the loss falls; they are spread over the steps asked for."""


def train_lora(
    backend: Sam2Backend,
    supports: Sequence[Support],
    class_values: tuple[int, ...],
    passes: GuidedPasses,
    options: TrainingOptions,
    *,
    rank: int,
) -> tuple[Sam2Backend, dict[str, Any]]:
    """Adapt the encoder to labelled cases by what strategy guided does with it; the adapted back end and a record.

    A step takes a labelled slice, varied, as query and another one that shows the same class as its memory, runs both
    passes and learns from both masks: (1 - w) times the second's loss plus w times the first's, w = 0.5 * 0.95^epoch.
    (SAM2-SGP's code cut the first mask's term off, which besides had no gradient; and it trained neck, memory and
    decoders along.) Raises `InputError` where no support shows any class.
    """
    library = SupportSlices(supports, class_values)
    shown = {k: slices for k in range(len(class_values)) if (slices := library.showing(k))}
    if not shown:
        raise InputError("LoRA has nothing to learn from: no support shows a class at model size")
    sam = TrainableSam2(backend)
    parameters = add_lora(sam.model, rank=rank, seed=options.seed)
    rng = np.random.default_rng([options.seed, 1])

    def step(number: int) -> torch.Tensor:
        k = int(rng.choice(list(shown)))
        s, n = shown[k][int(rng.integers(len(shown[k])))]
        first, second = lora_losses(sam, library, (s, n), draw_partner(library, s, n, k, rng), k, passes, rng)
        weight = 0.5 * 0.95 ** (_EPOCHS * number / options.steps)
        return first if second is None else (1.0 - weight) * second + weight * first

    record = train(backend, parameters, step, options, what="adapting the encoder (LoRA)")
    adapted = backend.adapted(merged_weights(sam.model), name="lora")
    return adapted, {"kind": "lora", "rank": rank, "cases": [s.case_id for s in supports], **record}


def lora_losses(
    sam: TrainableSam2,
    library: SupportSlices,
    query: tuple[int, int],
    memory: tuple[int, int],
    k: int,
    passes: GuidedPasses,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the losses of the first and of the second mask; the latter is None where the first mask is empty."""
    variant = draw_augmentation(AugmentOptions(), rng)
    image_3ss = augment_image(library.supports[query[0]].frames.image(query[1]), variant)
    target_ss = augment_masks(library.mask(*query, k)[None], variant)[0]
    known_3ss = library.supports[memory[0]].frames.image(memory[1])
    embeddings = sam.encode(np.stack([image_3ss, known_3ss]))
    features_kchw = sam.recall((embeddings, 0), [(embeddings, 1)], library.mask(*memory, k)[None, None])
    first = sam.decode(embeddings, 0, features_kchw=features_kchw, several=True)
    logits_khw = first.low_res_logits_khw
    target_khw = target_like(target_ss, logits_khw)
    first_loss = mask_loss(logits_khw, target_khw)
    prompts = second_prompts(logits_khw[0], passes, image_3ss.shape[-1])
    if prompts is None:
        return first_loss, None
    second = sam.decode(
        embeddings,
        0,
        features_kchw=features_kchw,
        boxes_k4=prompts.boxes_k4,
        mask_logits_khw=prompts.mask_logits_khw,
        gate_khw=prompts.gate_khw,
    )
    return first_loss, mask_loss(second.low_res_logits_khw, target_khw, positive_weight=2.0)


def draw_partner(library: SupportSlices, s: int, n: int, k: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the slice that a training query remembers: one like it, of another patient where one shows the class."""
    slices = library.showing(k)
    own = places_of_patient(library.supports, s)
    others = [slice_ for slice_ in slices if slice_[0] not in own] or [slice_ for slice_ in slices if slice_ != (s, n)]
    # One labelled image alone is remembered itself; the query is a variant of it.
    ranked = library.nearest((s, n), others or [(s, n)])[:_CANDIDATES]
    return ranked[int(rng.integers(len(ranked)))]
