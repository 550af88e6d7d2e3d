"""What ``nnunet_sam2 run`` refuses before it writes anything."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import pytest

from nnunet_sam2.cli.main import main
from nnunet_sam2.cli.run import add_arguments, options_of
from nnunet_sam2.cohort.cohort import Case, Cohort, Role
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds.ledger import Ledger
from nnunet_sam2.rounds.options import RunOptions

RUN = ["run", "-d", "501", "--sam2", "untrained", "--device", "cpu"]


def _without(cohort: Cohort, role: Role) -> tuple[Case, ...]:
    return tuple(case for case in cohort.cases if case.role is not role)


@pytest.mark.parametrize("role", [Role.LABELLED, Role.UNLABELLED])
def test_a_cohort_without_labelled_or_without_unlabelled_cases_is_refused(
    fresh_dataset: DatasetFolders, role: Role, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = Cohort.load(fresh_dataset.raw)
    Cohort(**{**vars(cohort), "cases": _without(cohort, role)}).save()
    assert main(RUN) == 2
    message = capsys.readouterr().err
    assert f"no {role.value} case" in message
    assert message.count("\n") == 1
    assert not fresh_dataset.results.exists()


def test_a_dataset_that_was_not_converted_says_how_to_make_it(
    fresh_dataset: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    (fresh_dataset.raw / "cohort.json").unlink()
    assert main(RUN) == 2
    assert "nnunet_sam2 convert" in capsys.readouterr().err


def test_an_unknown_dataset_is_refused(fresh_dataset: DatasetFolders, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-d", "777", "--sam2", "untrained"]) == 2
    assert "no dataset 777" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_is_planned(
    fresh_dataset: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-d", "501", "--sam2", str(Path("nowhere") / "sam2.pt"), "--device", "cpu"]) == 2
    assert "sam2.pt" in capsys.readouterr().err
    assert not fresh_dataset.preprocessed.exists()


def test_an_unknown_strategy_is_refused_before_anything_is_planned(
    fresh_dataset: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "--strategy", "telepathy"]) == 2
    assert "telepathy" in capsys.readouterr().err
    assert not fresh_dataset.preprocessed.exists()


def test_a_strategy_that_the_checkpoint_cannot_serve_is_refused_before_anything_is_planned(
    fresh_dataset: DatasetFolders, shared_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_only = str(shared_weights / "sam2_hiera_tiny_image.safetensors")
    assert main(["run", "-d", "501", "--sam2", image_only, "--strategy", "insert", "--device", "cpu"]) == 2
    assert "memory" in capsys.readouterr().err
    assert not fresh_dataset.preprocessed.exists()


def test_a_fold_that_does_not_exist_is_refused_with_those_that_do(
    fresh_dataset: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "-f", "3"]) == 2
    assert "3 folds; choose one of 0 to 2, or -f all" in capsys.readouterr().err
    assert not fresh_dataset.preprocessed.exists()


def test_a_mistyped_configuration_is_refused_before_a_run_is_begun(
    fresh_dataset: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "-c", "3dfullres"]) == 2
    assert "choose one of 2d, 3d_fullres, 3d_lowres" in capsys.readouterr().err
    assert not fresh_dataset.results.exists()


def test_one_labelled_case_has_no_folds_and_the_way_out_is_said(
    fresh_dataset: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = Cohort.load(fresh_dataset.raw)
    others = cohort.labelled[1:]
    Cohort(**{**vars(cohort), "cases": tuple(c for c in cohort.cases if c not in others)}).save()
    assert main(RUN) == 2
    assert "give 0 folds; give -f all, which has no validation" in capsys.readouterr().err
    assert not fresh_dataset.preprocessed.exists()


@pytest.mark.parametrize(
    ("option", "value", "refusal"),
    [
        ("--epochs", "0", "--epochs must be at least 1"),
        ("--final-epochs", "-1", "--final-epochs must be at least 0"),
        ("--seed", "-5", "--seed must lie between 0 and"),
        ("--volume-drift", "nan", "--volume-drift is a factor above 1"),
        ("--branch", "f1", "--branch f1: fold 1 has its rounds under this name"),
    ],
)
def test_a_value_that_would_fail_rounds_later_is_refused_at_once_by_the_options_name(
    fresh_dataset: DatasetFolders, option: str, value: str, refusal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, option, value]) == 2
    assert refusal in capsys.readouterr().err
    assert not fresh_dataset.preprocessed.exists()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"profile": "cpu", "fold": "all", "branch": "two", "round_limit": 3, "final_epochs": 0, "skip_baseline": True},
        {"strategy": "transfer", "strategy_options": {"a": "1", "b": "x y"}, "image_size": 256, "mean_change": 0.005},
        {"ema_decay": 0.99, "copy_paste": 0.5, "soft_targets": True, "warm_lr": 0.001},
        {"num_epochs": 3, "num_iterations_per_epoch": 7, "sam2": "some where.pt", "seed": 4, "supports": "all"},
    ],
)
def test_the_command_that_is_told_has_the_runs_own_options(given: dict[str, Any]) -> None:
    options = RunOptions(**given)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    program, command, *arguments = shlex.split(options.command(7))
    assert (program, command, arguments[:2]) == ("nnunet_sam2", "run", ["-d", "7"])
    parsed = parser.parse_args(arguments)
    assert options_of(parsed, *parsed.folds).identity() == options.identity()


def test_another_sam2_under_the_same_name_is_refused_when_a_run_is_continued(
    fresh_dataset: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    options = RunOptions(sam2="untrained", device="cpu", profile="cpu")
    ledger = Ledger(fresh_dataset.results / "nnunet_sam2" / options.run_name)
    ledger.append("run", options=options.to_json())
    ledger.append("started", stage="setup/sam2_quality", key="", inputs={"sam2": "0123456789abcdef"})
    assert main([*RUN, "--profile", "cpu"]) == 2
    message = capsys.readouterr().err
    assert "is another model than the one that" in message
    assert "before 0123456789ab" in message
    assert "--branch NAME" in message
