"""Intensities of a query brought to those of the supports, where it comes from another sequence or contrast.

Shape letters: L landmarks, P locations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from nnunet_sam2.frames import Frames
from nnunet_sam2.labelling.strategies.transfer.memory import SupportMemory, slice_descriptors, slice_features
from nnunet_sam2.labelling.strategies.transfer.nearest import smallest
from nnunet_sam2.labelling.strategies.transfer.recipe import Recipe
from nnunet_sam2.sam2.protocol import Embeddings, Sam2Backend
from nnunet_sam2.support.cases import Query, Support

_PERCENTILES = (0.5, 1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5)

FOREIGN = 0.1
"""Mean distance of landmarks (0 to 1) to the nearest support's from which on a query has another distribution: beyond
19 of 20 subjects of one sequence, with three supports, in cardiac, abdominal, brain and breast images."""

FOREIGN_TO_ONE = 0.15
"""The same with one support, which says nothing of how subjects differ."""

UNLIKE = 0.04
"""The same for an inversion, which the embeddings have to speak for as well."""

CLEARLY_NEARER = 0.85
"""Part of its former distance to the supports' embeddings that an inverted query must come to: inverted images come
to 0.6 to 0.75, others go to 1.2 and more."""

NO_FARTHER = 1.05
"""How far a matched query may go from the supports' embeddings: they say little about brightness."""

_LOOKED_AT = 4
_ENTRIES = 16384


def landmarks(frames: Frames) -> np.ndarray:
    """Return percentiles of the windowed intensities above the background, strictly ascending, (L,)."""
    values = frames.values(frames.channels[0])
    found = np.percentile(values, _PERCENTILES) if values.size else np.linspace(0, 1, len(_PERCENTILES))
    return np.asarray(np.maximum.accumulate(found) + 1e-6 * np.arange(len(found)))


def contrast_like(
    query: Query, supports: Sequence[Support], class_values: tuple[int, ...], backend: Sam2Backend
) -> tuple[Query, dict[str, Any]]:
    """Return the query as it is, matched or inverted and matched to the supports' intensities, and why.

    Matching sends the query's landmarks to the mean of the supports' (Nyul, Udupa, Zhang, IEEE TMI 2000). It is done
    where the landmarks are far from every support's and the embeddings do not move away from theirs; inversion where it
    brings the embeddings clearly nearer. Nothing else speaks for a contrast that no labelled case has: among cases of
    one sequence matching costs accuracy. Images of several channels and CT, whose values mean the same everywhere, are
    left as they are.
    """
    frames = [query.frames, *(support.frames for support in supports)]
    if any(one.calibrated or len(set(one.channels)) > 1 for one in frames):
        return query, {"taken": "as it is"}
    own = landmarks(query.frames)
    theirs = np.stack([landmarks(support.frames) for support in supports])
    standard = theirs.mean(axis=0)
    apart = float(np.abs(theirs - own).mean(axis=1).min())
    foreign = FOREIGN if len(supports) > 1 else FOREIGN_TO_ONE
    # Nothing is encoded that could not be taken anyway: within a sequence that is everything.
    asked = [name for name, least in (("inverted", UNLIKE), ("matched", foreign)) if apart > least]
    shown, distance = {"as it is": query.frames}, {}
    if asked:
        memory = SupportMemory(supports, class_values)
        ends = {"matched": standard, "inverted": standard[::-1]}
        shown |= {name: query.frames.remapped({query.frames.channels[0]: (own, ends[name])}) for name in asked}
        distance = {name: _distance(frames, memory, backend) for name, frames in shown.items()}
    taken = "as it is"
    if "inverted" in asked and distance["inverted"] < CLEARLY_NEARER * distance["as it is"]:
        taken = "inverted"
    elif "matched" in asked and distance["matched"] < NO_FARTHER * distance["as it is"]:
        taken = "matched"
    record = {
        "taken": taken,
        "landmarks_apart": round(apart, 4),
        "distance": {name: round(d, 4) for name, d in distance.items()},
    }
    if taken == "as it is":
        return query, record
    return replace(query, frames=shown[taken], embeddings=backend.embed(shown[taken])), record


def _distance(frames: Frames, memory: SupportMemory, backend: Sam2Backend) -> float:
    """Return the mean squared distance of a few slices' locations to their nearest entries."""
    chosen = sorted({int((i + 0.5) * len(frames) / _LOOKED_AT) for i in range(_LOOKED_AT)})
    embeddings = backend.embed(Frames.from_images(np.stack([frames.image(n) for n in chosen])))
    return float(np.mean([_to_nearest(embeddings, i, memory) for i in range(len(chosen))]))


def _to_nearest(embeddings: Embeddings, index: int, memory: SupportMemory) -> float:
    descriptor_f = slice_descriptors(embeddings)[index]
    memory_mf, _ = memory.rows(memory.choose(descriptor_f, (index + 0.5) / len(embeddings), _ENTRIES))
    query_pf = slice_features(embeddings, index)
    scale_f = Recipe().place.scale(query_pf.shape[1])
    query_pf, memory_mf = query_pf * scale_f, memory_mf * scale_f
    squared_pm = torch.addmm(memory_mf.square().sum(dim=1), query_pf, memory_mf.T, alpha=-2.0)
    nearest_p, _ = smallest(squared_pm, 1)
    return float((nearest_p[:, 0] + query_pf.square().sum(dim=1)).mean())
