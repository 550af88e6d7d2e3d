"""Three-dimensional components of label maps: which of them to believe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy.ndimage import find_objects

Keep = Literal["largest", "confident"]

SINGLE_COMPONENT_SHARE = 0.95
"""Share of a class's voxels that its largest component holds in every labelled case where the class is one piece."""

_CONNECTIVITY = 26


LEAST_SHARE = 0.1
"""Part of the largest component's voxels that a confident component must have; single voxels are easily sure."""


def measured_components(mask_zyx: np.ndarray, prob_zyx: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the 26-connected components of a mask, numbered from 1, their voxel counts and mean probabilities.

    Without ``prob_zyx`` the means are not computed and zero. Numbers follow array order.
    """
    import cc3d

    components_zyx, count = cc3d.connected_components(
        np.ascontiguousarray(mask_zyx, dtype=np.uint8), connectivity=_CONNECTIVITY, return_N=True
    )
    flat = components_zyx.ravel()
    voxels = np.bincount(flat, minlength=count + 1)[1:]
    if prob_zyx is None:
        return components_zyx, voxels, np.zeros(count)
    return components_zyx, voxels, np.bincount(flat, weights=prob_zyx.ravel(), minlength=count + 1)[1:] / voxels


def most_confident(voxels: np.ndarray, means: np.ndarray, least_share: float = LEAST_SHARE) -> int:
    """Return which component has the highest mean probability of those with ``least_share`` of the largest's voxels.

    The rule is that of Keuth et al. (ADSMI 2024), which has no lower bound and falls for single voxels. The first wins
    a tie.
    """
    return int(np.argmax(np.where(voxels >= least_share * voxels.max(), means, -1.0)))


def keep_component(mask_zyx: np.ndarray, prob_zyx: np.ndarray | None = None, *, keep: Keep = "largest") -> np.ndarray:
    """Reduce a boolean mask to one 26-connected component.

    ``largest`` keeps the one with most voxels (SSL-MedSAM2, arXiv 2512.11548), ``confident`` what `most_confident`
    chooses by ``prob_zyx``. Ties go to the component met first in array order.
    """
    if keep != "largest" and prob_zyx is None:
        raise ValueError("keep='confident' needs prob_zyx")
    components_zyx, voxels, means = measured_components(mask_zyx, None if keep == "largest" else prob_zyx)
    if len(voxels) <= 1:
        return mask_zyx.astype(bool)
    chosen = int(np.argmax(voxels)) if keep == "largest" else most_confident(voxels, means)
    return np.asarray(components_zyx == chosen + 1)


def single_component_classes(
    labels_zyx: Sequence[np.ndarray], class_values: Sequence[int], *, share: float = SINGLE_COMPONENT_SHARE
) -> tuple[int, ...]:
    """Find the classes that are one piece in every labelled case that has them.

    A class that no case has is not among them: nothing is known about it.
    """
    single = []
    for value in class_values:
        shares = [s for s in (_largest_share(label_zyx == value) for label_zyx in labels_zyx) if s is not None]
        if shares and min(shares) >= share:
            single.append(int(value))
    return tuple(single)


def filter_components(
    label_zyx: np.ndarray, prob_czyx: np.ndarray, class_values: Sequence[int], *, keep: Mapping[int, Keep]
) -> tuple[np.ndarray, dict[int, int]]:
    """Reduce the classes named in ``keep`` to one component each.

    A voxel that its class loses goes to the most probable of the others, unless that is again a component that was
    dropped; then it is background. ``prob_czyx`` has the background as channel 0. Returns the new label map and the
    number of voxels taken from each class.
    """
    channels = {value: channel for channel, value in enumerate(class_values, start=1) if value in keep}
    taken = dict.fromkeys(channels, 0)
    lost_zyx = np.zeros(label_zyx.shape, bool)
    for value, (part, dropped) in _dropped(label_zyx, prob_czyx, channels, keep).items():
        taken[value] = int(np.count_nonzero(dropped))
        lost_zyx[part] |= dropped
    if not any(taken.values()):
        return label_zyx, taken
    result_zyx = label_zyx.copy()
    prob_cv = prob_czyx[:, lost_zyx]
    values = np.array([0, *class_values], dtype=label_zyx.dtype)
    prob_cv[np.searchsorted(values, label_zyx[lost_zyx]), np.arange(prob_cv.shape[1])] = -1.0
    result_zyx[lost_zyx] = values[np.argmax(prob_cv, axis=0)]
    for part, dropped in _dropped(result_zyx, prob_czyx, channels, keep).values():
        result_zyx[part][dropped] = 0
    return result_zyx, taken


def _dropped(
    label_zyx: np.ndarray, prob_czyx: np.ndarray, channels: Mapping[int, int], keep: Mapping[int, Keep]
) -> dict[int, tuple[tuple[slice, ...], np.ndarray]]:
    """Return the box around each class that is there, and what the class loses within it to its one component."""
    # Boxes of all classes in one pass: most are a small part of the volume, and so is what there is to do.
    boxes = find_objects(label_zyx, max_label=max(channels, default=1))
    dropped = {}
    for value, channel in channels.items():
        part = boxes[value - 1]
        if part is not None:
            mask_zyx = label_zyx[part] == value
            dropped[value] = part, mask_zyx & ~keep_component(mask_zyx, prob_czyx[channel][part], keep=keep[value])
    return dropped


def _largest_share(mask_zyx: np.ndarray) -> float | None:
    total = int(mask_zyx.sum())
    return None if total == 0 else float(keep_component(mask_zyx).sum()) / total
