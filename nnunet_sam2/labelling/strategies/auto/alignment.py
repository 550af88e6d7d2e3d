"""Where a support's points lie in a query: what makes places mean anatomy although two scans show different parts.

Places are fractions of a volume's extent along each axis, 0 at its first voxel's outer face and 1 at its last one's.
Shape letters: N slices, P locations of a slice, Z Y X points of a coarse grid over the support.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import grid_sample

from nnunet_sam2.labelling.strategies.auto.zoom import Box


@dataclass(frozen=True, kw_only=True, eq=False)
class Alignment:
    """Send places of a support to places of a query: along each axis in proportion, and a displacement on top."""

    scale_zyx: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset_zyx: tuple[float, float, float] = (0.0, 0.0, 0.0)
    displacement_3zyx: torch.Tensor | None = None
    """In fractions of the query's extent, at the centres of a regular grid over the support, (3, Z, Y, X)."""

    def with_axis(self, axis: int, scale: float, offset: float) -> Alignment:
        """Return the alignment with another proportion along one axis."""
        scales, offsets = list(self.scale_zyx), list(self.offset_zyx)
        scales[axis], offsets[axis] = scale, offset
        return replace(
            self, scale_zyx=(scales[0], scales[1], scales[2]), offset_zyx=(offsets[0], offsets[1], offsets[2])
        )

    def send(self, places_m3: torch.Tensor) -> torch.Tensor:
        """Return where the support's places (z, y, x) lie in the query, (M, 3)."""
        sent_m3 = places_m3 * torch.tensor(self.scale_zyx) + torch.tensor(self.offset_zyx)
        if self.displacement_3zyx is None:
            return sent_m3
        # Beyond the outermost centres the displacement of the nearest one holds.
        where = (2.0 * places_m3.flip(1) - 1.0)[None, :, None, None]
        moved = grid_sample(self.displacement_3zyx[None], where, align_corners=False, padding_mode="border")
        return sent_m3 + moved[0, :, :, 0, 0].T

    def cells(self, support_part: Part, query_part: Part, *, slice_axis: int, slices: int, grid: int) -> torch.Tensor:
        """Return where each cell of a part of the support lies in a part of the query, (N, P, 3).

        As (row, column, depth) in fractions of the query's part; outside of it they are below 0 or above 1.
        """
        counts = [slices if axis == slice_axis else grid for axis in range(3)]
        centres = [
            low + (torch.arange(count) + 0.5) / count * (high - low)
            for count, low, high in zip(counts, support_part.start_zyx, support_part.stop_zyx, strict=True)
        ]
        sent_m3 = self.send(torch.cartesian_prod(*centres))
        start, stop = torch.tensor(query_part.start_zyx), torch.tensor(query_part.stop_zyx)
        within = ((sent_m3 - start) / (stop - start)).reshape(*counts, 3)
        rows_and_columns = [axis for axis in range(3) if axis != slice_axis]
        return within.movedim(slice_axis, 0)[..., [*rows_and_columns, slice_axis]].reshape(slices, grid * grid, 3)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Bound a part of a volume in fractions of its extent."""

    start_zyx: tuple[float, float, float] = (0.0, 0.0, 0.0)
    stop_zyx: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @classmethod
    def of(cls, box: Box, shape_zyx: Sequence[int]) -> Part:
        """Return a box as fractions of the volume that it lies in."""
        z, y, x = (a / n for a, n in zip(box.start_zyx, shape_zyx, strict=True))
        stop_z, stop_y, stop_x = (b / n for b, n in zip(box.stop_zyx, shape_zyx, strict=True))
        return cls(start_zyx=(z, y, x), stop_zyx=(stop_z, stop_y, stop_x))
