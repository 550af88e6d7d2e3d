"""nnU-Net's presets and its pretrained start go through a run as they do through nnU-Net's own commands."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from anisotropic_data import Dataset, small_round
from test_nnunet_light import forward

from nnunet_sam2.cli.main import main
from nnunet_sam2.errors import InputError
from nnunet_sam2.rounds.nnunet import (
    fold_folder,
    light_configuration,
    make_round_configuration,
    plan_and_preprocess,
    read_plans,
    train,
    write_splits,
)
from nnunet_sam2.rounds.nnunet import plan as nnunet_plan
from nnunet_sam2.rounds.nnunet import training as nnunet_train
from nnunet_sam2.rounds.nnunet.base import PLANNERS
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.orchestrator import refuse_unusable
from nnunet_sam2.trainers.settings import RoundSettings

PRESET = "nnUNetResEncUNetMPlans"


@pytest.fixture
def preset(planned: Dataset, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """The planned dataset, planned by a preset too, by nnU-Net's command in this process: its start is what costs."""
    from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints as entry

    def in_process(argv: list[str], **_: Any) -> None:
        monkeypatch.setattr("sys.argv", argv)
        entry.plan_and_preprocess_entry()

    monkeypatch.setattr(nnunet_plan, "run_logged", in_process)
    plan_and_preprocess(
        planned.folders,
        planned.cohort,
        "3d_fullres",
        log=planned.log,
        plans=PRESET,
        planner=PLANNERS[PRESET],
    )
    return planned


def test_a_preset_is_planned_by_its_planner_and_its_network_is_what_a_round_trains(preset: Dataset) -> None:
    plans = read_plans(preset.folders, PRESET)
    assert plans["plans_name"] == PRESET
    write_splits(preset.folders, preset.cohort)
    overrides = light_configuration(plans, "3d_fullres")
    assert "ResidualEncoderUNet" in overrides["architecture"]["network_class_name"]
    assert forward(overrides)
    labels = preset.hidden_labels(preset.root / "labels")
    made = make_round_configuration(
        preset.folders,
        preset.cohort,
        base_configuration="3d_fullres",
        name="3d_fullres_try_r01",
        settings=RoundSettings(),
        pseudo_cases=preset.unlabelled,
        labels=labels,
        overrides=overrides,
        plans=PRESET,
    )
    assert made.data_folder.name == f"{PRESET}_3d_fullres_try_r01"
    assert "3d_fullres_try_r01" in read_plans(preset.folders, PRESET)["configurations"]
    assert "3d_fullres_try_r01" not in read_plans(preset.folders)["configurations"]


def test_plans_that_are_neither_there_nor_a_preset_are_refused(planned: Dataset) -> None:
    refuse_unusable(planned.folders, planned.cohort, RunOptions(plans=PRESET))
    with pytest.raises(InputError, match="nnUNetv2_plan_experiment first"):
        refuse_unusable(planned.folders, planned.cohort, RunOptions(plans="myPlans"))
    with pytest.raises(InputError, match="single '_'"):
        RunOptions(plans="my__Plans")


def test_a_file_that_is_no_checkpoint_of_nnunet_is_refused_before_anything_is_done(
    planned: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.pth").write_bytes(b"not a checkpoint")
    asked = ["run", "-d", "502", "-c", "3d_fullres", "--device", "cpu", "--sam2", "untrained"]
    assert main([*asked, "--pretrained", str(tmp_path / "weights.pth")]) == 2
    assert "weights.pth" in capsys.readouterr().err
    assert not (planned.folders.results / "nnunet_sam2").exists()


def test_old_options_are_those_of_nnunets_own_plans() -> None:
    before = {name: value for name, value in RunOptions().to_json().items() if name not in ("plans", "pretrained")}
    assert RunOptions.from_json(before, where="ledger") == RunOptions()
    told = RunOptions(plans=PRESET, pretrained="/weights.pth", branch="res").command(501)
    assert f"-p {PRESET}" in told
    assert "--pretrained /weights.pth" in told


def test_a_training_starts_from_the_weights_it_is_given_without_their_heads(trained: Dataset) -> None:
    from nnunet_sam2.trainers.checkpoints import read_checkpoint

    given = fold_folder(trained.folders, "3d_fullres_r01", 0) / "checkpoint_final.pth"
    settings = RoundSettings(
        num_epochs=1,
        num_iterations_per_epoch=1,
        num_val_iterations_per_epoch=1,
        optimizer="adamw",
        initial_lr=1e-9,
        mirroring=False,
        seed=7,
        threads=1,
        sequential_validation=True,
    )
    small_round(trained, "3d_fullres_r02", settings=settings)
    done = train(trained.folders, "3d_fullres_r02", 0, device="cpu", log=trained.log, threads=1, pretrained=given)
    before, after = (read_checkpoint(path)["network_weights"] for path in (given, done.checkpoint))
    for name, weights in before.items():
        same = bool((weights - after[name]).abs().max() < 1e-6)
        if name.endswith(".seg_layers.0.bias"):
            continue  # the lowest head weighs nothing in the loss: its bias stays at 0 in every training
        assert same != (".seg_layers." in name), name


def test_a_killed_training_goes_on_from_its_own_checkpoint(trained: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fold_folder(trained.folders, "3d_fullres_r01", 0)
    given = trained.root / "given.pth"
    shutil.copy(folder / "checkpoint_final.pth", given)
    (folder / "checkpoint_final.pth").rename(folder / "checkpoint_latest.pth")
    asked: list[list[str]] = []

    def note(argv: list[str], **_: Any) -> list[str]:
        asked.append(argv)
        folder.mkdir(exist_ok=True)
        shutil.copy(given, folder / "checkpoint_final.pth")
        return []

    monkeypatch.setattr(nnunet_train, "stream_logged", note)
    train(trained.folders, "3d_fullres_r01", 0, device="cpu", log=trained.log, pretrained=given)
    shutil.rmtree(folder)
    train(trained.folders, "3d_fullres_r01", 0, device="cpu", log=trained.log, pretrained=given)
    assert asked[0][-1] == "--c"
    assert asked[1][-2:] == ["-pretrained_weights", str(given)]
