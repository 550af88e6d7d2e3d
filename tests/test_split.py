"""Human labels alone validate; folds that do not exist are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_sam2.errors import InputError
from nnunet_sam2.storage import read_json
from nnunet_sam2.trainers.split import choose_split, read_or_make_splits

SPLITS = [{"train": ["b", "c"], "val": ["a"]}, {"train": ["a", "c"], "val": ["b"]}]


def test_pseudo_labelled_cases_train_and_never_validate() -> None:
    split = choose_split(0, available="abcpq", pseudo_cases=["q", "p"], splits=SPLITS)
    assert split.training == ["b", "c", "p", "q"]
    assert split.validation == ("a",)


def test_fold_all_validates_on_the_labelled_cases_and_says_so() -> None:
    split = choose_split("all", available="abcp", pseudo_cases=["p"])
    assert split.training == ["a", "b", "c", "p"]
    assert split.validation == ("a", "b", "c")
    assert "validates on the same ones" in str(split.note)


@pytest.mark.parametrize("fold", [2, 4, -1])
def test_a_fold_that_does_not_exist_is_refused(fold: int) -> None:
    with pytest.raises(InputError, match="folds 0 to 1, or all"):
        choose_split(fold, available="abc", splits=SPLITS)


def test_one_labelled_case_can_only_train_fold_all() -> None:
    with pytest.raises(InputError, match="only all"):
        choose_split(0, available="ap", pseudo_cases=["p"])
    assert choose_split("all", available="ap", pseudo_cases=["p"]).validation == ("a",)


def test_a_pseudo_labelled_case_in_the_folds_is_refused() -> None:
    with pytest.raises(InputError, match=r"pseudo-labelled cases.*: a"):
        choose_split(0, available="abc", pseudo_cases=["a"], splits=SPLITS)


def test_a_case_without_preprocessed_data_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="pseudo-labelled cases are not preprocessed: q"):
        choose_split(0, available="abcp", pseudo_cases=["p", "q"], splits=SPLITS)
    with pytest.raises(InputError, match="training cases are not preprocessed: c"):
        choose_split(0, available="abp", pseudo_cases=["p"], splits=SPLITS)


def test_splits_are_made_once_and_then_kept(tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    splits = read_or_make_splits(path, None, ["a", "b", "c"])
    assert len(splits) == 3
    assert sorted(case for split in splits for case in split["val"]) == ["a", "b", "c"]
    assert read_json(path) == splits
    assert read_or_make_splits(path, None, ["a", "b", "c", "d"]) == splits


def test_one_case_gives_no_splits_and_no_file(tmp_path: Path) -> None:
    assert read_or_make_splits(tmp_path / "splits_final.json", None, ["a"]) == []
    assert not (tmp_path / "splits_final.json").exists()


@pytest.mark.parametrize("fold", [0, "all"])
def test_cases_that_people_labelled_later_train_in_every_fold_and_are_validated_on_in_none(fold: int | str) -> None:
    splits = [{"train": ["b", "c"], "val": ["a"]}]
    split = choose_split(fold, available="abcpx", pseudo_cases=("p",), human_cases=("x",), splits=splits)
    assert "x" in split.labelled
    assert "x" not in split.validation
    assert split.pseudo == ("p",)
    with pytest.raises(InputError, match="later labelled"):
        choose_split(fold, available="abcp", human_cases=("x",), splits=splits)
