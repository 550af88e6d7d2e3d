"""`insert` as a user would write it today with sam2's own video predictor: the twin that the labeller is timed against.

Shape letters: N query slices, S model size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

from nnunet_sam2.frames import Frames
from nnunet_sam2.planes import resize
from nnunet_sam2.sam2.backend import IMAGE_MEAN, IMAGE_STD
from nnunet_sam2.support.cases import Query, Support


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """Name one pseudo-video of the paper: all of a support before a query slice, walked one way."""

    support: Support
    before: int
    reverse: bool


class StockPredictor:
    """Run ``SAM2VideoPredictor`` over pseudo-videos, one ``init_state`` for each."""

    def __init__(self, model: Any, arguments: dict[str, Any], *, reduced: bool) -> None:
        """Take over a model's weights; ``reduced`` computes under bfloat16 autocast, as sam2's examples do."""
        from sam2.sam2_video_predictor import SAM2VideoPredictor

        self._predictor = SAM2VideoPredictor(**arguments).eval().requires_grad_(False)
        self._predictor.load_state_dict(model.state_dict())
        self._device = next(model.parameters()).device
        self._predictor.to(self._device)
        self._reduced = reduced
        if not reduced:
            _keep_float32(self._predictor.memory_attention)
        self._mean, self._std = (torch.tensor(v)[:, None, None] for v in (IMAGE_MEAN, IMAGE_STD))

    def probabilities(
        self, query: Query, insertion: Insertion, class_values: Sequence[int]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (query slice, probability of each class in the slice's own pixels) for the slices walked to."""
        support, p = insertion.support, insertion.before
        volumes = [
            *((query.frames, n) for n in range(p)),
            *((support.frames, m) for m in range(len(support.frames))),
            *((query.frames, n) for n in range(p, len(query.frames))),
        ]
        images = torch.stack([self._normalised(frames, n) for frames, n in volumes])
        depth = len(support.frames)
        with self._ready(images), torch.inference_mode(), self._autocast():
            state = self._predictor.init_state("frames are handed over in memory")
            prompted = []
            for k, value in enumerate(class_values):
                masks_mss = support.frames.masks_to_model(support.label_zyx == value)
                for m in np.flatnonzero(masks_mss.any(axis=(1, 2))).tolist():
                    self._predictor.add_new_mask(state, p + m, k, torch.from_numpy(masks_mss[m]))
                    prompted.append(p + m)
            first = max(prompted) if insertion.reverse else min(prompted)
            steps = self._predictor.propagate_in_video(state, start_frame_idx=first, reverse=insertion.reverse)
            for t, _, logits_k1ss in steps:
                if not p <= t < p + depth:
                    prob_kss = torch.sigmoid(logits_k1ss[:, 0].float()).cpu().numpy()
                    yield t if t < p else t - depth, resize(prob_kss, query.frames.slice_shape_hw)

    def _normalised(self, frames: Frames, n: int) -> torch.Tensor:
        return (torch.from_numpy(frames.image(n)) - self._mean) / self._std

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._reduced)

    @contextmanager
    def _ready(self, images: torch.Tensor) -> Iterator[None]:
        """Hand frames over where the predictor would decode JPEG files: that time is not counted against it."""
        size = images.shape[-1]
        with (
            mock.patch("sam2.sam2_video_predictor.load_video_frames", return_value=(images, size, size)),
            mock.patch("sam2.sam2_video_predictor.tqdm", lambda steps, **_: steps),
        ):
            yield


def _keep_float32(attention: Any) -> None:
    """Hand memories over in float32: without autocast the predictor fails on its own bfloat16 ones.

    It does so wherever no object pointer is in reach, as for a class that is prompted later than another one.
    """
    forward = attention.forward
    attention.forward = lambda **given: forward(**{**given, "memory": given["memory"].float()})
