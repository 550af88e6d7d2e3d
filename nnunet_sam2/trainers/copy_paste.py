"""Bidirectional copy-paste: two samples of a batch exchange a box, labels and confidence along with the image.

Shape letters: b samples of a batch, c output channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

SHARE = 2 / 3
"""Length of the box's sides as a share of the patch's: what Bai et al. found best."""

Box = tuple[slice, ...]


def partners(pseudo_b: Sequence[bool], annotated_bc: Tensor | None = None) -> list[int]:
    """Return with which sample of the batch each one exchanges a box; itself where none is left for it.

    Labelled samples go with pseudo-labelled ones in the order of the batch, what is left over among itself. Samples
    that were annotated for different classes (``annotated_bc``) are not mixed: the loss is silent on classes by sample.
    """
    partner = list(range(len(pseudo_b)))
    rows = [() if annotated_bc is None else tuple(annotated_bc[i].tolist()) for i in partner]
    for row in sorted(set(rows)):
        alike = [i for i in range(len(rows)) if rows[i] == row]
        pseudo = [i for i in alike if pseudo_b[i]]
        human = [i for i in alike if not pseudo_b[i]]
        both = min(len(pseudo), len(human))
        left = human[both:] or pseudo[both:]
        pairs = [*zip(human[:both], pseudo[:both], strict=True), *zip(left[::2], left[1::2], strict=False)]
        for one, other in pairs:
            partner[one], partner[other] = other, one
    return partner


def draw_box(shape: Sequence[int]) -> Box:
    """Draw a box with sides of `SHARE` of a patch's, anywhere in it, from numpy's global generator."""
    sides = [max(1, round(SHARE * n)) for n in shape]
    starts = [int(np.random.randint(0, n - side + 1)) for n, side in zip(shape, sides, strict=True)]
    return tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))


def box_at_scale(box: Box, shape: Sequence[int], coarse: Sequence[int]) -> Box:
    """Return the voxels of a coarser grid whose label nnU-Net takes from inside the box: the nearest voxel's."""
    scaled = []
    for side, n, m in zip(box, shape, coarse, strict=True):
        picked = np.floor((np.arange(m) + 0.5) * n / m).astype(int)
        inside = np.flatnonzero((picked >= side.start) & (picked < side.stop))
        scaled.append(slice(int(inside[0]), int(inside[-1]) + 1) if inside.size else slice(0, 0))
    return tuple(scaled)


def exchange(tensors: Sequence[Tensor], partner: Sequence[int], box: Box) -> None:
    """Exchange a box of the finest grid between partners, in place, in tensors (b, ., ...) of any of the scales.

    The bidirectional copy-paste of Bai et al. (CVPR 2023): the labelled sample receives the box of the pseudo-labelled
    one and gives its own, so that both kinds of label are learnt beside each other and with the same share.
    """
    if all(i == other for i, other in enumerate(partner)):
        return
    shape = tensors[0].shape[2:]
    for tensor in tensors:
        here = (slice(None), slice(None), *box_at_scale(box, shape, tensor.shape[2:]))
        inside = tensor[here]
        inside.copy_(inside[list(partner)])
