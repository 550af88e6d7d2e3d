"""SAM 2 and the student become one pseudo-label: each made as sure as it may be, then pooled in log-odds.

Shape letters: C channels (background first), K classes, z y x voxels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nnunet_sam2.labelling.fusion import FusionOptions, as_probability, label_by_scores, normalised
from nnunet_sam2.labelling.leave_one_out import DiceTable, dice_by_class
from nnunet_sam2.labelling.member import PseudoLabel
from nnunet_sam2.labelling.temperature import in_doubt, log_probability, softmax

_TINY = 1e-6


def fuse_sources(
    prob_czyx: Mapping[str, np.ndarray],
    class_values: tuple[int, ...],
    *,
    quality: Mapping[str, DiceTable] | None = None,
    temperatures: Mapping[str, float] | None = None,
    options: FusionOptions | None = None,
) -> PseudoLabel:
    """Pool one or two sources (SAM 2, the student) in log-odds, weighted by estimated quality class by class.

    ``prob_czyx`` maps a source to its probabilities, background first, float or uint8 (0 to 255). ``quality`` maps a
    source to its estimated Dice for each class value; see `source_weights`. ``temperatures`` (1 where not named) make
    sources as sure as they are right: the bolder one must not win a border by its boldness. At each voxel a source's
    log-probabilities are divided by its temperature and weigh as its classes in question there do: a logarithmic
    opinion pool (Genest and Zidek, Statistical Science 1986) whose weights sum to one, so that two sources which share
    their errors do not become surer together. Raises `ValueError` on shapes that differ and on more than two sources.
    """
    names = sorted(prob_czyx)
    if not 1 <= len(names) <= 2:
        raise ValueError(f"fuse_sources takes one or two sources, not {len(names)}")
    shapes = {name: prob_czyx[name].shape for name in names}
    if len(set(shapes.values())) > 1 or shapes[names[0]][0] != len(class_values) + 1:
        raise ValueError(f"sources differ in shape or have not {len(class_values) + 1} channels: {shapes}")
    seen_kzyx = np.full((len(class_values), *shapes[names[0]][1:]), _TINY, np.float32)
    drawn = {}
    for name in names:
        source_czyx = normalised(as_probability(prob_czyx[name]))
        np.maximum(seen_kzyx, source_czyx[1:], out=seen_kzyx)
        drawn[name] = source_czyx.argmax(axis=0).astype(np.uint16)
    seen_zyx = seen_kzyx.sum(axis=0)
    seen_kzyx /= seen_zyx[None]
    doubt_zyx = in_doubt(seen_zyx)
    agreement = _agreement(list(drawn.values()), class_values)
    del drawn
    weights = source_weights({name: (quality or {}).get(name, {}) for name in names}, agreement, class_values)
    pooled_czyx = np.zeros(shapes[names[0]], np.float32)
    for name in names:
        # One source after the other and in place: whole maps of a long volume are large.
        log_czyx = log_probability(normalised(as_probability(prob_czyx[name])))
        excess = np.float32((temperatures or {}).get(name, 1.0) - 1.0)
        log_czyx *= (np.tensordot(weights[name], seen_kzyx, axes=1) / (1.0 + excess * doubt_zyx))[None]
        pooled_czyx += log_czyx
        del log_czyx
    pseudo = label_by_scores(softmax(pooled_czyx), class_values, options or FusionOptions())
    pseudo.record["sources"] = {
        name: {
            "weights": {str(v): float(w) for v, w in zip(class_values, weights[name], strict=True)},
            "temperature": float((temperatures or {}).get(name, 1.0)),
        }
        for name in names
    }
    pseudo.record["source_agreement"] = {str(value): dice for value, dice in agreement.items()}
    return pseudo


def source_weights(
    quality: Mapping[str, DiceTable], agreement: DiceTable, class_values: Sequence[int]
) -> dict[str, np.ndarray]:
    """Weigh sources, class by class, by the share of their disagreement in which each is right, float32 (k,).

    ``agreement`` is the Dice of the two sources' labels with each other. Where both are right or both wrong, nothing is
    to be decided; where they differ, one of them is wrong, so that the difference of their errors is the difference
    of what each gets wrong there: with errors e = 1 - Dice and disagreement D, the first is right in
    1/2 + (e2 - e1) / (2 D) of it. A D above e1 + e2 says that one is worse here than estimated, and counts as their
    sum: the first is then right in e2 / (e1 + e2). Each share is multiplied by the source's Dice, for where hardly
    anything overlaps borders are much further off than 1 - Dice says: a source that does not find a class has no say
    in it. The weights of two sources sum to one. Unknown quality counts as the mean of what is known.
    """
    names = list(quality)
    if len(names) == 1:
        return {names[0]: np.ones(len(class_values), np.float32)}
    first, second = names
    known = [d for table in quality.values() for d in table.values() if d is not None]
    weight_k = np.full(len(class_values), 0.5, np.float32)
    for k, value in enumerate(class_values):
        dice, other = (_dice_of(quality[name], value, known) for name in names)
        agreed = agreement.get(value)
        differ = min(0.0 if agreed is None else 1.0 - agreed, (1.0 - dice) + (1.0 - other))
        right = float(np.clip(0.5 + (dice - other) / (2.0 * differ), 0.0, 1.0)) if differ > 0 else 0.5
        mine, theirs = right * dice, (1.0 - right) * other
        if mine + theirs > 0:
            weight_k[k] = mine / (mine + theirs)
    return {first: weight_k, second: np.float32(1.0) - weight_k}


def _dice_of(table: DiceTable, value: int, known: Sequence[float]) -> float:
    if (dice := table.get(value)) is not None:
        return dice
    own = [d for d in table.values() if d is not None] or known
    return float(np.mean(own)) if own else 0.5


def _agreement(drawn: Sequence[np.ndarray], class_values: Sequence[int]) -> DiceTable:
    """Return the Dice of two sources' labels, which hold channels; of one source with itself."""
    table = dice_by_class(drawn[0], drawn[-1], range(1, len(class_values) + 1))
    return {value: table[channel] for channel, value in enumerate(class_values, start=1)}
