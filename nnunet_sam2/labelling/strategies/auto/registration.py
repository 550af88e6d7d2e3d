"""A support bent onto a query, so that what was found in one first look lies on what it was found by.

The similarity is that of the labels (the support's own, the query's as a first look has them) and of the intensities:
organs that were found carry along what lies between them and was not. Smooth displacements of a coarse control grid are
found by Adam, as in ConvexAdam's second step (Siebert, Hansen, Heinrich, IEEE TMI 2024), whose features are others.

Shape letters: F features, Z Y X points of a coarse grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool3d, affine_grid, grid_sample, interpolate

from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.strategies.auto.alignment import Alignment

POINTS = 32
"""Points along the longer sides of a volume, about the resolution in which labels are transferred."""

_STEPS, _RATE = 50, 0.03
_POINTS_A_KNOT = 4
_STIFFNESS = 0.03
"""Weight of the squared gradient of the displacement, whose unit is half the query's extent for the support's whole."""


def coarse_shape(geometry: Geometry) -> tuple[int, int, int]:
    """Return a grid whose points are about equally far apart along all axes, `POINTS` along the longer two."""
    extent = np.array(geometry.shape_zyx) * np.array(geometry.spacing_zyx_mm)
    apart_mm = float(np.sqrt(np.prod(np.sort(extent)[1:]))) / POINTS
    z, y, x = (
        int(np.clip(round(length / apart_mm), 2, max(2, n)))
        for length, n in zip(extent, geometry.shape_zyx, strict=True)
    )
    return z, y, x


def coarse_features(frames: Frames, classes_kzyx: Sequence[np.ndarray]) -> torch.Tensor:
    """Return intensities (0 to 1) and classes (masks or probabilities) on the coarse grid, (1 + K, Z, Y, X)."""
    shape = coarse_shape(frames.geometry)
    grey_nhw = np.stack([frames.plane(n) for n in range(len(frames))])
    volumes = [frames.slices_back(grey_nhw[None])[0], *classes_kzyx]
    return torch.stack(
        [
            adaptive_avg_pool3d(torch.from_numpy(np.ascontiguousarray(v, dtype=np.float32))[None], shape)[0]
            for v in volumes
        ]
    )


def bend(start: Alignment, support_fzyx: torch.Tensor, query_fzyx: torch.Tensor) -> Alignment:
    """Return the alignment with the displacement that brings the features together; both on their coarse grids.

    Points that come to lie outside of the query count nowhere.
    """
    shape = tuple(support_fzyx.shape[1:])
    centres_zyx3 = affine_grid(torch.eye(3, 4)[None], [1, 1, *shape], align_corners=False)
    # torch's coordinates run from -1 to 1 and come as x, y, z.
    scale, offset = torch.tensor(start.scale_zyx).flip(0), torch.tensor(start.offset_zyx).flip(0)
    base_zyx3 = (centres_zyx3 + 1.0) * scale + 2.0 * offset - 1.0
    knots = [max(2, -(-n // _POINTS_A_KNOT)) for n in shape]
    moved_3zyx = torch.zeros((1, 3, *knots), requires_grad=True)
    optimizer = torch.optim.Adam([moved_3zyx], lr=_RATE)
    with torch.enable_grad():
        for _ in range(_STEPS):
            optimizer.zero_grad()
            grid_zyx3 = base_zyx3 + _spread(moved_3zyx, shape).permute(0, 2, 3, 4, 1)
            seen_fzyx = grid_sample(query_fzyx[None], grid_zyx3, align_corners=False, padding_mode="border")[0]
            inside_zyx = (grid_zyx3.detach().abs() <= 1.0).all(dim=-1)[0].float()
            apart_zyx = (seen_fzyx - support_fzyx).square().sum(dim=0) * inside_zyx
            apart = apart_zyx.sum() / inside_zyx.sum().clamp_min(1.0)
            (apart + _STIFFNESS * _bending(moved_3zyx)).backward()
            optimizer.step()
    with torch.no_grad():
        displacement_3zyx = 0.5 * _spread(moved_3zyx, shape)[0].flip(0)
    return replace(start, displacement_3zyx=displacement_3zyx.detach())


def _spread(knots_3zyx: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return interpolate(knots_3zyx, size=shape, mode="trilinear", align_corners=False)


def _bending(moved_3zyx: torch.Tensor) -> torch.Tensor:
    squares = [torch.diff(moved_3zyx, dim=axis).square().mean() * moved_3zyx.shape[axis] ** 2 for axis in (2, 3, 4)]
    return torch.stack(squares).sum()
