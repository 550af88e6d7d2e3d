"""Single images as a pseudo-video: their order, and masks carried from image to image.

Shape letters: N images of the chain, F features of an image, K objects, S model size, h w a quarter of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from nnunet_sam2.frames import Frames
from nnunet_sam2.labelling.strategies.chain.images import ReadyImage, cleaned, ready_image
from nnunet_sam2.progress import track
from nnunet_sam2.sam2.protocol import Embeddings, Sam2Backend
from nnunet_sam2.support.cases import Query
from nnunet_sam2.support.matching import EmbeddingMetric


@dataclass(frozen=True, kw_only=True, eq=False)
class ChainImage:
    """Hold an image of the chain: what SAM 2 needs of it, and its automatic prompt."""

    case_id: str
    index: int
    """Slice of the case."""
    embeddings: Embeddings
    frame: int
    """Place of the image among the embeddings."""
    descriptor_f: np.ndarray
    subject_hw: np.ndarray
    """The thresholded subject, (h, w) bool."""
    point_xy: np.ndarray
    flipped: bool
    record: dict[str, Any]

    @property
    def key(self) -> tuple[str, int]:
        """Return what names the image in the chain."""
        return self.case_id, self.index


class ImageChain:
    """Hold all images of a pseudo-video, seen once and ordered by appearance."""

    def __init__(
        self, cases: Sequence[Query], backend: Sam2Backend, *, threshold: str, laterality: bool, artefacts: bool
    ) -> None:
        """See every slice of every case; ``cases`` may be read anew each time one is asked for.

        ``threshold``, ``laterality`` and ``artefacts`` are as in `ready_image`; slices of volumes are neither mirrored
        nor cleared, for there a side is anatomy and a bright piece an organ.
        """
        self._cases = cases
        self._threshold, self._laterality, self._artefacts = threshold, laterality, artefacts
        self._position: dict[str, int] = {}
        self.single = True
        """Whether every case is one image."""
        seen: list[ChainImage] = []
        for i in track(range(len(cases)), what="reading the images of the chain", total=len(cases)):
            case = cases[i]
            self._position[case.case_id] = i
            self.single &= len(case.frames) == 1
            seen += [self.see(case, n, backend) for n in range(len(case.frames))]
        order = order_by_appearance(np.stack([image.descriptor_f for image in seen])) if seen else []
        self.images = [seen[i] for i in order]
        self._place = {image.key: place for place, image in enumerate(self.images)}

    def __len__(self) -> int:
        return len(self.images)

    def place(self, case: Query, n: int) -> int | None:
        """Return where a case's slice stands in the chain, None where it is not part of it."""
        return self._place.get((case.case_id, n))

    def see(self, case: Query, n: int, backend: Sam2Backend) -> ChainImage:
        """Make an image ready, prompt it and encode it."""
        ready = self._ready(case, n)
        changed = ready.flipped or ready.record["removed_share_of_image"] > 0
        # An image that is as it was has its embeddings already.
        embeddings = backend.embed(Frames.from_images(ready.image_3ss[None])) if changed else case.embeddings
        frame = 0 if changed else n
        (descriptor_f,) = EmbeddingMetric().describe(case.frames, embeddings, [frame])
        return ChainImage(
            case_id=case.case_id,
            index=n,
            embeddings=embeddings,
            frame=frame,
            descriptor_f=descriptor_f,
            subject_hw=ready.subject_ss[2::4, 2::4].copy(),
            point_xy=ready.point_xy,
            flipped=ready.flipped,
            record=ready.record,
        )

    def pixels(self, place: int) -> np.ndarray:
        """Return an image of the chain as SAM 2 saw it, (3, S, S)."""
        image = self.images[place]
        return self._ready(self._cases[self._position[image.case_id]], image.index).image_3ss

    def _ready(self, case: Query, n: int) -> ReadyImage:
        single = len(case.frames) == 1
        return ready_image(
            case.frames,
            n,
            threshold=self._threshold,
            laterality=single and self._laterality,
            artefacts=single and self._artefacts,
        )


def order_by_appearance(descriptors_nf: np.ndarray) -> list[int]:
    """Order images so that neighbours look alike; ties in the given order.

    The chain begins with the image that resembles all others most and grows at whichever end has the nearest image
    that is still free, so that the typical images lie in the middle and the odd ones at the ends.
    """
    count = len(descriptors_nf)
    if not count:
        return []
    likeness_nn = descriptors_nf @ descriptors_nf.T
    first = int(np.argmax(likeness_nn.sum(axis=1)))
    chain, free = [first], np.ones(count, bool)
    free[first] = False
    while free.any():
        ends = (chain[0], chain[-1])
        nearest = [int(np.argmax(np.where(free, likeness_nn[end], -np.inf))) for end in ends]
        front = likeness_nn[ends[0], nearest[0]] > likeness_nn[ends[1], nearest[1]]
        chosen = nearest[0] if front else nearest[1]
        chain.insert(0 if front else len(chain), chosen)
        free[chosen] = False
    return chain


def spread_best(scores_n: Sequence[float], count: int) -> list[int]:
    """Choose the best of each of ``count`` equal stretches, ascending; fewer where there are fewer."""
    stretches = np.array_split(np.arange(len(scores_n)), min(count, len(scores_n)))
    return [int(stretch[int(np.argmax(np.asarray(scores_n)[stretch]))]) for stretch in stretches if len(stretch)]


def masks_from_points(backend: Sam2Backend, image: ChainImage) -> torch.Tensor:
    """Answer an image's one automatic point, without any other image: probability (1, h, w).

    The best of SAM 2's three masks is taken, as it is meant to be for a single click.
    """
    point = (image.point_xy[None], np.array([True]))
    decoded = backend.decode(image.embeddings, image.frame, points=[point], several=True)
    return torch.sigmoid(decoded.low_res_logits_khw.float()).cpu()


def carry_all(
    backend: Sam2Backend, chain: Sequence[ChainImage], prompts_kss: Mapping[int, np.ndarray]
) -> dict[int, torch.Tensor]:
    """Carry masks from the prompted images to all others, both ways: probabilities by place, float16 (K, h, w).

    Images between prompts are reached from both sides and get the mean; images with a prompt are left out.
    """
    video = [(image.embeddings, image.frame) for image in chain]
    found: dict[int, torch.Tensor] = {}
    for reverse in (False, True):
        for answer in backend.walk(video, prompts_kss, reverse=reverse):
            prob_khw = _quarter(torch.sigmoid(answer.logits_kss.float()).cpu()).half()
            before_khw = found.get(answer.frame)
            found[answer.frame] = prob_khw if before_khw is None else (before_khw + prob_khw) / 2
    return found


def prompt_mask(prob_hw: torch.Tensor, size: int) -> np.ndarray:
    """Turn a probability map into the mask that prompts: the largest piece above a half, (S, S) bool."""
    plane = interpolate(prob_hw.float()[None, None], size=(size, size), mode="bilinear", align_corners=False)
    return cleaned(plane[0, 0].numpy() > 0.5)


def dice(first_hw: np.ndarray, second_hw: np.ndarray) -> float:
    """Compute Dice of two masks; 1 where both are empty."""
    total = int(first_hw.sum()) + int(second_hw.sum())
    return 2.0 * int((first_hw & second_hw).sum()) / total if total else 1.0


def _quarter(prob_kss: torch.Tensor) -> torch.Tensor:
    side = prob_kss.shape[-1] // 4
    return interpolate(prob_kss[None], size=(side, side), mode="area")[0]
