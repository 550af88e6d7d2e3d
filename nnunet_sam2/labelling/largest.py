"""Predictions without their far-off islands: of a class that is one piece in every human label, the largest piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.labelling.components import keep_component, single_component_classes
from nnunet_sam2.progress import track
from nnunet_sam2.volumes import read_label, write_label


def keep_largest(label_zyx: np.ndarray, class_values: Sequence[int]) -> tuple[np.ndarray, int]:
    """Reduce each of ``class_values`` to its largest 26-connected component; return the map and the voxels dropped.

    What is dropped becomes background, as in nnU-Net's postprocessing (Isensee et al. 2021).
    """
    kept_zyx = label_zyx.copy()
    for value in class_values:
        mask_zyx = label_zyx == value
        kept_zyx[mask_zyx & ~keep_component(mask_zyx)] = 0
    return kept_zyx, int((kept_zyx != label_zyx).sum())


def single_classes(cohort: Cohort) -> tuple[int, ...]:
    """Return the classes that are one piece in every human label of the cohort's labelled cases."""
    labels = [read_label(cohort.label_path(case))[0] for case in cohort.labelled]
    return single_component_classes(labels, cohort.class_values)


def write_largest(folder: Path, out: Path, names: Iterable[str], class_values: Sequence[int]) -> dict[str, int]:
    """Write the label maps ``names`` of ``folder`` into ``out`` by `keep_largest`; return the voxels that each lost."""
    dropped = {}
    for name in track(list(names), what="keeping largest pieces"):
        label_zyx, geometry = read_label(folder / name)
        kept_zyx, dropped[name] = keep_largest(label_zyx, class_values)
        write_label(out / name, kept_zyx, geometry)
    return dropped
