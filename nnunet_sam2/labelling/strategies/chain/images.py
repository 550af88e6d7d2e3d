"""A single image made ready for a chain: one side, no artefacts, and one point that says where the subject is.

Shape letters: S model size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_sam2.frames import Frames
from nnunet_sam2.labelling.components import measured_components
from nnunet_sam2.labelling.prompting.prompts import bounding_box, deepest_point, morph, voxel_places

THRESHOLDS = ("triangle", "otsu", "li")

_LEAST_CONTRAST = 1e-3
_HALO = 0.01
"""How far around a removed piece its blurred rim reaches, as a part of the frame's side."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadyImage:
    """Hold an image as the chain sees it, with its automatic prompt."""

    image_3ss: np.ndarray
    """0 to 1; mirrored where ``flipped``."""
    subject_ss: np.ndarray
    """The largest piece above the threshold, its holes filled, (S, S) bool."""
    point_xy: np.ndarray
    """The subject's deepest point, (2,) in pixels at model size."""
    flipped: bool
    record: dict[str, Any]
    """JSON value: which threshold, which piece, which point, in voxels of the image as it was."""


def ready_image(
    frames: Frames, index: int, *, threshold: str = "triangle", laterality: bool = True, artefacts: bool = True
) -> ReadyImage:
    """Find the subject of an image and prompt it with one point, as the mammogram pseudo-video does.

    The image (mean of its channels) is cut at the ``triangle``, ``otsu`` or ``li`` threshold; the largest
    8-connected piece is the subject, its deepest point the prompt. With ``laterality`` an image whose subject lies on
    the right is mirrored; with ``artefacts`` all other pieces, such as labels and film edges, are painted over with the
    background's median. (Triangle, because on X-rays the dark background is the one peak of the histogram: Otsu's
    rule, which wants two, parts dense tissue from fat instead.)
    """
    image_3ss = frames.image(index)
    grey_ss = image_3ss.mean(axis=0)
    cut, above_ss = _above(grey_ss, threshold)
    (pieces_ss,), areas, _ = measured_components(above_ss[None], None)
    largest = int(np.argmax(areas))
    subject_ss = _filled(pieces_ss == largest + 1)
    point_xy = deepest_point(subject_ss)
    size = frames.size
    record: dict[str, Any] = {
        "threshold": {"method": threshold, "value": round(cut, 4), "intensity": _intensity(frames, cut)},
        "component": {
            "chosen": "largest",
            "of": len(areas),
            "share_of_image": round(float(subject_ss.mean()), 4),
            "box": voxel_places(bounding_box(subject_ss), frames),
        },
        "point": voxel_places(point_xy, frames),
        "flipped": False,
        "removed_share_of_image": 0.0,
    }
    if artefacts and len(areas) > 1:
        others_ss = morph(above_ss & ~subject_ss, "dilate", "square", round(_HALO * size)) & ~subject_ss
        image_3ss = image_3ss.copy()
        outside_ss = ~above_ss & ~others_ss
        for channel_ss in image_3ss:
            channel_ss[others_ss] = np.median(channel_ss[outside_ss]) if outside_ss.any() else 0.0
        record["removed_share_of_image"] = round(float(others_ss.mean()), 4)
    flipped = laterality and _lies_right(subject_ss)
    if flipped:
        image_3ss, subject_ss = (np.ascontiguousarray(array[..., ::-1]) for array in (image_3ss, subject_ss))
        point_xy = np.array([size - point_xy[0], point_xy[1]], np.float32)
        record["flipped"] = True
    return ReadyImage(image_3ss=image_3ss, subject_ss=subject_ss, point_xy=point_xy, flipped=flipped, record=record)


def cleaned(mask_ss: np.ndarray) -> np.ndarray:
    """Reduce a mask to its largest 8-connected piece with its holes filled; an empty mask stays empty."""
    if not mask_ss.any():
        return mask_ss
    (pieces_ss,), areas, _ = measured_components(mask_ss[None], None)
    return _filled(pieces_ss == int(np.argmax(areas)) + 1)


def _above(grey_ss: np.ndarray, method: str) -> tuple[float, np.ndarray]:
    from skimage import filters

    if method not in THRESHOLDS:
        raise ValueError(f"no threshold {method}; choose one of {', '.join(THRESHOLDS)}")
    if float(grey_ss.max()) - float(grey_ss.min()) < _LEAST_CONTRAST:
        return float(grey_ss.min()), np.ones(grey_ss.shape, bool)  # nothing to part: all of it is the subject
    cut = float(getattr(filters, f"threshold_{method}")(grey_ss))
    above_ss = grey_ss > cut
    return cut, above_ss if above_ss.any() else grey_ss >= cut


def _filled(mask_ss: np.ndarray) -> np.ndarray:
    from scipy.ndimage import binary_fill_holes

    return np.asarray(binary_fill_holes(mask_ss), bool)


def _lies_right(mask_ss: np.ndarray) -> bool:
    columns = mask_ss.sum(axis=0, dtype=np.float64)
    return float(columns @ (np.arange(len(columns)) + 0.5)) / float(columns.sum()) > len(columns) / 2


def _intensity(frames: Frames, value: float) -> float | None:
    """Return a frame's value in the units of the image; None where several channels make it up."""
    if len(set(frames.channels)) > 1:
        return None
    low, high = frames.windows[frames.channels[0]]
    return round(low + value * (high - low), 4)
