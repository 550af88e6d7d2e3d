"""What can be seen of a pseudo-label without its ground truth.

Shape letters: C channels (background first), z y x voxels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter

from nnunet_sam2.labelling.member import PseudoLabel

_SURE, _POSSIBLE = 0.5, 1.0 / 3.0
"""Probabilities at which stability is measured; SAM's own score takes logits around 0 in the same way."""

_BLUR_VOXELS = 1.0
_MARGIN = 4


@dataclass(frozen=True, kw_only=True)
class Features:
    """Hold what is seen of one class of one pseudo-label; all from 0 to 1, and higher speaks for the label."""

    voxels: int
    shown_in: float
    """Share of the labelled cases that show the class: says what an empty label means."""
    reverse: Mapping[str, float] = field(default_factory=dict)
    """Dice of a labelled case when the query with its pseudo-label is the only support, by that case's id."""
    agreement: Mapping[str, float] = field(default_factory=dict)
    """Dice of the pseudo-label with what a single labelled case would have made of the query, by that case's id."""
    inside: float | None = None
    """Mean probability of the class where the label has it."""
    rim: float | None = None
    """Mean probability of the label's own value within one voxel of the class's border; recorded, not used."""
    stability: float | None = None
    """Dice of the label where it is sure with all voxels where the class is possible."""
    smoothness: float | None = None
    """Dice of the label with itself after a blur by one voxel: organs are smooth, and slices of them follow on."""
    core: float | None = None
    """Share of the label's voxels whose neighbours all are of the label: what is frayed has little of it."""
    supports: float | None = None
    """Mean Dice of what two supports would have made of the class by their own votes, where a strategy counts them."""
    typical: Mapping[str, float] = field(default_factory=dict)
    """``smoothness`` and ``core`` of the labelled cases' own labels, on average: what they are in this class."""
    members: float | None = None
    """Mean Dice of the members with what they were fused to, where there are several."""
    sam_iou: float | None = None
    """SAM 2's own estimate of the IoU, averaged over members and slices, where members carry it."""

    @property
    def columns(self) -> dict[str, float | None]:
        """Return the values that an estimate is made of, by name."""
        found = list(self.reverse.values())
        agreed = list(self.agreement.values())
        return {
            "reverse_least": min(found) if found else None,
            "reverse_best": max(found) if found else None,
            "agreement": sum(agreed) / len(agreed) if agreed else None,
            "inside": self.inside,
            "stability": self.stability,
            "smoothness": self.smoothness,
            "core": self.core,
            "supports": self.supports,
            "members": self.members,
            # As a Dice, like the others.
            "sam_iou": None if self.sam_iou is None else 2.0 * self.sam_iou / (1.0 + self.sam_iou),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the features as a JSON value."""
        maps = {"reverse": dict(self.reverse), "agreement": dict(self.agreement), "typical": dict(self.typical)}
        return {**asdict(self), **maps}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Features:
        """Rebuild features from `to_json`."""
        return cls(**value)


CaseFeatures = dict[int, Features]
"""The features of every class of one case, by class value."""


def confidence_features(label_zyx: np.ndarray, prob_czyx: np.ndarray, channel: int, value: int) -> dict[str, float]:
    """Compute what label and probabilities (0 to 1) say by themselves of a class that the label has."""
    mask_zyx = label_zyx == value
    crop = _around(mask_zyx)
    prob_zyx = prob_czyx[channel]
    sure = int(np.count_nonzero(mask_zyx & (prob_zyx > _SURE)))
    total = int(np.count_nonzero(mask_zyx)) + int(np.count_nonzero(prob_zyx > _POSSIBLE))
    core_zyx = _core(mask_zyx[crop])
    return {
        "inside": float(prob_zyx[mask_zyx].mean(dtype=np.float64)),
        "rim": _rim(mask_zyx[crop], core_zyx, prob_zyx[crop]),
        "stability": 2.0 * sure / total,
        **_shape(mask_zyx[crop], core_zyx),
    }


def shape_features(mask_zyx: np.ndarray) -> dict[str, float]:
    """Compute what the shape of a class says by itself; the mask must not be empty."""
    mask_zyx = mask_zyx[_around(mask_zyx)]
    return _shape(mask_zyx, _core(mask_zyx))


def member_features(pseudo: PseudoLabel, class_values: Sequence[int]) -> dict[int, dict[str, float | None]]:
    """Read ``members``, ``supports`` and ``sam_iou`` from what fusion and members recorded; None where they did not."""
    agreement = pseudo.record.get("agreement") or {}
    members = pseudo.record.get("members", ())
    return {
        value: {
            "members": agreement.get(str(value)),
            "supports": _mean([float(x) for m in members if (x := _supports_of(m).get(str(value))) is not None]),
            "sam_iou": _mean([iou for member in members for iou in _ious_of(member, value)]),
        }
        for value in class_values
    }


def _supports_of(member: Mapping[str, Any]) -> Mapping[str, float | None]:
    found = member.get("supports_agree")
    return found if isinstance(found, Mapping) else {}


def _ious_of(member: Mapping[str, Any], value: int) -> list[float]:
    """Collect the IoU that SAM 2 estimated of a class, from wherever strategies record it: member, slices, prompts."""
    found: list[Any] = []
    key = str(value)
    for entry in (member, *_entries(member.get("slices"))):
        classes = entry.get("classes")
        if isinstance(classes, Mapping) and isinstance(classes.get(key), Mapping):
            found += [classes[key].get("estimated_iou"), classes[key].get("iou")]
    for prompt in _entries(member.get("prompts")):
        found += [piece.get("iou") for piece in _entries(prompt.get("pieces")) if piece.get("class") == value]
    # Of several passes the last one drew the mask.
    last = [entry[-1] if isinstance(entry, list) and entry else entry for entry in found]
    return [float(iou) for iou in last if isinstance(iou, (int, float))]


def _entries(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _around(mask_zyx: np.ndarray) -> tuple[slice, ...]:
    """Return the box around a mask with a margin that blurring and dilation need."""
    extent = [np.flatnonzero(mask_zyx.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return tuple(slice(max(0, int(e[0]) - _MARGIN), int(e[-1]) + 1 + _MARGIN) for e in extent)


def _shape(mask_zyx: np.ndarray, core_zyx: np.ndarray) -> dict[str, float]:
    share = int(np.count_nonzero(core_zyx)) / int(np.count_nonzero(mask_zyx))
    return {"smoothness": _smoothness(mask_zyx), "core": share}


def _core(mask_zyx: np.ndarray) -> np.ndarray:
    return np.asarray(binary_erosion(mask_zyx, border_value=1))


def _rim(mask_zyx: np.ndarray, core_zyx: np.ndarray, prob_zyx: np.ndarray) -> float:
    inner = mask_zyx & ~core_zyx
    outer = binary_dilation(mask_zyx) & ~mask_zyx
    values = np.concatenate([prob_zyx[inner], 1.0 - prob_zyx[outer]])
    # A label that fills the whole image has no rim.
    return float(values.mean(dtype=np.float64)) if len(values) else float(prob_zyx.mean(dtype=np.float64))


def _smoothness(mask_zyx: np.ndarray) -> float:
    smooth_zyx = gaussian_filter(mask_zyx.astype(np.float32), _BLUR_VOXELS, mode="nearest") > 0.5
    total = int(np.count_nonzero(mask_zyx)) + int(np.count_nonzero(smooth_zyx))
    return 2.0 * int(np.count_nonzero(mask_zyx & smooth_zyx)) / total
