"""What a support offers for insertion: which of its slices prompt which class, and which cannot.

Shape letters: M support slices, F features of a slice, S model size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from nnunet_sam2.labelling.strategies.insert.plans import spread
from nnunet_sam2.labelling.strategies.insert.videos import Inserted
from nnunet_sam2.labelling.strategies.transfer.memory import slice_descriptors
from nnunet_sam2.support.cases import Support

_KEPT_SOURCES = 64


class InsertSource:
    """Hold which slices of a support prompt which class, with their masks at model size."""

    def __init__(
        self,
        support: Support,
        class_values: tuple[int, ...],
        *,
        descriptors_mf: np.ndarray,
        limit: int | None,
        whole: bool,
    ) -> None:
        self.support = support
        self.descriptors_mf = descriptors_mf
        self._whole = whole
        self._prompts: dict[int, list[int]] = {}
        self._packed: dict[tuple[int, int], np.ndarray] = {}
        self._left_out: dict[int, dict[str, list[int]]] = {}
        unsure_m = np.zeros(len(support.frames), bool)
        if support.ignore_value is not None:
            ignored = support.label_zyx == support.ignore_value
            unsure_m = np.asarray(support.frames.slices_first(ignored).any(axis=(1, 2)))
        for value in class_values:
            mask_zyx = support.label_zyx == value
            model_mss = support.frames.masks_to_model(mask_zyx)
            shown = np.flatnonzero(model_mss.any(axis=(1, 2)))
            # A mask says that all else is background, which nobody knows where voxels are to be ignored.
            sure = shown[~unsure_m[shown]]
            able = sure if len(sure) else shown
            prompts = spread(able, limit)
            self._prompts[value] = prompts
            self._packed.update({(value, m): np.packbits(model_mss[m]) for m in prompts})
            self._left_out[value] = {
                "vanished_slices": [int(m) for m in support.frames.vanished_slices(mask_zyx, model_mss)],
                "partly_judged_slices": sorted({*shown.tolist()} - {*able.tolist()}),
                "slices_beyond_limit": sorted({*able.tolist()} - {*prompts}),
            }

    def prompts(self, value: int) -> list[int]:
        """Return the slices that prompt a class, ascending."""
        return self._prompts[value]

    def mask(self, value: int, m: int) -> np.ndarray:
        """Return the mask of a prompting slice, (S, S) bool."""
        size = self.support.frames.size
        return np.unpackbits(self._packed[value, m]).reshape(size, size).astype(bool)

    def inserted(self, value: int) -> Inserted:
        """Return what enters a video of a class: the prompting slices, or all where whole volumes are inserted."""
        prompts = tuple(self._prompts[value])
        return Inserted(kept=tuple(range(len(self.support.frames))) if self._whole else prompts, prompts=prompts)

    def record(self, value: int) -> dict[str, Any]:
        """Return a class's prompts and what was left out, as a JSON value; empty lists are not named."""
        left_out = {name: slices for name, slices in self._left_out[value].items() if slices}
        return {"support": self.support.case_id, "prompted_slices": self._prompts[value], **left_out}


class InsertSources:
    """Keep what supports offer from one query to the next."""

    def __init__(self, *, limit: int | None, whole: bool) -> None:
        self._limit = limit
        self._whole = whole
        # Both hold the supports, so that their ids cannot be taken over by others.
        self._descriptors: dict[int, tuple[Support, np.ndarray]] = {}
        self._sources: OrderedDict[tuple[int, tuple[int, ...]], InsertSource] = OrderedDict()

    def source(self, support: Support, class_values: tuple[int, ...]) -> InsertSource:
        """Return what a support offers for the classes."""
        key = (id(support), class_values)
        if key not in self._sources:
            self._sources[key] = InsertSource(
                support,
                class_values,
                descriptors_mf=self._describe(support),
                limit=self._limit,
                whole=self._whole,
            )
            while len(self._sources) > _KEPT_SOURCES:
                self._sources.popitem(last=False)
        self._sources.move_to_end(key)
        return self._sources[key]

    def most_similar(self, query_nf: np.ndarray, supports: Sequence[Support], count: int | None) -> list[Support]:
        """Order supports by the mean likeness of the query's slices to their best slice, and keep the first ``count``.

        Where all are kept, they stay in their order.
        """
        if count is None or len(supports) <= count:
            return list(supports)
        likeness = [float((query_nf @ self._describe(s).T).max(axis=1).mean()) for s in supports]
        order = sorted(range(len(supports)), key=lambda i: (-likeness[i], supports[i].case_id))
        return [supports[i] for i in order[:count]]

    def _describe(self, support: Support) -> np.ndarray:
        if id(support) not in self._descriptors:
            self._descriptors[id(support)] = (support, slice_descriptors(support.embeddings).numpy())
        return self._descriptors[id(support)][1]
