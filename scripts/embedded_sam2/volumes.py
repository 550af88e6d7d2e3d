"""Synthetic cases: several subjects of one anatomy, painted, at the model's size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embedded_sam2.anatomy import draw_anatomy, draw_subject, render_labels
from embedded_sam2.painting import draw_acquisition, draw_contrast, paint, vary_contrast
from nnunet_sam2.planes import intensity_window, resize

LOWER, UPPER = 0.5, 99.5
"""Percentiles of the intensity window, those that real volumes get."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Hold one volume at model size."""

    image_nss: np.ndarray
    """Slices in 0 to 1, (N, S, S) float32."""
    labels_nss: np.ndarray
    """(N, S, S) uint8."""


def draw_family(
    rng: np.random.Generator, *, subjects: int, slices: int | tuple[int, int], size: int, new_contrast: float = 0.2
) -> list[Case]:
    """Draw ``subjects`` cases of one anatomy, with ``slices`` slices each (a number or a range).

    The first subject's contrast is that of the others, varied; with probability ``new_contrast`` a later subject has a
    contrast of its own. Grids differ: from 48 to ``size`` pixels, stretched to the model's size as real volumes are.
    """
    anatomy = draw_anatomy(rng)
    protocol = draw_contrast(anatomy.n_labels, rng)
    side = int(np.exp(rng.uniform(np.log(48), np.log(size))))
    cases = []
    for number in range(subjects):
        subject = draw_subject(anatomy, rng)
        contrast = vary_contrast(protocol, rng)
        if number and rng.random() < new_contrast:
            contrast = draw_contrast(anatomy.n_labels, rng)
        n = slices if isinstance(slices, int) else int(rng.integers(slices[0], slices[1] + 1))
        side_yx = [int(np.clip(side * np.exp(rng.normal(0, 0.1)), 40, size)) for _ in range(2)]
        labels = render_labels(subject, (n, *side_yx))
        cases.append(to_case(paint(labels, contrast, draw_acquisition(rng)), labels, size))
    return cases


def to_case(image_zyx: np.ndarray, labels_zyx: np.ndarray, size: int) -> Case:
    """Window a painted volume and bring it to model size, as `nnunet_sam2.frames` does with real ones."""
    low, high = intensity_window(image_zyx, LOWER, UPPER)
    scaled = np.clip((image_zyx - low) / max(high - low, 1e-6), 0, 1)
    rows, columns = (((np.arange(size) + 0.5) * n / size).astype(np.int64) for n in labels_zyx.shape[1:])
    return Case(image_nss=resize(scaled, (size, size)), labels_nss=labels_zyx[:, rows][:, :, columns])
