"""Meta's Hiera-tiny image encoder as the teacher: its features of an image, pooled to the student's grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from nnunet_sam2.sam2.backend import IMAGE_MEAN, IMAGE_STD
from nnunet_sam2.sam2.checkpoint import read_checkpoint, recognise
from nnunet_sam2.sam2.model import build_model, load_weights


class Teacher:
    """Encode images with a SAM 2 checkpoint at a size of the teacher's own."""

    def __init__(self, checkpoint: Path, *, size: int, device: torch.device) -> None:
        read = read_checkpoint(checkpoint)
        model: Any = build_model(recognise(read), size)
        load_weights(model, read.state, where=str(checkpoint))
        self.encoder = model.image_encoder.to(device)
        self.state = read.state
        self.sha256 = read.sha256
        self._size, self._device = size, device

    @torch.no_grad()
    def features(self, images_nss: np.ndarray, *, grid: int) -> torch.Tensor:
        """Return the coarsest features after the neck, averaged to ``grid``: (N, 256, grid, grid) float32 on the CPU.

        The images are square slices in 0 to 1; they are stretched to the teacher's size.
        """
        images = model_input(torch.from_numpy(images_nss).to(self._device))
        if images.shape[-1] != self._size:
            images = interpolate(images, size=(self._size, self._size), mode="bilinear", align_corners=False)
        with torch.autocast(self._device.type, dtype=torch.bfloat16):
            parts = [self.encoder(images[n : n + 4])["backbone_fpn"][2].float() for n in range(0, len(images), 4)]
        return adaptive_avg_pool2d(torch.cat(parts), grid).cpu()


def model_input(images_nss: torch.Tensor) -> torch.Tensor:
    """Turn grey slices in 0 to 1, (N, S, S), into what SAM 2's encoder takes, (N, 3, S, S)."""
    mean = torch.tensor(IMAGE_MEAN, device=images_nss.device)[:, None, None]
    std = torch.tensor(IMAGE_STD, device=images_nss.device)[:, None, None]
    return (images_nss[:, None].float() - mean) / std
