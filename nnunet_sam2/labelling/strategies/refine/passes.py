"""The two passes of strategy refine: which components prompt, and what SAM 2 is asked about them.

Shape letters: N slices, C channels (background first), K classes, P pieces on a slice, S model size, h w quarter of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nnunet_sam2.frames import MASK_THRESHOLD, Frames
from nnunet_sam2.labelling.components import measured_components, most_confident
from nnunet_sam2.labelling.prompting.prompts import model_boxes, morph, seed_prompts, seeds, voxel_places
from nnunet_sam2.planes import resize
from nnunet_sam2.sam2.protocol import Embeddings, Sam2Backend

LEAST_AREA = 1e-4
"""Part of the frame that a piece must cover to be prompted for."""

_MOST_PIECES = 16
"""Pieces of one class on one slice that are prompted for, the largest ones; a torn prediction has hundreds."""


@dataclass(frozen=True, kw_only=True)
class PassOptions:
    """Say how a piece becomes prompts."""

    padding: float
    morphology: str
    element: str
    radius: float
    """In pixels at model size."""
    keep_box: bool


def kept_components(
    prob_czyx: np.ndarray, confident_k: Sequence[bool], *, least_share: float
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Choose the 3D components of each class that prompt; masks (K, Z, Y, X) and a JSON record a class.

    A class is taken where it beats every other channel. Of its components with at least ``least_share`` of the largest
    one's voxels, the `most_confident` one is kept where ``confident_k`` says so, else all are.
    """
    winner_zyx = prob_czyx.argmax(axis=0)
    kept_kzyx = np.zeros((len(prob_czyx) - 1, *winner_zyx.shape), bool)
    records: list[dict[str, Any]] = []
    for k, confident in enumerate(confident_k):
        pieces_zyx, voxels, means = measured_components(winner_zyx == k + 1, prob_czyx[k + 1])
        if not len(voxels):
            records.append({"components": 0})
            continue
        if confident:
            chosen = [most_confident(voxels, means, least_share)]
        else:
            chosen = np.flatnonzero(voxels >= least_share * voxels.max()).tolist()
        kept_kzyx[k] = np.isin(pieces_zyx, [c + 1 for c in chosen])
        records.append(
            {
                "components": len(voxels),
                "kept": [{"voxels": int(voxels[c]), "mean_probability": round(float(means[c]), 4)} for c in chosen],
            }
        )
    return kept_kzyx, records


@dataclass(frozen=True, kw_only=True, eq=False)
class TwoPasses:
    """Redraw the kept components of one case slice by slice: box first, then points with the first answer's logits.

    The positive point of a piece is the deepest point of what no other piece covers; the negative points are the seeds
    of all other classes' pieces. Morphology acts on the pieces before box, exclusive region and seeds are taken from
    them (in the published code it is computed and dropped).
    """

    backend: Sam2Backend
    embeddings: Embeddings
    frames: Frames
    kept_kzyx: np.ndarray
    class_values: tuple[int, ...]
    options: PassOptions
    explained: list[dict[str, Any]] = field(default_factory=list)
    """A JSON record of each prompted slice, places in voxels of the slice, (x, y)."""

    def __call__(self, n: int, prob_chw: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return new probabilities (h, w) of the classes that the slice shows, by position k.

        A class that only dropped components show comes out as zero.
        """
        winner_hw = prob_chw.argmax(dim=0)
        dropped = [k for k in range(len(self.class_values)) if bool((winner_hw == k + 1).any())]
        answers = {k: torch.zeros_like(prob_chw[0]) for k in dropped}
        classes, pieces = self._pieces(n)
        if not pieces:
            return answers
        size = self.frames.size
        boxes_k4 = model_boxes(pieces, self.options.padding, size)
        first = self.backend.decode(self.embeddings, n, boxes_k4=boxes_k4)
        placed = seeds(pieces)
        points = seed_prompts(placed, classes, np.ones(2, np.float32))
        second = self.backend.decode(
            self.embeddings,
            n,
            boxes_k4=boxes_k4 if self.options.keep_box else None,
            points=points,
            mask_logits_khw=first.low_res_logits_khw,
        )
        prob_phw = torch.sigmoid(second.low_res_logits_khw.float()).cpu()
        for k in dict.fromkeys(classes):
            answers[k] = prob_phw[[p for p, other in enumerate(classes) if other == k]].amax(dim=0)
        self.explained.append(
            {
                "slice": n,
                "pieces": [
                    {
                        "class": self.class_values[k],
                        "box": voxel_places(boxes_k4[p], self.frames),
                        "positive": voxel_places(points[p][0][0], self.frames),
                        "exclusive": placed[p].exclusive,
                        "negative": [voxel_places(xy, self.frames) for xy in points[p][0][1:]],
                        "iou": [round(float(first.iou_k[p]), 3), round(float(second.iou_k[p]), 3)],
                    }
                    for p, k in enumerate(classes)
                ],
            }
        )
        return answers

    def _pieces(self, n: int) -> tuple[list[int], list[np.ndarray]]:
        """Return the class and the mask (S, S) of every piece on a slice, after morphology."""
        size, options = self.frames.size, self.options
        classes: list[int] = []
        pieces: list[np.ndarray] = []
        for k, kept_zyx in enumerate(self.kept_kzyx):
            slice_hw = self.frames.slices_first(kept_zyx)[n]
            if not slice_hw.any():
                continue
            mask_ss = resize(slice_hw[None].astype(np.float32), (size, size))[0] >= MASK_THRESHOLD
            (pieces_ss,), areas, _ = measured_components(mask_ss[None], None)
            for number in np.argsort(-areas, kind="stable")[:_MOST_PIECES]:
                if areas[number] >= LEAST_AREA * size * size:
                    classes.append(k)
                    piece_ss = pieces_ss == number + 1
                    pieces.append(morph(piece_ss, options.morphology, options.element, options.radius))
        return classes, pieces
