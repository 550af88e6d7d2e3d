"""Many members become one pseudo-label."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from nnunet_sam2.labelling.components import Keep, filter_components
from nnunet_sam2.labelling.member import Member, PseudoLabel

COMPONENTS = ("auto", "largest", "confident", "none")
"""Ways to choose which 3D components of a class to keep."""

GIVEN = "given"
"""Among a strategy's own options: the way that labelling as a whole was given."""


@dataclass(frozen=True, kw_only=True)
class FusionOptions:
    """Say how members become a label map with its confidence."""

    components: Literal["auto", "largest", "confident", "none"] = "auto"
    """Which 3D component of a class to keep: ``auto`` keeps the largest of classes in ``single_component_classes``."""
    single_component_classes: tuple[int, ...] = ()
    """Class values that are one piece in the labelled cases; only ``auto`` reads it."""
    confidence: Literal["entropy", "margin"] = "entropy"
    """``entropy``: 1 - binary entropy (bits) of the label's mean probability; ``margin``: its distance from a half."""

    def __post_init__(self) -> None:
        if self.components not in COMPONENTS:
            raise ValueError(f"components={self.components}: choose one of {', '.join(COMPONENTS)}")
        if self.confidence not in ("entropy", "margin"):
            raise ValueError(f"confidence={self.confidence}: choose entropy or margin")

    def with_components(self, components: str) -> FusionOptions:
        """Return these options with another way to choose components, or as they are for `GIVEN`."""
        return self if components == GIVEN else replace(self, components=components)  # type: ignore[arg-type]  # checked

    def keep(self, class_values: Sequence[int]) -> dict[int, Keep]:
        """Return the classes to reduce to one component, with the rule for each."""
        if self.components == "none":
            return {}
        if self.components == "auto":
            return {value: "largest" for value in class_values if value in self.single_component_classes}
        return dict.fromkeys(class_values, self.components)


@dataclass
class _Sums:
    """Running sums over members, so that fifty of them never lie in memory together."""

    prob_kzyx: np.ndarray
    weight_k: np.ndarray
    background_zyx: np.ndarray | None = None
    count: int = 0
    packed_masks: list[np.ndarray] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def checked_weights(self) -> np.ndarray:
        """Return the classes' sums of weights."""
        if not self.weight_k.all():
            raise ValueError(f"no member counts for one of the classes: weights {self.weight_k.tolist()}")
        return self.weight_k


def fuse(members: Iterable[Member], class_values: tuple[int, ...], options: FusionOptions | None = None) -> PseudoLabel:
    """Average the members, label by arg-max, filter components in 3D and turn entropy into confidence.

    The mean probability over members, the 3D component filter and the binary entropy are those of SSL-MedSAM2 (arXiv
    2512.11548), with every class at once. Where no member has a background of its own, the background is 1 - max over
    the classes of the mean, so that a class wins only above a half, as in that work. Members with weights count for
    each class by those, and for the background by their mean. Raises `ValueError` where there is no member, or none
    with a weight for a class.
    """
    options = options or FusionOptions()
    sums = _add_up(members, class_values)
    # Everything in place: of a long volume two such arrays more would be too many.
    prob_czyx = np.empty((len(class_values) + 1, *sums.prob_kzyx.shape[1:]), np.float32)
    np.divide(sums.prob_kzyx, sums.checked_weights()[:, None, None, None], out=prob_czyx[1:])
    del sums.prob_kzyx
    if sums.background_zyx is None:
        np.subtract(1.0, prob_czyx[1:].max(axis=0), out=prob_czyx[0])
    else:
        np.divide(sums.background_zyx, sums.weight_k.mean(), out=prob_czyx[0])
        del sums.background_zyx
    prob_czyx.clip(0.0, 1.0, out=prob_czyx)
    # The label follows the unnormalised scores: normalising must not lift a class that lost against the background.
    pseudo = label_by_scores(prob_czyx, class_values, options)
    pseudo.record["members"] = sums.records
    if sums.count > 1:
        pseudo.record["agreement"] = _agreement(sums.packed_masks, pseudo.label_zyx, class_values)
    return pseudo


def as_probability(values: np.ndarray) -> np.ndarray:
    """Return probabilities as float32 in 0 to 1 from float values or from uint8 steps of 1/255."""
    return values.astype(np.float32) / np.float32(255) if values.dtype == np.uint8 else values.astype(np.float32)


def normalised(prob_czyx: np.ndarray) -> np.ndarray:
    """Scale probabilities so that they sum to one over the channels; all-zero voxels become background."""
    return _normalise(np.array(prob_czyx, np.float32))


def _normalise(prob_czyx: np.ndarray) -> np.ndarray:
    """Do `normalised`'s work in place."""
    total_zyx = prob_czyx.sum(axis=0)
    nothing_zyx = total_zyx <= 0
    total_zyx[nothing_zyx] = 1.0
    prob_czyx /= total_zyx[None]
    prob_czyx[0][nothing_zyx] = 1.0
    return prob_czyx


def confidence_of(prob_zyx: np.ndarray, kind: Literal["entropy", "margin"] = "entropy") -> np.ndarray:
    """Turn the probability of the chosen label into confidence, float32: 0 at a half and below, 1 at one."""
    p_zyx = prob_zyx.clip(0.5, 1.0).astype(np.float32)
    if kind == "margin":
        return 2.0 * p_zyx - 1.0
    q_zyx = (1.0 - p_zyx).clip(1e-7, None)
    return np.asarray((1.0 + p_zyx * np.log2(p_zyx) + q_zyx * np.log2(q_zyx)).clip(0.0, 1.0), np.float32)


def label_dtype(class_values: Sequence[int]) -> type[np.unsignedinteger[Any]]:
    """Return the smallest unsigned type that holds the class values."""
    return np.uint16 if max(class_values, default=0) > 255 else np.uint8


def label_by_scores(score_czyx: np.ndarray, class_values: tuple[int, ...], options: FusionOptions) -> PseudoLabel:
    """Label by the scores, which become the probabilities: the array is changed."""
    values = np.array([0, *class_values], dtype=label_dtype(class_values))
    # Slice by slice, for numpy's indices take eight bytes a voxel.
    label_zyx = np.stack([values[np.argmax(score_cyx, axis=0)] for score_cyx in np.moveaxis(score_czyx, 1, 0)])
    prob_czyx = _normalise(score_czyx)
    label_zyx, taken = filter_components(label_zyx, prob_czyx, class_values, keep=options.keep(class_values))
    # Of the probabilities before the filter: what it moved was contested, and is not to be trusted.
    confidence_zyx = np.empty(label_zyx.shape, np.float32)
    for z, label_yx in enumerate(label_zyx):
        chosen_yx = np.take_along_axis(prob_czyx[:, z], np.searchsorted(values, label_yx)[None], axis=0)[0]
        confidence_zyx[z] = confidence_of(chosen_yx, options.confidence)
    foreground_zyx = label_zyx > 0
    record: dict[str, Any] = {
        "voxels": {str(v): int(np.count_nonzero(label_zyx == v)) for v in class_values},
        "removed_by_component_filter": {str(v): n for v, n in sorted(taken.items())},
        "mean_confidence": float(confidence_zyx.mean(dtype=np.float64)),
        "mean_confidence_foreground": (
            float(confidence_zyx[foreground_zyx].mean(dtype=np.float64)) if foreground_zyx.any() else None
        ),
    }
    return PseudoLabel(label_zyx=label_zyx, confidence_zyx=confidence_zyx, prob_czyx=prob_czyx, record=record)


def _add_up(members: Iterable[Member], class_values: Sequence[int]) -> _Sums:
    sums: _Sums | None = None
    for member in members:
        prob_kzyx = np.asarray(member.prob_kzyx, np.float32)
        if sums is None:
            sums = _Sums(prob_kzyx=np.zeros_like(prob_kzyx), weight_k=np.zeros(len(prob_kzyx), np.float32))
        if prob_kzyx.shape != sums.prob_kzyx.shape:
            raise ValueError(f"member {member.name} has shape {prob_kzyx.shape}, others {sums.prob_kzyx.shape}")
        weight_k = np.ones(len(prob_kzyx)) if member.weight_k is None else member.weight_k
        weight_k = weight_k.astype(np.float32)
        if member.background_zyx is not None and sums.background_zyx is None:
            # Members before this one had no background of their own: theirs is taken from their mean.
            share = sums.weight_k.mean()
            known = sums.count > 0 and bool(share)
            sums.background_zyx = np.zeros(prob_kzyx.shape[1:], np.float32)
            if known:
                mean_kzyx = sums.prob_kzyx / sums.checked_weights()[:, None, None, None]
                sums.background_zyx += share * (1.0 - mean_kzyx.max(axis=0))
        if sums.background_zyx is not None:
            own_zyx = member.background_zyx
            own_zyx = (1.0 - prob_kzyx.max(axis=0)) if own_zyx is None else own_zyx
            sums.background_zyx += weight_k.mean() * own_zyx
        sums.prob_kzyx += prob_kzyx if member.weight_k is None else weight_k[:, None, None, None] * prob_kzyx
        sums.weight_k += weight_k
        sums.count += 1
        sums.packed_masks.append(np.packbits(prob_kzyx > 0.5, axis=None))
        record = {"name": member.name, **member.record}
        if member.weight_k is not None:
            record["weights"] = {str(v): round(float(w), 4) for v, w in zip(class_values, weight_k, strict=True)}
        sums.records.append(record)
    if sums is None:
        raise ValueError("there is no member to fuse")
    return sums


def _agreement(
    packed: list[np.ndarray], label_zyx: np.ndarray, class_values: tuple[int, ...]
) -> dict[str, float | None]:
    """Return, for each class, the mean Dice of the members' masks with the fused one."""
    target_kv = np.stack([(label_zyx == v).ravel() for v in class_values])
    scores: list[list[float]] = [[] for _ in class_values]
    for bits in packed:
        mask_kv = np.unpackbits(bits, count=target_kv.size).reshape(target_kv.shape).astype(bool)
        for k in range(len(class_values)):
            size = int(mask_kv[k].sum()) + int(target_kv[k].sum())
            if size:
                scores[k].append(2.0 * int((mask_kv[k] & target_kv[k]).sum()) / size)
    return {str(v): float(np.mean(s)) if s else None for v, s in zip(class_values, scores, strict=True)}
