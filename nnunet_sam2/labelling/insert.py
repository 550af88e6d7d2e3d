"""Insert labelled slices into the query and let SAM 2's memory carry their masks from there.

Shape letters: N query slices, M support slices, K classes, S model size, F features of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import resize
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.sam2.protocol import Embeddings, Propagated, Sam2Backend
from nnunet_sam2.support.cases import Query, Support

_DESCRIPTOR_GRID = 4
"""Cells along each side into which a slice's embedding is pooled to be compared with others."""


@dataclass(frozen=True, kw_only=True)
class InsertOptions:
    """Say how often and where support slices are inserted; fusion has the options for what becomes of the members."""

    supports: int | None = None
    """How many supports to use, the most similar ones first; none means all."""
    insertions: int = 3
    """Insertions for each support; one member comes of each."""
    positions: str = "matched"
    """``matched``: at query slices that look most like the class's support slices; ``random``: as in SSL-MedSAM2."""
    prompted_slices: int | None = 8
    """At most so many slices of a class are inserted, spread over its extent; none means all that show it."""
    both_directions: bool = True
    """Visit every query slice twice, walking away from the insertion and towards it, and average the two."""

    def __post_init__(self) -> None:
        if self.positions not in ("matched", "random"):
            raise ValueError(f"positions={self.positions}: choose matched or random")
        for name in ("supports", "insertions", "prompted_slices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


class Insert:
    """Label a query by whole-volume insertion (SSL-MedSAM2, arXiv 2512.11548), all classes.

    For each support and insertion, a class's slices with their masks go between two query slices; SAM 2 walks from them
    to both ends of the query. Different from the released code: positions are matched to the anatomy unless asked
    otherwise; forward and backward passes both cover the whole query when their mean is asked for (there the average
    touched only the inserted slices); slices without the class are not inserted, so that memory starts with what is
    known; the memory of a prompted slice is computed once for all videos; classes that a support does not show are
    taken from the most similar one that does, instead of pulling the mean down.
    """

    name: ClassVar[str] = "insert"
    needs_memory: ClassVar[bool] = True

    def __init__(self, options: InsertOptions | None = None) -> None:
        self._options = options or InsertOptions()

    @property
    def options(self) -> InsertOptions:
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
        """Yield one member for each support and insertion; see `Strategy.members`.

        Raises `InputError` where no support shows any class at model size.
        """
        query_nf = slice_descriptors(query.embeddings)
        sources = [
            _Source(support, class_values, self._options.prompted_slices)
            for support in _most_similar(query_nf, supports, self._options.supports)
        ]
        if not any(source.slices[value] for source in sources for value in class_values):
            cases = ", ".join(support.case_id for support in supports) or "none given"
            raise InputError(
                f"no slice of the supports ({cases}) shows a class at model size {query.frames.size}; "
                f"give other supports or a larger --image-size"
            )
        lenders = {v: [source for source in sources if source.slices[v]] for v in class_values}
        for number, source in enumerate(sources):
            chosen = {
                v: source if source in lenders[v] else lenders[v][number % len(lenders[v])]
                for v in class_values
                if lenders[v]
            }
            positions = {v: self._positions(query_nf, chosen[v], v, rng) for v in chosen}
            for insertion in range(min(self._options.insertions, len(query.frames))):
                placed = {v: positions[v][insertion] for v in chosen}
                yield self._member(query, source, chosen, placed, class_values, backend, insertion)

    def _positions(self, query_nf: np.ndarray, source: _Source, value: int, rng: np.random.Generator) -> list[int]:
        count = min(self._options.insertions, len(query_nf))
        if self._options.positions == "random":
            return sorted(int(p) for p in rng.choice(len(query_nf), size=count, replace=False))
        likeness_n = (query_nf @ source.descriptors_mf[source.slices[value]].T).max(axis=1)
        return spread_peaks(likeness_n, count)

    def _member(
        self,
        query: Query,
        owner: _Source,
        chosen: dict[int, _Source],
        placed: dict[int, int],
        class_values: tuple[int, ...],
        backend: Sam2Backend,
        insertion: int,
    ) -> Member:
        shape_hw = query.frames.slice_shape_hw
        prob_knhw = np.zeros((len(class_values), len(query.frames), *shape_hw), np.float32)
        record: dict[str, Any] = {"support": owner.support.case_id, "insertion": insertion, "classes": {}}
        for k, value in enumerate(class_values):
            if value not in chosen:
                record["classes"][str(value)] = {"absent_in_all_supports": True}
                continue
            source, position = chosen[value], placed[value]
            visits = np.zeros(len(query.frames), int)
            scores: list[float] = []
            for n, answer in _walks(query, source, value, position, backend, inward=self._options.both_directions):
                prob_ss = torch.sigmoid(answer.logits_kss[0]).cpu().numpy()
                prob_knhw[k, n] += resize(prob_ss[None], shape_hw)[0]
                visits[n] += 1
                if (prob_ss > 0.5).any():
                    scores.append(float(answer.iou_k[0]))
            prob_knhw[k] /= np.maximum(visits, 1)[:, None, None]
            record["classes"][str(value)] = {
                "support": source.support.case_id,
                "position": position,
                "prompted_slices": source.slices[value],
                "vanished_slices": source.vanished[value],
                "slices_found": len(scores),
                "estimated_iou": float(np.mean(scores)) if scores else None,
            }
        return Member(
            name=f"insert:{owner.support.case_id}:{insertion}",
            prob_kzyx=query.frames.slices_back(prob_knhw),
            record=record,
        )


class _Source:
    """Hold which slices of a support prompt which class, with their masks at model size."""

    def __init__(self, support: Support, class_values: tuple[int, ...], limit: int | None) -> None:
        self.support = support
        self.descriptors_mf = slice_descriptors(support.embeddings)
        self.slices: dict[int, list[int]] = {}
        self.masks_mss: dict[int, dict[int, np.ndarray]] = {}
        self.vanished: dict[int, list[int]] = {}
        unsure_m: np.ndarray = np.zeros(len(support.frames), bool)
        if support.ignore_value is not None:
            ignored = support.label_zyx == support.ignore_value
            unsure_m = np.asarray(support.frames.slices_first(ignored).any(axis=(1, 2)))
        for value in class_values:
            mask_zyx = support.label_zyx == value
            model_mss = support.frames.masks_to_model(mask_zyx)
            shown = np.flatnonzero(model_mss.any(axis=(1, 2)))
            # A mask says that all else is background, which nobody knows where voxels are to be ignored.
            sure = shown[~unsure_m[shown]]
            self.slices[value] = spread(sure if len(sure) else shown, limit)
            self.masks_mss[value] = {m: model_mss[m] for m in self.slices[value]}
            self.vanished[value] = list(support.frames.vanished_slices(mask_zyx, model_mss))


def _walks(
    query: Query, source: _Source, value: int, position: int, backend: Sam2Backend, *, inward: bool
) -> Iterator[tuple[int, Propagated]]:
    """Yield (query slice, answer) for the walks that one insertion of one class stands for."""
    before, after = list(range(position)), list(range(position, len(query.frames)))
    # Both outward walks start at the inserted slices; the inward ones at the query's ends.
    orders = [before[::-1], after]
    if inward:
        orders += [before, after[::-1]]
    inserted = source.slices[value]
    for order in orders:
        if not order:
            continue
        # Walking backward is walking forward through the mirrored video, inserted slices included.
        backward = order[0] > order[-1]
        sequence = inserted[::-1] if backward else inserted
        video = [(source.support.embeddings, m) for m in sequence] + [(query.embeddings, n) for n in order]
        masks = {t: source.masks_mss[value][m][None] for t, m in enumerate(sequence)}
        for answer in backend.walk(video, masks):
            yield order[answer.frame - len(sequence)], answer


def slice_descriptors(embeddings: Embeddings) -> np.ndarray:
    """Describe each slice by its pooled embedding, unit length: (N, F) float32."""
    pooled = [
        torch.nn.functional.adaptive_avg_pool2d(embeddings.top(n)[None], _DESCRIPTOR_GRID).flatten()
        for n in range(len(embeddings))
    ]
    descriptors_nf = torch.stack(pooled)
    return np.asarray(torch.nn.functional.normalize(descriptors_nf, dim=1).cpu().numpy())


def spread(indices: np.ndarray, limit: int | None) -> list[int]:
    """Choose at most ``limit`` of ascending indices, evenly spread, the ends included where there is room."""
    if limit is None or len(indices) <= limit:
        return [int(i) for i in indices]
    if limit == 1:
        return [int(indices[len(indices) // 2])]
    return [int(indices[round(i)]) for i in np.linspace(0, len(indices) - 1, limit)]


def spread_peaks(score_n: np.ndarray, count: int) -> list[int]:
    """Choose ``count`` positions of high score that keep a distance where there is room; best first, ties by order."""
    distance = max(1, len(score_n) // (2 * count))
    ranked = [int(n) for n in np.argsort(-score_n, kind="stable")]
    chosen: list[int] = []
    while len(chosen) < count and distance >= 1:
        for n in ranked:
            if len(chosen) < count and all(abs(n - other) >= distance for other in chosen):
                chosen.append(n)
        distance //= 2
    return chosen


def _most_similar(query_nf: np.ndarray, supports: Sequence[Support], count: int | None) -> list[Support]:
    """Order supports by the mean likeness of the query's slices to their best slice, and keep the first."""
    if count is None or len(supports) <= count:
        return list(supports)
    likeness = [float((query_nf @ slice_descriptors(s.embeddings).T).max(axis=1).mean()) for s in supports]
    order = sorted(range(len(supports)), key=lambda i: (-likeness[i], supports[i].case_id))
    return [supports[i] for i in order[:count]]
