"""What a step of a walk remembers of the walk itself: recent frames' locations and pointers, and how they are placed.

Which memories a frame reads, and with which encodings of distance, is ``SAM2Base``'s (sam2 1.1), rule for rule.
Shape letters: B objects, P locations of a frame, M locations or pointers of a memory, C features of a location,
D features of a memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from nnunet_sam2.sam2.memory_reading import OwnMemory
from nnunet_sam2.sam2.prompt_memories import Memory
from nnunet_sam2.sam2.tracks import Step


class Recent(NamedTuple):
    """Hold what an answered frame leaves behind."""

    offset: int
    spatial_pd: torch.Tensor | None
    pointer_c: torch.Tensor


class Past(NamedTuple):
    """Hold what one step reads of its own walk, pointers with their distance."""

    offset: int
    recent: list[Recent]
    pointers: list[tuple[int, torch.Tensor]]
    reach: int


class Pasts:
    """Say what steps read of their own walks, with the encodings of one SAM 2."""

    def __init__(self, model: Any, device: torch.device, memory_position: torch.Tensor) -> None:
        self._model = model
        self._device = device
        self._place_pd = memory_position[0].flatten(1).T

    def after(self, step: Step, left: Recent) -> tuple[Recent, ...]:
        """Return what frames after this one may still read."""
        reach = max(self._model.num_maskmem, step.root.pointer_limit) - 1
        kept = []
        for old in step.state or ():
            distance = step.offset + 1 - old.offset
            if distance <= reach:
                # Of frames farther away the pointer alone is read.
                kept.append(old if distance < self._model.num_maskmem else old._replace(spatial_pd=None))
        return (*kept, left)

    def read_by(self, step: Step, memories: Mapping[str, Memory]) -> Past:
        """Say which memories a step reads beside the prompted frames' locations; see ``SAM2Base``."""
        past: tuple[Recent, ...] = step.state or ()
        near = self._model.num_maskmem
        recent = [left for left in past if left.spatial_pd is not None and step.offset - left.offset < near]
        pointers = [
            (step.offset - prompt.offset, memories[prompt.memory][1][0])
            for prompt in step.root.prompts
            if prompt.offset <= step.offset
        ]
        reach = step.root.pointer_limit - 1
        pointers += [(step.offset - left.offset, left.pointer_c) for left in past if step.offset - left.offset <= reach]
        return Past(step.offset, recent, pointers, reach)

    def stacked(self, pasts: Sequence[Past]) -> OwnMemory | None:
        """Stack what objects with equally much past remember of their walks."""
        model = self._model
        tokens, positions = [], []
        for past in pasts:
            own = [left.spatial_pd.float() for left in past.recent if left.spatial_pd is not None]
            # The nearest frame has the first of the encodings of distance.
            where = [self._place_pd + model.maskmem_tpos_enc[past.offset - left.offset - 1, 0] for left in past.recent]
            if past.pointers:
                pointers_nc = torch.stack([pointer.float() for _, pointer in past.pointers])
                own.append(pointers_nc.reshape(-1, model.mem_dim))
                where.append(self._pointer_positions([distance for distance, _ in past.pointers], past.reach))
            if not own:
                return None
            tokens.append(torch.cat(own))
            positions.append(torch.cat(where))
        parts = model.hidden_dim // model.mem_dim
        return OwnMemory(
            tokens_bmd=torch.stack(tokens),
            positions_bmd=torch.stack(positions),
            pointers=len(pasts[0].pointers) * parts,
        )

    def _pointer_positions(self, distances: Sequence[int], reach: int) -> torch.Tensor:
        from sam2.modeling.sam2_utils import get_1d_sine_pe

        model = self._model
        parts = model.hidden_dim // model.mem_dim
        if not model.add_tpos_enc_to_obj_ptrs:
            return torch.zeros(len(distances) * parts, model.mem_dim, device=self._device)
        width = model.hidden_dim if model.proj_tpos_enc_in_obj_ptrs else model.mem_dim
        relative = torch.tensor(distances, device=self._device) / reach
        encoded: torch.Tensor = model.obj_ptr_tpos_proj(get_1d_sine_pe(relative, dim=width))
        return encoded.float().repeat_interleave(parts, dim=0)
