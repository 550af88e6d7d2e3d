from __future__ import annotations

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.cohort.splits import make_splits
from nnunet_sam2.folders import DatasetFolders


def _pairs(count: int) -> list[tuple[str, str]]:
    return [(f"case_{i:02d}", f"case_{i:02d}") for i in range(count)]


def test_the_folds_are_nnunets_own_where_each_case_is_a_patient() -> None:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    for count in (5, 8, 23):
        stock = generate_crossval_split([case for case, _ in _pairs(count)])
        assert make_splits(_pairs(count)) == [{k: [str(c) for c in v] for k, v in fold.items()} for fold in stock]


def test_few_patients_give_as_many_folds_and_one_gives_none() -> None:
    assert [len(make_splits(_pairs(n))) for n in (1, 2, 3, 5, 9)] == [0, 2, 3, 5, 5]


def test_all_cases_of_a_patient_are_validated_in_one_fold_and_each_case_once() -> None:
    pairs = [(f"p{p}_t{t}", f"p{p}") for p in range(7) for t in range(3)]
    splits = make_splits(pairs)
    patient_of = dict(pairs)
    for fold in splits:
        assert not {patient_of[c] for c in fold["train"]} & {patient_of[c] for c in fold["val"]}
        assert sorted(fold["train"] + fold["val"]) == sorted(patient_of)
    assert sorted(c for fold in splits for c in fold["val"]) == sorted(patient_of)


def test_the_order_of_the_cases_does_not_matter() -> None:
    assert make_splits(_pairs(8)) == make_splits(_pairs(8)[::-1])


def test_a_cohort_is_split_over_its_labelled_cases_alone(tiny_dataset: DatasetFolders) -> None:
    cohort = Cohort.load(tiny_dataset.raw)
    splits = make_splits(cohort)
    assert len(splits) == 3
    assert sorted(splits[0]["train"] + splits[0]["val"]) == [case.case_id for case in cohort.labelled]
