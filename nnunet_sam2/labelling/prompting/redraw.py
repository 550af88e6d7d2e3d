"""A map that exists already, redrawn by SAM 2 class by class where that helped on labelled cases.

Shape letters: N slices, C channels (background first), K classes, h w pixels of a map at a quarter of the model size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from nnunet_sam2.frames import Frames
from nnunet_sam2.labelling.fusion import normalised
from nnunet_sam2.labelling.leave_one_out import DiceTable
from nnunet_sam2.labelling.prompting.decoding import put_in
from nnunet_sam2.labelling.slice_check import SliceDice
from nnunet_sam2.planes import resize
from nnunet_sam2.support.cases import Support

Redraw = Callable[[int, torch.Tensor], Mapping[int, torch.Tensor]]
"""Takes a slice's number and its map (C, h, w); returns new probabilities (h, w) of some classes, by position k."""

SHARES = {"": 1.0, " mean": 0.5}
"""A choice is the name of a redraw, taken whole or averaged with the map before."""


def choice_names(redraws: Sequence[str]) -> list[str]:
    """Name all choices that some redraws offer."""
    return [name + suffix for name in redraws for suffix in SHARES]


def slice_map(frames: Frames, prob_czyx: np.ndarray, n: int, side: int) -> torch.Tensor:
    """Return slice ``n`` of a probability map at ``side`` pixels, (C, side, side)."""
    slice_chw = np.stack([frames.slices_first(prob_zyx)[n] for prob_zyx in prob_czyx])
    return torch.from_numpy(resize(slice_chw, (side, side)))


def redraw_volume(
    frames: Frames, prob_czyx: np.ndarray, choice_k: Sequence[str], redraws: Mapping[str, Redraw]
) -> np.ndarray:
    """Redraw every class by its choice; what is in no choice's name keeps the map before.

    Only the change is brought to the volume's grid, so that a voxel that nothing redraws keeps its value, unblurred by
    the way there and back.
    """
    shares = {
        name: {
            k: share for k, choice in enumerate(choice_k) for suffix, share in SHARES.items() if choice == name + suffix
        }
        for name in redraws
    }

    def changes() -> Iterator[np.ndarray]:
        for n in range(len(frames)):
            before_chw = slice_map(frames, prob_czyx, n, frames.size // 4)
            after_chw = before_chw
            for name, redraw in redraws.items():
                if shares[name]:
                    after_chw = put_in(after_chw, redraw(n, before_chw), shares[name])
            yield (after_chw - before_chw).numpy()

    if not any(shares.values()):
        return prob_czyx
    return normalised((prob_czyx + frames.to_volume(changes())).clip(0.0, 1.0))


def check_redraws(
    support: Support,
    prob_czyx: np.ndarray,
    class_values: tuple[int, ...],
    redraws: Mapping[str, Redraw],
    slices: Sequence[int],
    *,
    default: str,
) -> dict[str, DiceTable]:
    """Return each choice's Dice on slices of a labelled case, and the map's before under the name ``default``."""
    scores = {name: SliceDice(class_values) for name in (default, *choice_names(list(redraws)))}
    every = range(len(class_values))
    for n in slices:
        before_chw = slice_map(support.frames, prob_czyx, n, support.frames.size // 4)
        scores[default].add(support, n, before_chw)
        for name, redraw in redraws.items():
            decoded = redraw(n, before_chw)
            for suffix, share in SHARES.items():
                scores[name + suffix].add(support, n, put_in(before_chw, decoded, dict.fromkeys(every, share)))
    return {name: score.table() for name, score in scores.items()}


def rows_json(rows: Mapping[str, Mapping[str, DiceTable]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the Dice of every checked case and choice as a JSON value."""
    return {
        case_id: {name: {str(value): dice for value, dice in table.items()} for name, table in row.items()}
        for case_id, row in rows.items()
    }
