"""Where to prompt: boxes, points and the regions that they are drawn from, on one slice.

Shape letters: K masks, h w pixels of a map that fills the frame. Places are (x, y) in pixels of that map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_sam2.frames import Frames

MORPHOLOGIES = ("none", "dilate", "erode", "open", "close")
ELEMENTS = ("square", "disk")


@dataclass(frozen=True, kw_only=True, eq=False)
class Seed:
    """Hold a positive point for one mask."""

    xy: np.ndarray
    exclusive: bool
    """False where other masks cover this one wholly, so that its seed lies in one of them too."""


def bounding_box(mask_hw: np.ndarray, padding: float = 0.0) -> np.ndarray:
    """Return (x0, y0, x1, y1) around a mask that is not empty, ``padding`` of its sides wider, within the frame."""
    height, width = mask_hw.shape
    rows, columns = np.flatnonzero(mask_hw.any(axis=1)), np.flatnonzero(mask_hw.any(axis=0))
    low = np.array([columns[0], rows[0]], np.float32)
    high = np.array([columns[-1] + 1, rows[-1] + 1], np.float32)
    margin = padding * (high - low)
    return np.concatenate([np.maximum(low - margin, 0), np.minimum(high + margin, [width, height])])


def model_boxes(masks_khw: Sequence[np.ndarray], padding: float, size: int) -> np.ndarray:
    """Return the masks' padded boxes in pixels at model size, (K, 4) float32."""
    height, width = masks_khw[0].shape
    scale_xyxy = np.tile(np.array([size / width, size / height], np.float32), 2)
    return np.stack([bounding_box(mask_hw, padding) * scale_xyxy for mask_hw in masks_khw]).clip(0, size - 1)


def deepest_point(mask_hw: np.ndarray) -> np.ndarray:
    """Return (x, y) of the pixel centre farthest from the mask's border, the frame's border included.

    Unlike a centroid it lies inside whatever the shape, a ring's among them.
    """
    from scipy.ndimage import distance_transform_edt

    depth_hw = distance_transform_edt(np.pad(mask_hw, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth_hw.argmax()), depth_hw.shape)
    return np.array([column + 0.5, row + 0.5], np.float32)


def seeds(masks_khw: Sequence[np.ndarray]) -> list[Seed]:
    """Place one seed for each mask: the deepest point of what no other mask covers (after Keuth et al., ADSMI 2024).

    There it is the centroid, which for a ring or a crescent falls outside.
    """
    covered_hw = np.sum(np.asarray(masks_khw, dtype=np.int32), axis=0)
    found = []
    for mask_hw in masks_khw:
        own_hw = mask_hw & (covered_hw == 1)
        exclusive = bool(own_hw.any())
        found.append(Seed(xy=deepest_point(own_hw if exclusive else mask_hw), exclusive=exclusive))
    return found


def seed_prompts(
    placed: Sequence[Seed], classes: Sequence[int], scale_xy: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Give each mask its own seed as positive point and those of other classes as negative ones.

    ``classes`` says which class each mask belongs to: pieces of one class are no evidence against each other. Returns
    (xy_p2, positive_p) pairs, scaled by ``scale_xy``.
    """
    prompts = []
    for i, seed in enumerate(placed):
        others = [other.xy for j, other in enumerate(placed) if classes[j] != classes[i]]
        xy_p2 = np.stack([seed.xy, *others]).astype(np.float32) * scale_xy
        prompts.append((xy_p2, np.arange(len(xy_p2)) == 0))
    return prompts


def voxel_places(xy: np.ndarray, frames: Frames) -> list[float]:
    """Return places (x, y, x, y ...) in pixels at model size as voxels of a slice, to a tenth, for records."""
    height, width = frames.slice_shape_hw
    scale = np.tile([width / frames.size, height / frames.size], len(xy) // 2)
    return [round(float(v), 1) for v in xy * scale]


def morph(mask_hw: np.ndarray, operation: str, element: str, radius: float) -> np.ndarray:
    """Dilate, erode, open or close a mask by a square or disk of ``radius`` pixels; the frame's border erodes nothing.

    Returns the mask itself where nothing would be left of it.
    """
    if operation not in MORPHOLOGIES or element not in ELEMENTS:
        raise ValueError(f"no morphology {operation} with a {element}")
    if operation == "none" or radius <= 0:
        return mask_hw
    if operation == "dilate":
        result_hw = _dilated(mask_hw, element, radius)
    elif operation == "erode":
        result_hw = ~_dilated(~mask_hw, element, radius)
    elif operation == "open":
        result_hw = _dilated(~_dilated(~mask_hw, element, radius), element, radius) & mask_hw
    else:
        result_hw = ~_dilated(~_dilated(mask_hw, element, radius), element, radius) | mask_hw
    return result_hw if result_hw.any() else mask_hw


def _dilated(mask_hw: np.ndarray, element: str, radius: float) -> np.ndarray:
    from scipy.ndimage import distance_transform_edt, maximum_filter

    if not mask_hw.any():
        return mask_hw
    if element == "square":
        return np.asarray(maximum_filter(mask_hw.astype(np.uint8), size=2 * round(radius) + 1, mode="constant")) > 0
    return np.asarray(distance_transform_edt(~mask_hw) <= radius)
