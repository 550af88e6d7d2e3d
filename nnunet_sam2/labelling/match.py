"""Match each query slice to its most similar support slice, and carry the masks over in a two-frame clip.

Shape letters: N slices, K classes, S model size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.sam2.protocol import Embeddings, Sam2Backend
from nnunet_sam2.support.augment import Augmentation, AugmentOptions, augment_image, augment_masks, draw_augmentation
from nnunet_sam2.support.cases import Query, Support
from nnunet_sam2.support.matching import Metric, make_metric, squared_distances


@dataclass(frozen=True, kw_only=True)
class MatchOptions:
    """Say how support slices are varied and matched."""

    metric: str = "embedding"
    """``embedding``: cosine of SAM 2's embeddings; ``lpips``: LPIPS with AlexNet, needs ``lpips_weights``."""
    lpips_weights: str | None = None
    """File of AlexNet's weights in torchvision's naming (.safetensors, .pth)."""
    augmentations: int = 2
    """Variants drawn of each support slice that is short-listed; 0 matches the slices as they are."""
    shortlist: int = 4
    """How many support slices, the most similar ones as they are, compete with their variants."""
    matches: int = 1
    """How many of the best matches each give a member; 1 is the method as published."""
    augmentation_seed: int = 0
    """Seed of the variants. A support slice has the same ones for every query, so that each is encoded once."""
    rotation_degrees: float = 15.0
    scale: float = 0.15
    shear_degrees: float = 5.0
    translation: float = 0.05
    brightness: float = 0.1
    contrast: float = 0.2

    def __post_init__(self) -> None:
        if self.metric not in ("embedding", "lpips"):
            raise ValueError(f"metric={self.metric}: choose embedding or lpips")
        if self.augmentations < 0:
            raise ValueError(f"augmentations={self.augmentations} must not be negative")
        for name in ("shortlist", "matches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self.augment_options()

    def augment_options(self) -> AugmentOptions:
        """Return the bounds of the variants."""
        return AugmentOptions(
            rotation_degrees=self.rotation_degrees,
            scale=self.scale,
            shear_degrees=self.shear_degrees,
            translation=self.translation,
            brightness=self.brightness,
            contrast=self.contrast,
        )


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """Name a support slice, as it is or in one of its variants."""

    support: int
    index: int
    variant: int | None
    distance: float


class Match:
    """Label each query slice from the support slice that looks most like it (Zu et al., arXiv 2503.04826).

    Support slices and seeded variants of them (one affine map for image and mask, colours for the image alone) are
    compared with the query slice; the most similar one and the query slice make a two-frame clip, and SAM 2's memory
    carries the masks of all classes over. Slices do not see each other. Different from the paper: there the support is
    one slice and queries show the organ; here supports are volumes, and a slice without any class may win, which says
    that the query slice shows none either. Variants are only made of a short list of slices.
    """

    name: ClassVar[str] = "match"
    needs_memory: ClassVar[bool] = True

    def __init__(self, options: MatchOptions | None = None) -> None:
        self._options = options or MatchOptions()
        self._metric: Metric | None = None
        self._kept: tuple[tuple[Any, ...], _Library] | None = None

    @property
    def options(self) -> MatchOptions:
        """Return the options."""
        return self._options

    def members(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> Iterator[Member]:
        """Yield one member a rank of match; see `Strategy.members`. ``rng`` is not used: variants have their seed."""
        if not supports:
            raise InputError(f"case {query.case_id} has no support to match")
        if self._metric is None:
            self._metric = make_metric(self._options.metric, self._options.lpips_weights)
        key = (class_values, *(id(support) for support in supports))
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, _Library(supports, class_values, self._metric, self._options, backend))
        library = self._kept[1]
        indices = range(len(query.frames))
        vectors_nf = self._metric.describe(query.frames, query.embeddings, indices)
        ranked = [library.rank(vector_f) for vector_f in vectors_nf]
        for rank in range(min(self._options.matches, *(len(found) for found in ranked))):
            chosen = [found[rank] for found in ranked]

            def maps(chosen: list[_Candidate] = chosen) -> Iterator[np.ndarray]:
                for n in indices:
                    yield library.carry_over(chosen[n], query, n)

            yield Member(
                name=f"match:{rank}",
                prob_kzyx=query.frames.to_volume(maps()),
                record={"rank": rank, "metric": self._metric.name, "slices": [library.describe(c) for c in chosen]},
            )


class _Library:
    """Hold the support slices of one set of supports, and their variants once they were asked for."""

    def __init__(
        self,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        metric: Metric,
        options: MatchOptions,
        backend: Sam2Backend,
    ) -> None:
        self._supports = list(supports)
        self._class_values = class_values
        self._metric = metric
        self._options = options
        self._backend = backend
        self._origin = [(s, n) for s, support in enumerate(self._supports) for n in range(len(support.frames))]
        self._vectors_nf = np.concatenate(
            [metric.describe(s.frames, s.embeddings, range(len(s.frames))) for s in self._supports]
        )
        self._variant_vectors: dict[tuple[int, int], np.ndarray] = {}
        self._masks: dict[int, list[np.ndarray]] = {}

    def rank(self, vector_f: np.ndarray) -> list[_Candidate]:
        """Return short-listed slices and their variants, the most similar first; ties in the supports' order."""
        distance_n = squared_distances(vector_f, self._vectors_nf)
        shortlist = np.argsort(distance_n, kind="stable")[: max(self._options.shortlist, self._options.matches)]
        found = []
        for number in shortlist:
            s, n = self._origin[number]
            found.append(_Candidate(support=s, index=n, variant=None, distance=float(distance_n[number])))
            if self._options.augmentations:
                for v, distance in enumerate(squared_distances(vector_f, self._vectors_of_variants(s, n))):
                    found.append(_Candidate(support=s, index=n, variant=v, distance=float(distance)))
        return sorted(found, key=lambda c: c.distance)

    def carry_over(self, candidate: _Candidate, query: Query, n: int) -> np.ndarray:
        """Carry the candidate's masks to query slice ``n`` in a two-frame clip; (K, S, S) probabilities.

        Classes whose mask is empty are never sent and come out as zero.
        """
        size = query.frames.size
        prob_kss = np.zeros((len(self._class_values), size, size), np.float32)
        masks_kss = self._masks_of(candidate)
        shown = np.flatnonzero(masks_kss.any(axis=(1, 2)))
        if len(shown):
            clip = [(self._embeddings_of(candidate), self._frame_of(candidate)), (query.embeddings, n)]
            (answer,) = self._backend.propagate(clip, {0: masks_kss[shown]})
            prob_kss[shown] = torch.sigmoid(answer.logits_kss.float()).cpu().numpy()
        return prob_kss

    def describe(self, candidate: _Candidate) -> dict[str, Any]:
        """Return a candidate as a JSON value; classes that are on the slice but vanish at model size are named."""
        support = self._supports[candidate.support]
        values = np.unique(support.frames.slices_first(support.label_zyx)[candidate.index])
        sent = [bool(mask_ss.any()) for mask_ss in self._masks_of(candidate)]
        vanished = [v for k, v in enumerate(self._class_values) if v in values and not sent[k]]
        variant = None
        if candidate.variant is not None:
            variant = asdict(self._variant(candidate.support, candidate.index, candidate.variant))
        return {
            "support": support.case_id,
            "slice": candidate.index,
            "variant": variant,
            "distance": candidate.distance,
            "vanished_classes": vanished,
        }

    def _variant(self, s: int, n: int, v: int) -> Augmentation:
        case_number = int.from_bytes(self._supports[s].case_id.encode(), "big")
        rng = np.random.default_rng([self._options.augmentation_seed, case_number, n, v])
        return draw_augmentation(self._options.augment_options(), rng)

    def _vectors_of_variants(self, s: int, n: int) -> np.ndarray:
        if (s, n) not in self._variant_vectors:
            image_3ss = self._supports[s].frames.image(n)
            self._variant_vectors[s, n] = np.stack(
                [
                    self._metric.describe_image(augment_image(image_3ss, self._variant(s, n, v)), self._backend)
                    for v in range(self._options.augmentations)
                ]
            )
        return self._variant_vectors[s, n]

    def _masks_of(self, candidate: _Candidate) -> np.ndarray:
        s = candidate.support
        if s not in self._masks:
            support = self._supports[s]
            masks_k = [support.frames.masks_to_model(support.label_zyx == value) for value in self._class_values]
            self._masks[s] = list(np.stack(masks_k, axis=1))
        masks_kss: np.ndarray = self._masks[s][candidate.index]
        if candidate.variant is not None:
            return augment_masks(masks_kss, self._variant(s, candidate.index, candidate.variant))
        return masks_kss

    def _embeddings_of(self, candidate: _Candidate) -> Embeddings:
        support = self._supports[candidate.support]
        if candidate.variant is None:
            return support.embeddings
        variant = self._variant(candidate.support, candidate.index, candidate.variant)
        image_3ss = augment_image(support.frames.image(candidate.index), variant)
        return self._backend.embed(Frames.from_images(image_3ss[None]))

    def _frame_of(self, candidate: _Candidate) -> int:
        return candidate.index if candidate.variant is None else 0
