"""Cross-validation folds of the labelled cases: by patient, and as many as the labels allow."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nnunet_sam2.cohort.cohort import Cohort

MAX_FOLDS = 5
NNUNET_SEED = 12345
"""Seed of nnU-Net's own splits; with one case a patient and at least five cases the folds are the same as stock."""


def make_splits(cohort: Cohort | Iterable[tuple[str, str]], seed: int = NNUNET_SEED) -> list[dict[str, list[str]]]:
    """Split the labelled cases into min(5, patients) folds in the form of nnU-Net's ``splits_final.json``.

    Takes a cohort or (case id, patient) pairs. All cases of a patient are validated in the same fold. One patient
    allows no validation: the list is empty, and nnU-Net has to train with ``-f all``. The draw is the one of
    ``nnunetv2.utilities.crossval_split`` (scikit-learn's shuffled ``KFold``), over patients instead of cases.
    """
    if isinstance(cohort, Cohort):
        pairs = [(c.case_id, c.patient) for c in cohort.as_planned().labelled]
    else:
        pairs = list(cohort)
    patients = sorted({patient for _, patient in pairs})
    folds = min(MAX_FOLDS, len(patients))
    if folds < 2:
        return []
    # RandomState, not Generator: nnU-Net's folds come from it.
    order = np.arange(len(patients))
    np.random.RandomState(seed).shuffle(order)
    splits = []
    for held_out in np.array_split(order, folds):
        validated = {patients[i] for i in held_out}
        splits.append(
            {
                "train": sorted(case for case, patient in pairs if patient not in validated),
                "val": sorted(case for case, patient in pairs if patient in validated),
            }
        )
    return splits
