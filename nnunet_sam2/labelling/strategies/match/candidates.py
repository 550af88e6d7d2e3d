"""What a query slice may be matched with: support slices as they are, and seeded variants of them.

Shape letters: K classes, S model size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nnunet_sam2.frames import MASK_THRESHOLD, Frames
from nnunet_sam2.planes import resize
from nnunet_sam2.sam2.protocol import Embeddings, Sam2Backend
from nnunet_sam2.support.augment import Augmentation, AugmentOptions, augment_image, augment_masks, draw_augmentation
from nnunet_sam2.support.cases import Support


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Name a support slice, as it is or in one of its variants."""

    support: int
    """Position in the list of supports."""
    index: int
    """Slice of the support."""
    variant: int | None = None


class Candidates:
    """Offer image, masks and embeddings of candidates; a variant is the same whenever it is asked for."""

    def __init__(
        self,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        augment: AugmentOptions,
        seed: int,
        backend: Sam2Backend,
    ) -> None:
        self.supports = list(supports)
        self.class_values = class_values
        self._augment = augment
        self._seed = seed
        self._backend = backend
        self._areas: dict[int, np.ndarray] = {}

    def image(self, candidate: Candidate) -> np.ndarray:
        """Return the image, (3, S, S)."""
        image_3ss = self.supports[candidate.support].frames.image(candidate.index)
        return image_3ss if candidate.variant is None else augment_image(image_3ss, self._drawn(candidate))

    def masks(self, candidate: Candidate) -> np.ndarray:
        """Return the masks of all classes, (K, S, S) bool."""
        support = self.supports[candidate.support]
        label_hw = support.frames.slices_first(support.label_zyx)[candidate.index]
        planes_khw = np.stack([label_hw == value for value in self.class_values]).astype(np.float32)
        masks_kss = resize(planes_khw, (support.frames.size,) * 2) >= MASK_THRESHOLD
        return masks_kss if candidate.variant is None else augment_masks(masks_kss, self._drawn(candidate))

    def frame(self, candidate: Candidate) -> tuple[Embeddings, int]:
        """Return embeddings and the place of the candidate's image among them."""
        if candidate.variant is None:
            return self.supports[candidate.support].embeddings, candidate.index
        return self._backend.embed(Frames.from_images(self.image(candidate)[None])), 0

    def areas(self, support: int) -> np.ndarray:
        """Return how many pixels at model size each class covers on each of a support's M slices, (M, K)."""
        if support not in self._areas:
            case = self.supports[support]
            self._areas[support] = np.stack(
                [case.frames.masks_to_model(case.label_zyx == v).sum(axis=(1, 2)) for v in self.class_values], axis=1
            )
        return self._areas[support]

    def describe(self, candidate: Candidate) -> dict[str, Any]:
        """Return a candidate as a JSON value; classes that are on the slice but vanish at model size are named."""
        support = self.supports[candidate.support]
        values = np.unique(support.frames.slices_first(support.label_zyx)[candidate.index])
        sent_k = np.asarray(self.masks(candidate).any(axis=(1, 2)))
        vanished = [v for v, sent in zip(self.class_values, sent_k, strict=True) if v in values and not sent]
        record: dict[str, Any] = {"support": support.case_id, "slice": candidate.index, "variant": None}
        if candidate.variant is not None:
            record["variant"] = {"number": candidate.variant, **asdict(self._drawn(candidate))}
        return {**record, **({"vanished_classes": vanished} if vanished else {})}

    def _drawn(self, candidate: Candidate) -> Augmentation:
        case_number = int.from_bytes(self.supports[candidate.support].case_id.encode(), "big")
        seeds = [self._seed, case_number, candidate.index, candidate.variant or 0]
        return draw_augmentation(self._augment, np.random.default_rng(seeds))
