"""Reading the signs of a round's labels, which `collapse` judges, from label files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.rounds.ending.collapse import Signs
from nnunet_sam2.rounds.ending.convergence import class_change
from nnunet_sam2.volumes import read_label


def measure_signs(
    cohort: Cohort, labels: Path, *, student: Path | None = None, two_before: Path | None = None
) -> Signs:
    """Read the signs of the unlabelled cases' label maps in ``labels``.

    ``student`` holds what the student predicted, ``two_before`` the labels of two rounds ago.
    """
    volumes, empty = _Means(), _Means()
    agreement: list[float] = []
    changes: list[float] = []
    for case in cohort.unlabelled:
        name = f"{case.case_id}{cohort.file_ending}"
        label_zyx, _ = read_label(labels / name)
        _count(label_zyx, case, cohort.class_values, volumes, empty)
        for folder, found in ((student, agreement), (two_before, changes)):
            if folder is not None:
                found += class_change(read_label(folder / name)[0], label_zyx, cohort.class_values).values()
    return Signs(
        volume_mm3=volumes.means(),
        empty_share=empty.means(),
        agreement=round(1.0 - float(np.mean(agreement)), 6) if agreement else None,
        two_round_change=round(float(np.mean(changes)), 6) if changes else (0.0 if two_before else None),
    )


def human_signs(cohort: Cohort) -> Signs:
    """Read the signs of the human labels: what volumes and missing classes are to be expected."""
    volumes, empty = _Means(), _Means()
    for case in cohort.labelled:
        known = [value for value in cohort.class_values if case.answers_for(value)]
        _count(read_label(cohort.label_path(case))[0], case, known, volumes, empty)
    return Signs(volume_mm3=volumes.means(), empty_share=empty.means())


class _Means:
    """Collect values by class."""

    def __init__(self) -> None:
        self._found: dict[int, list[float]] = {}

    def add(self, value: int, number: float) -> None:
        self._found.setdefault(value, []).append(number)

    def means(self) -> dict[int, float]:
        return {value: round(float(np.mean(found)), 6) for value, found in self._found.items()}


def _count(label_zyx: np.ndarray, case: Case, values: Sequence[int], volumes: _Means, empty: _Means) -> None:
    voxel_mm3 = float(np.prod(case.geometry.spacing_xyz_mm))
    counts = np.bincount(label_zyx.ravel(), minlength=max(values) + 1)
    for value in values:
        volumes.add(value, int(counts[value]) * voxel_mm3)
        empty.add(value, float(counts[value] == 0))
