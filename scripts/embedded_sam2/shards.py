"""Synthetic images and the teacher's features of them, on disk, so that the teacher sees an image once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from embedded_sam2.teacher import Teacher
from embedded_sam2.volumes import draw_family
from nnunet_sam2.storage import atomic_path, file_hash, value_hash

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """Say what the shards hold; all of it goes into their folder's name."""

    teacher: Path
    teacher_size: int
    size: int
    seed: int
    families: int = 8
    """Anatomies a shard."""
    subjects: int = 2
    slices: int = 4
    """Slices of each subject."""

    @property
    def images(self) -> int:
        """Return how many images a shard holds."""
        return self.families * self.subjects * self.slices

    @property
    def grid(self) -> int:
        """Return the side of the student's coarsest grid."""
        return self.size // 16


class Shards:
    """Make shards when they are first asked for and read them afterwards."""

    def __init__(self, folder: Path, settings: ShardSettings, device: torch.device) -> None:
        self.settings = settings
        identity = {
            "format": _FORMAT,
            "teacher": file_hash(settings.teacher),
            **{k: v for k, v in vars(settings).items() if k != "teacher"},
        }
        self.folder = folder / f"shards_{settings.teacher_size}_{value_hash(identity)[:12]}"
        self._device = device
        self._teacher: Teacher | None = None

    @property
    def teacher(self) -> Teacher:
        """Return the teacher, loaded when first needed."""
        if self._teacher is None:
            self._teacher = Teacher(self.settings.teacher, size=self.settings.teacher_size, device=self._device)
        return self._teacher

    def get(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return shard ``index``: images (N, S, S) uint8 and the teacher's features (N, 256, G, G) float16."""
        path = self.folder / f"{index:05d}.safetensors"
        if not path.is_file():
            images = self._images(index)
            features = self.teacher.features(images.numpy().astype(np.float32) / 255, grid=self.settings.grid)
            with atomic_path(path) as temporary:
                save_file({"images": images, "features": features.half().contiguous()}, temporary)
        with safe_open(path, framework="pt") as handle:
            return handle.get_tensor("images"), handle.get_tensor("features")

    def _images(self, index: int) -> torch.Tensor:
        s = self.settings
        slices = []
        for family in range(s.families):
            rng = np.random.default_rng([s.seed, 1, index, family])
            for case in draw_family(rng, subjects=s.subjects, slices=s.slices, size=s.size, new_contrast=0.5):
                slices.append(case.image_nss)
        return torch.from_numpy(np.round(np.concatenate(slices) * 255).astype(np.uint8))
