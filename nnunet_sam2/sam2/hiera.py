"""sam2's image encoder without work that is the same for every image."""

from __future__ import annotations

from typing import Any

import torch
from sam2.modeling.backbones.hieradet import Hiera


class KeptHiera(Hiera):
    """Keep the latest position embedding: interpolated anew for each image it is a tenth of a small encoder's time."""

    _kept: tuple[tuple[Any, ...], torch.Tensor] | None = None

    def _get_pos_embed(self, hw: tuple[int, int]) -> torch.Tensor:
        if torch.is_grad_enabled():
            return self._position(hw)
        parts = (self.pos_embed, self.pos_embed_window)
        # Weights that are trained or loaded in place count up their version; moved ones are others.
        where = self.pos_embed.device
        reduced = torch.is_autocast_enabled(where.type)
        key = (*hw, where, reduced, *((part.data_ptr(), part._version) for part in parts))
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._position(hw))
        return self._kept[1]

    def _position(self, hw: tuple[int, int]) -> torch.Tensor:
        position: torch.Tensor = super()._get_pos_embed(hw)
        return position
