"""Clips for the second stage: prompted slices of one subject, then slices of another, drawn from a pool of families."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from embedded_sam2.teacher import model_input
from embedded_sam2.volumes import draw_family
from nnunet_sam2.storage import atomic_path, value_hash

SUBJECTS = 3
LEAST_PIXELS = 60
"""A structure smaller than this, at 256 px, is neither prompted nor counted as present."""
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Family:
    """Hold the subjects of one anatomy with the frozen encoder's features of every slice."""

    labels_cnss: np.ndarray
    """(subjects, slices, S, S) uint8."""
    areas_cnl: np.ndarray
    """Pixels of each label on each slice."""
    maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """Features (subjects, slices, C, H, W) float16: skip features fine and middle, and the coarsest."""

    def labels(self) -> list[int]:
        """Return the labels that at least two subjects show."""
        shown = (self.areas_cnl >= LEAST_PIXELS).any(axis=1).sum(axis=0)
        return [value for value in range(1, len(shown)) if shown[value] >= 2]


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """Hold B clips of one build: the first ``prompted`` frames carry masks, the others are asked for."""

    prompted: int
    maps_tb: list[list[torch.Tensor]]
    """For each frame three feature maps (B, C, H, W) float32, fine to coarse."""
    masks_tbss: torch.Tensor
    """(T, B, S, S) bool."""

    @property
    def length(self) -> int:
        """Return how many frames each clip has."""
        return int(self.masks_tbss.shape[0])


class Pool:
    """Make families when first asked for, keep them on disk with their features, and a number of them in memory."""

    def __init__(
        self, folder: Path, model: Any, *, encoder_hash: str, size: int, seed: int, count: int, slices: int = 8
    ) -> None:
        identity = {"format": _FORMAT, "encoder": encoder_hash, "size": size, "seed": seed, "slices": slices}
        self.folder = folder / f"pool_{value_hash(identity)[:12]}"
        self.count = count
        self._model, self._size, self._seed, self._slices = model, size, seed, slices
        self._kept: dict[int, Family] = {}

    def get(self, index: int) -> Family:
        """Return family ``index`` of the pool; negative ones are for validation."""
        if index not in self._kept:
            self._kept[index] = self._load(index)
        return self._kept[index]

    def _load(self, index: int) -> Family:
        path = self.folder / f"{index:05d}.safetensors"
        if not path.is_file():
            tensors = self._make(index)
            with atomic_path(path) as temporary:
                save_file(tensors, temporary)
        tensors = load_file(path)
        labels = tensors["labels"].numpy()
        areas = np.stack(
            [[np.bincount(plane.ravel(), minlength=int(labels.max()) + 1) for plane in case] for case in labels]
        )
        return Family(labels_cnss=labels, areas_cnl=areas, maps=(tensors["fine"], tensors["middle"], tensors["coarse"]))

    @torch.no_grad()
    def _make(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self._seed, 3, abs(index), int(index < 0)])
        cases = draw_family(rng, subjects=SUBJECTS, slices=self._slices, size=self._size)
        device = next(self._model.parameters()).device
        maps: list[list[torch.Tensor]] = [[], [], []]
        for case in cases:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                answer = self._model.forward_image(model_input(torch.from_numpy(case.image_nss).to(device)))
            for kept, features in zip(maps, answer["backbone_fpn"], strict=True):
                kept.append(features.float().cpu().half())
        fine, middle, coarse = (torch.stack(kept).contiguous() for kept in maps)
        labels = torch.from_numpy(np.ascontiguousarray(np.stack([case.labels_nss for case in cases])))
        return {"fine": fine, "middle": middle, "coarse": coarse, "labels": labels}


def draw_clips(
    pool: Pool, rng: np.random.Generator, *, batch_frames: int, device: torch.device, families: tuple[int, int]
) -> ClipBatch:
    """Draw a batch of clips of one random build; together about ``batch_frames`` frames.

    Between 1 and 8 slices of one or two supports are prompted; then come 1 to 6 neighbouring slices of the query, in
    either direction, mostly where the object is but also where it is not, at times of the support itself.
    """
    prompted = int(rng.choice([1, 2, 3, 4, 6, 8], p=[0.35, 0.2, 0.15, 0.15, 0.1, 0.05]))
    asked = int(rng.choice([1, 2, 3, 4, 6], p=[0.35, 0.2, 0.15, 0.15, 0.15]))
    clips = max(2, batch_frames // (prompted + asked))
    frames: list[list[tuple[Family, int, int, int]]] = []
    while len(frames) < clips:
        family = pool.get(int(rng.integers(*families)))
        values = family.labels()
        if values:
            frames.append(_draw_clip(family, int(rng.choice(values)), prompted, asked, rng))
    maps, masks = [], []
    for t in range(prompted + asked):
        now = [clip[t] for clip in frames]
        maps.append(
            [
                torch.stack([family.maps[level][c, n] for family, c, n, _ in now]).float().to(device)
                for level in range(3)
            ]
        )
        masks.append(torch.from_numpy(np.stack([family.labels_cnss[c, n] == value for family, c, n, value in now])))
    return ClipBatch(prompted=prompted, maps_tb=maps, masks_tbss=torch.stack(masks).to(device))


def _draw_clip(
    family: Family, value: int, prompted: int, asked: int, rng: np.random.Generator
) -> list[tuple[Family, int, int, int]]:
    present_cn = family.areas_cnl[:, :, value] >= LEAST_PIXELS
    with_object = np.flatnonzero(present_cn.any(axis=1))
    query = int(rng.choice(with_object))
    others = with_object[with_object != query]
    if rng.random() < 0.15 or len(others) == 0:
        others = np.array([query])
    places = np.argwhere(present_cn[others])
    chosen = places[rng.permutation(len(places))[:prompted]]
    if len(chosen) < prompted:
        chosen = np.concatenate([chosen, chosen[rng.integers(0, len(chosen), prompted - len(chosen))]])
    chosen = chosen[np.lexsort((chosen[:, 1], chosen[:, 0]))]
    clip = [(family, int(others[c]), int(n), value) for c, n in chosen]
    slices = present_cn.shape[1]
    asked_within = min(asked, slices)
    first = int(rng.integers(0, slices - asked_within + 1))
    if rng.random() < 0.75:
        middle = int(rng.choice(np.flatnonzero(present_cn[query])))
        first = int(np.clip(middle - rng.integers(0, asked_within), 0, slices - asked_within))
    order = list(range(first, first + asked_within))
    if rng.random() < 0.5:
        order, clip = order[::-1], clip[::-1]
    return clip + [(family, query, n, value) for n in order]
