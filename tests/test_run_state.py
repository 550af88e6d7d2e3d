"""Options, lock and state of a run, without torch and without images."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_sam2.cli.status import rounds_table
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.ledger import Ledger, StageResult
from nnunet_sam2.rounds.lock import only_run
from nnunet_sam2.rounds.options import RunOptions, describe_difference
from nnunet_sam2.rounds.state import read_state
from nnunet_sam2.trainers.settings import RoundSettings

LIGHT = RoundSettings(num_epochs=10, num_iterations_per_epoch=60, optimizer="adamw", initial_lr=1e-3)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetFolders:
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name / "Dataset501_Toy").mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return DatasetFolders(
        name="Dataset501_Toy",
        raw=tmp_path / "raw/Dataset501_Toy",
        preprocessed=tmp_path / "preprocessed/Dataset501_Toy",
        results=tmp_path / "results/Dataset501_Toy",
    )


def _record_round(ledger: Ledger, number: int, dice: float | None, change: float | None) -> None:
    name = f"r{number:02d}"
    delta = None if change is None else {"mean": change, "worst_tenth": 2 * change, "by_case": {}}
    for stage, info in (
        ("fuse", {"round": number, "change": delta, "quality": {}}),
        ("data", {"round": number, "configuration": f"3d_fullres_{name}", "final": False}),
        ("train", {"iterations": 600, "validation_dice": dice, "validation_by_class": {}}),
    ):
        ledger.run_stage(f"{name}/{stage}", {}, lambda info=info: StageResult(info=info), what=stage)


def test_the_state_names_rounds_change_validation_and_the_best_round(folders: DatasetFolders) -> None:
    options = RunOptions()
    ledger = Ledger(folders.results / "nnunet_sam2" / options.run_name)
    ledger.append("run", options=options.to_json())
    _record_round(ledger, 1, 0.8, None)
    _record_round(ledger, 2, 0.9, 0.2)
    _record_round(ledger, 3, 0.85, 0.005)
    state = read_state(folders)
    assert [r.number for r in state.rounds] == [1, 2, 3]
    assert state.rounds[1].change_mean == 0.2
    assert state.best_round == 2
    assert state.configuration_of() == "3d_fullres_r02"
    assert state.configuration_of(3) == "3d_fullres_r03"
    assert state.stop_reason is None
    ledger.append("stopped", reason="converged", best_round=3, validation_watched=True)
    assert read_state(folders).stop_reason == "converged"
    assert read_state(folders).best_round == 3


def test_status_says_how_much_a_round_does_not_learn_from(folders: DatasetFolders) -> None:
    ledger = Ledger(folders.results / "nnunet_sam2" / RunOptions().run_name)
    ledger.append("run", options=RunOptions().to_json())
    fused = {"round": 1, "change": None, "left_out": {"a": "why"}, "distrusted": {"b": [1, 2], "c": [2]}}
    ledger.run_stage("r01/fuse", {}, lambda: StageResult(info=fused), what="fuse")
    state = read_state(folders)
    assert (state.rounds[0].left_out, state.rounds[0].distrusted) == (("a",), 3)
    assert "round 1: cases left out: 1 (a), classes of other cases not learnt from: 3" in rounds_table(state)


def test_a_round_that_was_not_trained_is_refused_with_those_that_were(folders: DatasetFolders) -> None:
    ledger = Ledger(folders.results / "nnunet_sam2" / "3d_fullres_fold0")
    ledger.append("run", options=RunOptions().to_json())
    _record_round(ledger, 1, 0.8, None)
    with pytest.raises(InputError, match="finished rounds: 1"):
        read_state(folders).round(4)


def test_a_later_run_without_a_finished_round_does_not_hide_one_that_has_some(folders: DatasetFolders) -> None:
    good = Ledger(folders.results / "nnunet_sam2" / "3d_fullres_fold0")
    good.append("run", options=RunOptions().to_json())
    _record_round(good, 1, 0.8, None)
    begun = Ledger(folders.results / "nnunet_sam2" / "2d_fold0")
    begun.append("run", options=RunOptions(configuration="2d").to_json())
    assert read_state(folders).folder == good.folder
    assert read_state(folders, "2d_fold0").best_round is None


def test_a_dataset_without_a_run_says_how_to_start_one(folders: DatasetFolders) -> None:
    with pytest.raises(InputError, match="nnunet_sam2 run -d 501"):
        read_state(folders)


def test_status_answers_in_half_a_second_and_without_torch(folders: DatasetFolders) -> None:
    ledger = Ledger(folders.results / "nnunet_sam2" / "3d_fullres_fold0")
    ledger.append("run", options=RunOptions().to_json())
    _record_round(ledger, 1, 0.8, None)
    code = (
        "import sys; from nnunet_sam2.cli.main import main; main(['status', '-d', '501']);"
        "print(sorted({'torch', 'numpy', 'SimpleITK'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        start = time.process_time(), os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - start[1].children_user - start[1].children_system)
        assert done.stdout.strip().endswith("[]"), done.stdout
    assert "3d_fullres_r01" in done.stdout
    # CPU seconds of the child, so that a busy machine does not fail the test
    assert min(seconds) < 0.5


def test_a_second_run_on_the_same_folder_is_refused_and_the_owner_is_named(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from nnunet_sam2.rounds.lock import only_run\n"
        "with only_run(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(InputError, match=f"process {holder.pid}"), only_run(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with only_run(tmp_path):  # the lock of a killed owner is free
        pass


def test_options_that_change_the_result_are_part_of_the_identity_and_the_others_are_not() -> None:
    base = RunOptions()
    assert RunOptions(round_limit=9, threads=1, device="cpu").identity() == base.identity()
    assert RunOptions(seed=1).identity() != base.identity()
    assert describe_difference(base.identity(), RunOptions(seed=1).identity()) == "--seed: 12345 -> 1"


def test_a_run_from_before_there_were_these_options_is_the_one_without_them() -> None:
    later = {"ema_decay": 0.99, "copy_paste": 0.5, "soft_targets": True, "warm_lr": 1e-3}
    before = {name: value for name, value in RunOptions().to_json().items() if name not in later}
    assert RunOptions.from_json(before, where="ledger").identity() == RunOptions().identity()
    asked = RunOptions(**later)
    assert asked.identity() != RunOptions().identity()
    settings = asked.training(LIGHT)
    assert (settings.ema_decay, settings.copy_paste, settings.soft_targets) == (0.99, 0.5, True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"fold": "x"},
        {"profile": "tpu"},
        {"round_limit": 0},
        {"pseudo_per_batch": 1.0},
        {"ema_decay": 1.0},
        {"copy_paste": 1.5},
        {"warm_lr": 0.0},
        {"branch": "a/b"},
        {"mean_change": 2.0},
        {"num_epochs": 0},
        {"supports": "some"},
    ],
)
def test_an_option_out_of_range_is_refused(wrong: dict) -> None:
    with pytest.raises(InputError):
        RunOptions(**wrong)


def test_only_a_warm_start_has_the_learning_rate_that_was_asked_for_it(folders: DatasetFolders) -> None:
    ledger = Ledger(folders.results / "run")
    options = RunOptions(profile="cpu", warm_lr=5e-4)
    run = RunContext(folders=folders, cohort=None, options=options, ledger=ledger, folder=ledger.path.parent)
    vars(run)["plans"] = {"configurations": {"3d_fullres": {"patch_size": [8, 8, 8]}}}
    before = folders.results / "r00" / "checkpoint_final.pth"
    cold, last = run.settings(0, final=False), run.settings(2, final=True)
    warm = run.settings(1, final=False, warm_start=before)
    assert [bool(settings.warm_start) for settings in (cold, warm, last)] == [False, True, False]
    assert [settings.initial_lr for settings in (cold, warm, last)] == [1e-3, 5e-4, 1e-3]


def test_folds_and_branches_have_configurations_of_their_own() -> None:
    assert RunOptions().round_configuration(1) == "3d_fullres_r01"
    assert RunOptions(fold="2").round_configuration(1) == "3d_fullres_f2_r01"
    assert RunOptions(fold="all", branch="b").round_configuration(3) == "3d_fullres_fall_b_r03"


def test_on_a_gpu_the_rounds_get_a_quarter_of_the_schedule_and_the_last_training_all_of_it() -> None:
    options = RunOptions(profile="gpu")
    assert options.training(LIGHT).num_epochs == 250
    assert options.training(LIGHT, final=True).num_epochs == 1000
    assert options.has_final
    assert not RunOptions(profile="gpu", final_epochs=0).has_final


def test_the_cpu_profile_trains_with_the_light_schedule_and_has_no_last_training() -> None:
    options = RunOptions(profile="cpu", num_epochs=3)
    assert options.training(LIGHT).num_epochs == 3
    assert options.training(LIGHT).optimizer == "adamw"
    assert not options.has_final
