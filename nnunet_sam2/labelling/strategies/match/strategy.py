"""Match each query slice to its most similar support slice, and carry the masks over in a two-frame clip.

Shape letters: N slices, K classes, S model size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.fusion import COMPONENTS, GIVEN, FusionOptions
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.option_checks import at_least, one_of
from nnunet_sam2.labelling.strategies.match.candidates import Candidates
from nnunet_sam2.labelling.strategies.match.pools import Pool, Ranked, Ranking, single_slice_pools, volume_pool
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.augment import AugmentOptions
from nnunet_sam2.support.cases import Query, Support
from nnunet_sam2.support.matching import METRICS, Metric, make_metric

_QUERY_BLOCK = 64
"""Query slices that are described and ranked at once."""


@dataclass(frozen=True, kw_only=True)
class MatchOptions:
    """Say how support slices are varied and matched."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "metric": "lpips",
            "support_set": "slice",
            "augmentations": 4,
            "matches": 1,
            "contrast": 0.2,
            "brightness": 0.2,
            "saturation": 0.2,
            "hue": 0.1,
            "gamma": 0.0,
            "components": "none",
        }
    }
    """``paper``: Zu et al. (arXiv 2503.04826): one support slice, four variants of it a query slice, LPIPS, arg-min.
    The ranges of the variants are ours, for theirs are not known."""

    metric: str = "embedding"
    """``embedding``: cosine of SAM 2's embeddings; ``lpips``: LPIPS with AlexNet; ``ssim``; ``psnr``."""
    lpips_weights: str | None = None
    """File of AlexNet's weights in torchvision's naming (.safetensors, .pth); None: what torchvision downloaded."""
    support_set: str = "volumes"
    """``volumes``: all slices of all supports, all classes at once; ``slice``: for each class one slice of one support,
    as published."""
    augmentations: int = 2
    """Variants of each short-listed support slice; in ``slice``, variants for each slice of the query. 0 makes none."""
    shortlist: int = 4
    """How many support slices, the most similar ones as they are, compete with their variants (``volumes``)."""
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
    saturation: float = 0.2
    hue: float = 0.0
    gamma: float = 0.2
    components: str = GIVEN
    """Which 3D component of a class to keep: auto, largest, confident, none; ``given``: what --components says."""

    def __post_init__(self) -> None:
        one_of(self, metric=METRICS, support_set=("volumes", "slice"), components=(GIVEN, *COMPONENTS))
        if self.augmentations < 0:
            raise ValueError(f"augmentations={self.augmentations} must not be negative")
        at_least(self, 1, "shortlist", "matches")
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
            saturation=self.saturation,
            hue=self.hue,
            gamma=self.gamma,
        )


class Match:
    """Label each query slice from the support slice that looks most like it (Zu et al., arXiv 2503.04826).

    Support slices and seeded variants of them (one affine map for image and mask, colours for the image alone) are
    compared with the query slice; the most similar one and the query slice make a two-frame clip, and SAM 2's memory
    carries the masks over. Slices do not see each other. Different from the paper, unless the preset asks for it:
    there the support is one slice and queries show the organ; here supports are volumes, a slice without any class may
    win, which says that the query slice shows none either, and variants are made of a short list of slices alone.
    """

    name: ClassVar[str] = "match"
    needs_memory: ClassVar[bool] = True

    def __init__(self, options: MatchOptions | None = None) -> None:
        self._options = options or MatchOptions()
        self._metric: Metric | None = None
        self._kept: tuple[tuple[Any, ...], Candidates, Ranking] | None = None

    @property
    def options(self) -> MatchOptions:
        """Return the options."""
        return self._options

    def fusion(self, asked: FusionOptions) -> FusionOptions:
        """Return how the members are to be fused; see `BringsFusion`."""
        return asked.with_components(self._options.components)

    def check(self, case_id: str, slices: int) -> None:
        """Refuse where the metric's weights are missing or not what they should be; see `Limits`."""
        self._loaded_metric()

    def members(
        self,
        query: Query,
        supports: Sequence[Support],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        rng: np.random.Generator,
    ) -> Iterator[Member]:
        """Yield one member a rank of match; see `Strategy.members`. ``rng`` is not used: variants have their seed.

        Raises `InputError` where no support shows any class at model size, and where there are fewer candidates than
        matches asked for.
        """
        if not supports:
            raise InputError(f"case {query.case_id} has no support to match")
        metric = self._loaded_metric()
        candidates, ranking = self._library(supports, class_values, metric, backend)
        pools = self._pools(candidates, len(query.frames))
        indices = range(len(query.frames))
        ranked: list[list[list[Ranked]]] = [[] for _ in pools]
        for start in range(0, len(indices), _QUERY_BLOCK):
            described = metric.describe(query.frames, query.embeddings, indices[start : start + _QUERY_BLOCK])
            for p, pool in enumerate(pools):
                ranked[p] += ranking.rank(pool, described, self._options.matches)
        absent = sorted(set(class_values) - {class_values[k] for pool in pools for k in pool.classes})
        for rank in range(self._options.matches):
            records: list[list[dict[str, Any]]] = [[] for _ in pools]

            def maps(rank: int = rank, records: list[list[dict[str, Any]]] = records) -> Iterator[np.ndarray]:
                for n in indices:
                    prob_kss = np.zeros((len(class_values), query.frames.size, query.frames.size), np.float32)
                    for p, pool in enumerate(pools):
                        best = ranked[p][n][rank]
                        scores = _carry_over(candidates, best, pool, query, n, backend, prob_kss)
                        natural = metric.natural(best.distance)
                        records[p].append({**candidates.describe(best.candidate), metric.name: natural, **scores})
                    yield prob_kss

            yield Member(
                name=f"match:{rank}",
                prob_kzyx=query.frames.to_volume(maps()),
                record={
                    "rank": rank,
                    "metric": metric.name,
                    "absent_in_all_supports": absent,
                    "pools": [
                        {
                            "classes": [class_values[k] for k in pool.classes],
                            "candidates": pool.size,
                            "slices": records[p],
                        }
                        for p, pool in enumerate(pools)
                    ],
                },
            )

    def _loaded_metric(self) -> Metric:
        if self._metric is None:
            self._metric = make_metric(self._options.metric, self._options.lpips_weights)
        return self._metric

    def _library(
        self, supports: Sequence[Support], class_values: tuple[int, ...], metric: Metric, backend: Sam2Backend
    ) -> tuple[Candidates, Ranking]:
        # The candidates hold the supports, so that their ids cannot be taken over by others.
        key = (class_values, *(id(support) for support in supports))
        if self._kept is None or self._kept[0] != key:
            options = self._options
            candidates = Candidates(
                supports, class_values, options.augment_options(), options.augmentation_seed, backend
            )
            self._kept = (key, candidates, Ranking(candidates, metric, backend))
        return self._kept[1], self._kept[2]

    def _pools(self, candidates: Candidates, slices: int) -> list[Pool]:
        options = self._options
        cases = ", ".join(support.case_id for support in candidates.supports)
        if not any(candidates.areas(s).any() for s in range(len(candidates.supports))):
            raise InputError(
                f"no slice of the supports ({cases}) shows a class at model size "
                f"{candidates.supports[0].frames.size}; give other supports or a larger --image-size"
            )
        if options.support_set == "slice":
            pools = single_slice_pools(candidates, variants=options.augmentations * slices)
        else:
            shortlist = max(options.shortlist, options.matches)
            pools = [volume_pool(candidates, variants=options.augmentations, shortlist=shortlist)]
        fewest = min(pool.size for pool in pools)
        if fewest < options.matches:
            raise InputError(
                f"matches={options.matches}: the supports ({cases}) offer {fewest} candidates to a slice; use "
                f"--set matches={fewest}, more augmentations or more supports"
            )
        return pools


def _carry_over(
    candidates: Candidates,
    best: Ranked,
    pool: Pool,
    query: Query,
    n: int,
    backend: Sam2Backend,
    prob_kss: np.ndarray,
) -> dict[str, Any]:
    """Put into ``prob_kss`` what a two-frame clip makes of the candidate's masks, and return the classes' scores.

    Classes whose mask is empty are never sent and stay zero.
    """
    masks_kss = candidates.masks(best.candidate)
    shown = [k for k in pool.classes if masks_kss[k].any()]
    if not shown:
        return {"classes": {}}
    clip = [candidates.frame(best.candidate), (query.embeddings, n)]
    (answer,) = backend.propagate(clip, {0: masks_kss[shown]})
    prob_kss[shown] = torch.sigmoid(answer.logits_kss.float()).cpu().numpy()
    scores = zip(shown, answer.iou_k.tolist(), answer.object_score_k.tolist(), strict=True)
    return {
        "classes": {
            str(candidates.class_values[k]): {"iou": round(iou, 3), "object_score": round(score, 2)}
            for k, iou, score in scores
        }
    }
