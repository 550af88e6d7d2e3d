"""What a labelling strategy may ask of a SAM 2.

Shape letters: N frames, K objects or prompts, S model size in pixels, C embedding channels, H W embedding grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from nnunet_sam2.frames import Frames


@dataclass(frozen=True, kw_only=True)
class Sam2Spec:
    """Identify a model: whatever changes an embedding or a mask is in here."""

    name: str
    checkpoint_hash: str
    image_size: int
    has_memory: bool
    """False where the checkpoint holds no trained video memory (an image model): `propagate` then refuses."""
    precision: str = "float32"
    """Number format of the factors in the image encoder and in memory attention: "float32" or "bfloat16"."""
    config: str = ""
    """Name of the architecture."""
    origin: str
    """One sentence for reports: where the weights come from, or that they are untrained."""


class Embeddings(Protocol):
    """Hold the features of N frames; they may lie on disk and are read when asked for."""

    @property
    def key(self) -> str:
        """Return a hash of the frames and the model: equal keys mean equal features."""
        ...

    def __len__(self) -> int: ...

    def top(self, index: int) -> torch.Tensor:
        """Return frame ``index``'s coarsest features after the neck, (C, H, W) float32, without no-memory embedding."""
        ...

    def high(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the decoder's skip features of one frame: (C/8, 4H, 4W) and (C/4, 2H, 2W), float32."""
        ...


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Hold the decoder's answer to K prompts on one frame."""

    logits_kss: torch.Tensor
    """Mask logits at model size, (K, S, S)."""
    low_res_logits_khw: torch.Tensor
    """Mask logits at a quarter of the model size; may be given back as a mask prompt."""
    iou_k: torch.Tensor
    """The model's own estimate of each mask's IoU, (K,), 0 to 1."""
    object_score_k: torch.Tensor | None = None
    """Logit of the object's presence on the frame, (K,); says something only where memory was read."""


@dataclass(frozen=True, kw_only=True)
class Propagated:
    """Hold K objects' masks on one frame of a pseudo-video."""

    frame: int
    logits_kss: torch.Tensor
    object_score_k: torch.Tensor
    """Logit of the object's presence on this frame, (K,)."""
    iou_k: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoWalk:
    """Lay out one walk of K objects through a pseudo-video, as `Sam2Backend.propagate` takes it."""

    video: Sequence[tuple[Embeddings, int]]
    masks_kss: Mapping[int, np.ndarray]
    reverse: bool = False
    asked: frozenset[int] | None = None
    """Positions in the video whose answers are wanted; the walk ends at the last of them. None means all."""


class Sam2Backend(Protocol):
    """Encode frames once, then answer prompts on single frames and carry masks through pseudo-videos."""

    @property
    def spec(self) -> Sam2Spec: ...

    def embed(self, frames: Frames) -> Embeddings:
        """Encode every frame, or find the embeddings in the cache."""
        ...

    def decode(
        self,
        embeddings: Embeddings,
        index: int,
        *,
        boxes_k4: np.ndarray | None = None,
        points: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
        mask_logits_khw: torch.Tensor | None = None,
        features_kchw: torch.Tensor | None = None,
        gate_khw: torch.Tensor | None = None,
        several: bool = False,
    ) -> Decoded:
        """Answer K prompts on one frame.

        ``boxes_k4`` are (x0, y0, x1, y1) and ``points`` (xy_p2, positive_p) pairs, one a prompt, in pixels at model
        size; ``mask_logits_khw`` are logits at a quarter of the model size. ``features_kchw`` are the frame's features
        after `recall`, which ask for a mask by themselves. At least one kind must be given. ``gate_khw`` (0 to 1, any
        size) bounds where the decoder's tokens read the image. ``several`` takes the best of three masks by their own
        IoU, as SAM 2 does where a prompt says little.
        """
        ...

    def recall(
        self,
        frame: tuple[Embeddings, int],
        memories: Sequence[tuple[Embeddings, int]],
        masks_mkss: np.ndarray,
    ) -> torch.Tensor:
        """Return a frame's coarsest features after attention to M other frames with K objects' masks, (K, C, H, W).

        ``masks_mkss`` is bool; every object has a mask on every frame. The last of the frames stands nearest in time.
        """
        ...

    def propagate(
        self,
        video: Sequence[tuple[Embeddings, int]],
        masks_kss: Mapping[int, np.ndarray],
        *,
        reverse: bool = False,
    ) -> list[Propagated]:
        """Carry K objects through the pseudo-video ``video``, a list of (embeddings, frame index) pairs.

        ``masks_kss`` maps positions in the video to boolean masks (K, S, S), the prompts. An object's empty mask is
        never sent. The walk starts at the first prompted frame (the last with ``reverse``) and answers for every frame
        from there on that has no prompt.
        """
        ...

    def walk(
        self,
        video: Sequence[tuple[Embeddings, int]],
        masks_kss: Mapping[int, np.ndarray],
        *,
        reverse: bool = False,
    ) -> Iterator[Propagated]:
        """Yield what `propagate` returns frame by frame, so that a long video's masks never lie in memory together."""
        ...

    def walk_many(self, walks: Sequence[VideoWalk]) -> Iterator[tuple[int, Propagated]]:
        """Yield (number of the walk, answer) for many walks that advance together.

        Each walk's frames come in its order; those of different walks come mixed. What walks have in common is
        computed once.
        """
        ...

    def computing(self, *, reduced: bool = False, gradients: bool = False) -> AbstractContextManager[None]:
        """Set the back end's threads, and whether to reduce precision and to keep gradients, for a while."""
        ...

    def model_copy(self) -> Any:
        """Return a copy of the model (sam2's own class, float32) that an adaptation may train."""
        ...

    def adapted(self, changed: Mapping[str, torch.Tensor], *, name: str) -> Sam2Backend:
        """Return a back end with some weights replaced; its name and its hash tell that, so that nothing is mixed."""
        ...
