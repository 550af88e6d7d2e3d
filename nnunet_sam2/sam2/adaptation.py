"""A SAM 2 that can be trained: the same calls as the back end's, with gradients.

Shape letters: N images, M memory frames, K objects, S model size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import torch

from nnunet_sam2.sam2.backend import IMAGE_MEAN, IMAGE_STD
from nnunet_sam2.sam2.decoder import decode_frame
from nnunet_sam2.sam2.propagation import VideoWalker
from nnunet_sam2.sam2.protocol import Decoded, Embeddings, Sam2Backend

_NUMBERS = count()

DECODER_PREFIX = "sam_mask_decoder."
_SKIP_PROJECTIONS = ("conv_s0.", "conv_s1.")
"""Parts of the decoder that work on the image alone; their outputs are stored with the embeddings, so they stay."""


class LiveEmbeddings:
    """Hold feature maps that gradients flow through."""

    def __init__(self, maps: Sequence[torch.Tensor]) -> None:
        self._maps = maps
        self.key = f"live {next(_NUMBERS)}"  # never found among memories that were kept

    def __len__(self) -> int:
        return int(self._maps[0].shape[0])

    def top(self, index: int) -> torch.Tensor:
        """See `Embeddings.top`."""
        return self._maps[2][index]

    def high(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Embeddings.high`."""
        return self._maps[0][index], self._maps[1][index]


class TrainableSam2:
    """Answer as a back end would, under the caller's gradient mode, with a copy of its model."""

    def __init__(self, backend: Sam2Backend) -> None:
        self.model: Any = backend.model_copy()
        self._device = next(self.model.parameters()).device

    def encode(self, images_n3ss: np.ndarray) -> LiveEmbeddings:
        """Encode images (0 to 1) in float32."""
        mean, std = (torch.tensor(v, device=self._device)[:, None, None] for v in (IMAGE_MEAN, IMAGE_STD))
        images = (torch.from_numpy(np.asarray(images_n3ss, np.float32)).to(self._device) - mean) / std
        return LiveEmbeddings(self.model.forward_image(images)["backbone_fpn"])

    def recall(
        self, frame: tuple[Embeddings, int], memories: Sequence[tuple[Embeddings, int]], masks_mkss: np.ndarray
    ) -> torch.Tensor:
        """See `Sam2Backend.recall`."""
        # A walker of its own, for it keeps memories, and with them what they were computed from.
        return VideoWalker(self.model, self._device).recall(frame, memories, masks_mkss)

    def decode(self, embeddings: Embeddings, index: int, **prompts: Any) -> Decoded:
        """See `Sam2Backend.decode`."""
        return decode_frame(self.model, self._device, embeddings, index, **prompts)

    def train_decoder_only(self) -> list[torch.nn.Parameter]:
        """Turn gradients on for the mask decoder alone and return its parameters."""
        self.model.requires_grad_(False)
        trained = []
        for name, parameter in self.model.sam_mask_decoder.named_parameters():
            if not name.startswith(_SKIP_PROJECTIONS):
                trained.append(parameter.requires_grad_(True))
        return trained

    def decoder_weights(self) -> dict[str, torch.Tensor]:
        """Return the mask decoder's weights by their names in the whole model."""
        state = self.model.sam_mask_decoder.state_dict()
        return {DECODER_PREFIX + name: tensor.detach().clone() for name, tensor in state.items()}
