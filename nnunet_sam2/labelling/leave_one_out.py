"""What a method is worth, found on labelled cases that it was not allowed to learn from.

Always the whole patient is left out: another scan of the same person gives an answer away that no new patient has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from nnunet_sam2.support.cases import Query, Support

DiceTable = dict[int, float | None]
"""Dice for each class value; None where neither side has the class."""


def held_out(supports: Sequence[Support]) -> Iterator[tuple[Support, list[Support]]]:
    """Yield each support with those of other patients; nothing where there is one patient: nothing can be checked."""
    if several_patients(supports):
        for support in supports:
            yield support, of_other_patients(support, supports)


def several_patients(supports: Sequence[Support]) -> bool:
    """Say whether each support can be labelled from supports of another patient."""
    return len({support.patient_id for support in supports}) > 1


def of_other_patients(case: Query | Support, supports: Sequence[Support]) -> list[Support]:
    """Return the supports that show another patient than a case."""
    return [support for support in supports if support.patient_id != case.patient_id]


def places_of_patient(supports: Sequence[Support], place: int) -> frozenset[int]:
    """Return the places in the list of all supports that show the patient of the one at ``place``."""
    patient = supports[place].patient_id
    return frozenset(i for i, support in enumerate(supports) if support.patient_id == patient)


def scans_of(query: Query, patients: Mapping[str, str]) -> frozenset[str]:
    """Return the ids of the query and of all cases of its patient; ``patients`` maps a case's id to its patient."""
    return frozenset({query.case_id, *(c for c, patient in patients.items() if patient == query.patient_id)})


def patients_by_case(supports: Sequence[Support]) -> dict[str, str]:
    """Return the patient of each support by the case's id."""
    return {support.case_id: support.patient_id for support in supports}


def dice_by_class(
    label_zyx: np.ndarray, reference_zyx: np.ndarray, class_values: Sequence[int], *, ignore_value: int | None = None
) -> DiceTable:
    """Compute Dice for each class value over the voxels that the reference has judged.

    A class that only one side has scores 0; one that neither side has is None.
    """
    if label_zyx.shape != reference_zyx.shape:
        raise ValueError(f"label has shape {label_zyx.shape}, reference {reference_zyx.shape}")
    judged_zyx = None if ignore_value is None else reference_zyx != ignore_value
    table: DiceTable = {}
    for value in class_values:
        mine, theirs = label_zyx == value, reference_zyx == value
        if judged_zyx is not None:
            mine &= judged_zyx
        total = int(np.count_nonzero(mine)) + int(np.count_nonzero(theirs))
        table[int(value)] = 2.0 * int(np.count_nonzero(mine & theirs)) / total if total else None
    return table


def mean_dice(tables: Iterable[Mapping[int, float | None]], class_values: Sequence[int]) -> DiceTable:
    """Average tables of several cases, class by class; None where no case says anything about a class."""
    rows = list(tables)
    means: DiceTable = {}
    for value in class_values:
        known = [row[value] for row in rows if row.get(value) is not None]
        means[int(value)] = float(np.mean(known)) if known else None  # type: ignore[arg-type]  # None is filtered
    return means


def estimated_quality(records: Iterable[Mapping[str, Any]], class_values: Sequence[int]) -> DiceTable:
    """Average the leave-one-out Dice that `label_cases` wrote into the records of labelled cases."""
    tables = [
        {int(value): dice for value, dice in record["dice_with_human_label"].items()}
        for record in records
        if record.get("dice_with_human_label")
    ]
    return mean_dice(tables, class_values)


def best_choices(
    rows: Mapping[str, Mapping[str, DiceTable]],
    class_values: Sequence[int],
    *,
    default: str,
    without: Set[str] = frozenset(),
    least_gain: float = 0.0,
) -> dict[int, str]:
    """Choose for each class what had the best mean Dice on the checked cases.

    ``rows`` maps a case to each choice's Dice. Another choice than ``default`` must beat it by more than
    ``least_gain``. ``without`` leaves out the rows of a patient's cases, so that their human labels have no say in how
    the patient is labelled. A class that no checked case has keeps the default.
    """
    names = sorted({name for row in rows.values() for name in row} - {default})
    chosen = {}
    for value in class_values:
        best, best_gain = default, least_gain
        for name in names:
            gains = []
            for case_id, row in rows.items():
                old, new = row[default].get(value), row[name].get(value)
                if case_id not in without and old is not None and new is not None:
                    gains.append(new - old)
            if gains and float(np.mean(gains)) > best_gain:
                best, best_gain = name, float(np.mean(gains))
        chosen[int(value)] = best
    return chosen
