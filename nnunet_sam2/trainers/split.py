"""Who trains and who validates: human labels alone are validated on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_sam2.cohort.cohort import COHORT_FILE, Cohort
from nnunet_sam2.cohort.splits import make_splits
from nnunet_sam2.errors import InputError
from nnunet_sam2.storage import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class Split:
    """Hold the cases of one fold and what its user should know about it."""

    labelled: tuple[str, ...]
    pseudo: tuple[str, ...]
    validation: tuple[str, ...]
    note: str | None = None

    @property
    def training(self) -> list[str]:
        """Return all cases to train on, sorted."""
        return sorted((*self.labelled, *self.pseudo))


def choose_split(
    fold: int | str,
    *,
    available: Iterable[str],
    pseudo_cases: Sequence[str] = (),
    human_cases: Sequence[str] = (),
    splits: Sequence[Mapping[str, Sequence[str]]] = (),
) -> Split:
    """Choose the cases of ``fold``, a number or ``"all"``, among those that are preprocessed.

    ``splits`` are the folds of the labelled cases (nnU-Net's ``splits_final.json``). Fold ``all`` trains on every
    labelled case and watches the same cases, for there are no others. Raises InputError for a fold that does not
    exist, where stock nnU-Net would take a random one, and for cases that lack preprocessed data. ``human_cases`` were
    labelled by people after the folds were made: they train in every fold and are validated on in none.
    """
    present, pseudo = set(available), tuple(sorted(pseudo_cases))
    _require_present(present, pseudo, "pseudo-labelled")
    _require_present(present, human_cases, "later labelled")
    labelled = tuple(sorted(present - set(pseudo) - set(human_cases)))
    if not labelled:
        raise InputError("no labelled case is preprocessed; training on pseudo-labels alone is not supported")
    if fold == "all":
        note = (
            f"fold all: trains on all {len(labelled)} labelled cases and validates on the same ones, "
            "so the Dice it reports does not show how it does on new cases"
        )
        return Split(labelled=_joined(labelled, human_cases), pseudo=pseudo, validation=labelled, note=note)
    if not isinstance(fold, int) or not 0 <= fold < len(splits):
        known = f"folds 0 to {len(splits) - 1}, or all" if splits else "only all (one patient cannot be split)"
        raise InputError(f"fold {fold} does not exist: {len(labelled)} labelled cases give {known}")
    train, validation = tuple(sorted(splits[fold]["train"])), tuple(sorted(splits[fold]["val"]))
    _require_present(present, train, "training")
    _require_present(present, validation, "validation")
    wrong = sorted({*train, *validation} & {*pseudo, *human_cases})
    if wrong:
        raise InputError(
            f"splits_final.json names pseudo-labelled cases or later ones, which only train: {', '.join(wrong)}"
        )
    return Split(labelled=_joined(train, human_cases), pseudo=pseudo, validation=validation)


def _joined(labelled: Sequence[str], human_cases: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({*labelled, *human_cases}))


def _require_present(present: set[str], cases: Sequence[str], what: str) -> None:
    missing = sorted(set(cases) - present)
    if missing:
        raise InputError(
            f"{what} cases are not preprocessed: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; "
            "preprocess again, or correct splits_final.json or the round's pseudo_cases"
        )


def read_or_make_splits(
    splits_file: Path, raw_folder: Path | None, labelled: Iterable[str]
) -> list[dict[str, list[str]]]:
    """Read ``splits_final.json``, or write it: min(5, patients) folds by the patients of ``cohort.json``.

    Without a cohort each labelled case counts as a patient of its own. One patient gives no fold and no file.
    """
    if splits_file.is_file():
        return read_json(splits_file)
    patients: dict[str, str] = {}
    if raw_folder is not None and (raw_folder / COHORT_FILE).is_file():
        patients = {case.case_id: case.patient for case in Cohort.load(raw_folder).as_planned().labelled}
    splits = make_splits([(case, patients.get(case, case)) for case in sorted(labelled)])
    if splits:
        write_json(splits_file, splits)
    return splits
