"""The trainer in this process: held against stock, killed, continued, started warm."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_data import LABELLED, PSEUDO, NnunetRoots, add_configuration, add_round, make_trainer, preprocess
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder, load_summary_json
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_sam2.errors import InputError
from nnunet_sam2.storage import read_json, write_json
from nnunet_sam2.trainers.nnUNetTrainerSAM2 import nnUNetTrainerSAM2
from nnunet_sam2.trainers.settings import SETTINGS_KEY, RoundSettings
from nnunet_sam2.volumes import read_label, write_label

SHORT = RoundSettings(
    num_epochs=4,
    num_iterations_per_epoch=3,
    num_val_iterations_per_epoch=1,
    save_every=2,
    seed=5,
    threads=1,
    sequential_validation=True,
)
ROUND = dataclasses.replace(SHORT, pseudo_cases=PSEUDO, pseudo_per_batch=0.5)
R01 = "3d_fullres_r01"


class Killed(Exception):  # noqa: N818 - what happens, not an error
    """Stands for a SIGKILL: nothing of the trainer runs after it."""


@pytest.fixture(scope="module")
def round_roots(tiny_nnunet: NnunetRoots, tmp_path_factory: pytest.TempPathFactory) -> NnunetRoots:
    """The tiny dataset with a round's configuration; no test writes into its preprocessed folder."""
    roots = tiny_nnunet.copy_to(tmp_path_factory.mktemp("round"))
    add_round(roots, base="3d_fullres", name=R01, settings=ROUND, confidence=0.5)
    return roots


@pytest.fixture
def roots(round_roots: NnunetRoots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NnunetRoots:
    """``round_roots`` with a results folder of the test's own, as this process's nnU-Net folders."""
    for name, value in round_roots.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    return round_roots


@pytest.fixture(autouse=True)
def _keep_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def weights(trainer_or_file: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a finished trainer's final checkpoint, or of a checkpoint file."""
    path = trainer_or_file
    if not isinstance(path, Path):
        path = Path(trainer_or_file.output_folder) / "checkpoint_final.pth"
    return torch.load(path, weights_only=False)["network_weights"]


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def steps(trainer: Any, number: int, *, seed: int = 0) -> list[float]:
    """Prepare ``trainer`` and return the losses of its first steps."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    trainer.initialize()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    torch.manual_seed(seed + 1)
    np.random.seed(seed + 1)
    return [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(number)]


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_without_settings_it_trains_as_stock_does(roots: NnunetRoots, configuration: str) -> None:
    ours, stock = make_trainer(roots, configuration), make_trainer(roots, configuration, trainer=nnUNetTrainer)
    assert (ours.num_epochs, ours.num_iterations_per_epoch, ours.initial_lr) == (1000, 250, 1e-2)
    torch.set_num_threads(1)
    assert steps(ours, 3) == steps(stock, 3)
    for own, other in zip(ours.network.parameters(), stock.network.parameters(), strict=True):
        assert torch.equal(own, other)


def test_maps_of_full_confidence_train_as_no_maps(roots: NnunetRoots, tiny_nnunet: NnunetRoots, tmp_path: Path) -> None:
    full = tiny_nnunet.copy_to(tmp_path / "full")
    add_round(full, base="3d_fullres", name=R01, settings=ROUND, confidence=1.0)
    losses = []
    for one in (full, roots):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("nnUNet_preprocessed", str(one.root / "preprocessed"))
            trainer = make_trainer(one, R01)
            if one is roots:
                trainer._distrust_folder = lambda cases: None
            losses.append(steps(trainer, 4))
            assert (trainer.dataloader_train.data_loader._data.distrust_folder is None) == (one is roots)
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)
    assert losses[0] != losses[1], "the weighted path has not run"


def test_half_trusted_cases_change_the_loss(roots: NnunetRoots) -> None:
    weighted, plain = make_trainer(roots, R01), make_trainer(roots, R01)
    plain._distrust_folder = lambda cases: None
    assert abs(np.subtract(steps(weighted, 2), steps(plain, 2))).max() > 1e-3


@pytest.mark.parametrize("averaged", [False, True])
def test_a_killed_training_ends_as_one_that_was_not(
    roots: NnunetRoots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, averaged: bool
) -> None:
    if averaged:
        monkeypatch.setenv("nnUNet_sam2_ema_decay", "0.9")
        monkeypatch.setenv("nnUNet_sam2_copy_paste", "0.7")
    straight = make_trainer(roots, R01)
    straight.run_training()
    whole = torch.load(Path(straight.output_folder) / "checkpoint_final.pth", weights_only=False)
    best = weights(Path(straight.output_folder) / "checkpoint_best.pth")
    Path(straight.output_folder).rename(tmp_path / "straight")

    killed = make_trainer(roots, R01)
    steps_done = []

    def step_or_die(batch: dict) -> dict:
        steps_done.append(killed.current_epoch)
        if len(steps_done) == 3 * 3 - 1:
            raise Killed
        return nnUNetTrainerSAM2.train_step(killed, batch)

    killed.train_step = step_or_die
    with pytest.raises(Killed):
        killed.run_training()
    assert steps_done[-1] == 2
    folder = Path(killed.output_folder)
    assert not (folder / "checkpoint_final.pth").exists()

    shutil.copytree(folder, tmp_path / "left")

    for left in ("latest", "best"):  # the best one serves where the latest was damaged
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "left", folder)
        torch.manual_seed(99)  # another process has other random numbers
        np.random.seed(99)
        continued = make_trainer(roots, R01)
        continued.load_checkpoint(str(folder / f"checkpoint_{left}.pth"))
        assert continued.current_epoch == 2 if left == "latest" else continued.current_epoch in (1, 2)
        continued.run_training()
        _assert_ended_as(folder, whole, best)


def _assert_ended_as(folder: Path, whole: dict, best: dict) -> None:
    again = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert_same_weights(again["network_weights"], whole["network_weights"])
    ours, other = again["nnunet_sam2"], whole["nnunet_sam2"]
    assert ("ema" in ours) == ("ema" in other)
    if "ema" in ours:
        assert ours["ema"]["updates"] == other["ema"]["updates"] == 4 * 3
        assert_same_weights(ours["ema"]["last"], other["ema"]["last"])
        assert not torch.equal(*(next(iter(w.values())) for w in (ours["ema"]["last"], again["network_weights"])))
    for key in ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice"):
        assert again["logging"][key] == whole["logging"][key]
    assert_same_weights(weights(folder / "checkpoint_best.pth"), best)
    assert not (folder / "checkpoint_latest.pth").exists()
    assert (folder / "progress.png").is_file()


def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_one(
    roots: NnunetRoots, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(roots, R01)
    trainer.initialize()
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    before = path.read_bytes()

    def write_half(checkpoint: dict, stream: Any) -> None:
        stream.write(b"PK half of a checkpoint")
        raise Killed

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(Killed):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before


def test_checkpoints_have_stock_keys_and_say_what_went_in(roots: NnunetRoots, tmp_path: Path) -> None:
    ours, stock = make_trainer(roots, R01), make_trainer(roots, "3d_fullres", trainer=nnUNetTrainer)
    for name, trainer in (("ours", ours), ("stock", stock)):
        trainer.initialize()
        trainer.do_split()
        trainer.save_checkpoint(str(tmp_path / f"{name}.pth"))
    one, other = (torch.load(tmp_path / f"{name}.pth", weights_only=False) for name in ("ours", "stock"))
    assert set(one) - set(other) == {"nnunet_sam2"}
    assert set(other) <= set(one)
    provenance = one["nnunet_sam2"]
    assert RoundSettings.from_json(provenance["settings"]) == ROUND
    assert provenance["pseudo"] == list(PSEUDO)
    assert set(provenance["labelled"]) < set(LABELLED)


def test_a_warm_start_takes_every_weight_heads_included(roots: NnunetRoots, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_trainer(roots, "3d_fullres")
    first.initialize()
    path = Path(first.output_folder_base).parent / "warm.pth"
    first.save_checkpoint(str(path))
    monkeypatch.setenv("nnUNet_sam2_warm_start", "warm.pth")  # under the results folder
    second = make_trainer(roots, R01)
    second.initialize()
    assert_same_weights(second.network.state_dict(), first.network.state_dict())
    assert any("seg_layers" in name for name in second.network.state_dict())
    continued = Path(second.output_folder) / "checkpoint_latest.pth"
    second.save_checkpoint(str(continued))
    path.unlink()
    third = make_trainer(roots, R01)
    third.load_checkpoint(str(continued))  # what is continued needs the first checkpoint no more
    assert third.warm_started_from == second.warm_started_from


def test_a_warm_start_from_another_network_is_refused_by_name(
    roots: NnunetRoots, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_trainer(roots, "2d")
    other.initialize()
    path = Path(other.output_folder) / "other.pth"
    other.save_checkpoint(str(path))
    monkeypatch.setenv("nnUNet_sam2_warm_start", str(path))
    with pytest.raises(InputError, match=r"other\.pth: its network is another one"):
        make_trainer(roots, R01).initialize()
    path.write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"other\.pth is not a readable checkpoint"):
        make_trainer(roots, R01).initialize()


def test_every_batch_mixes_both_kinds_and_validation_is_human(roots: NnunetRoots) -> None:
    trainer = make_trainer(roots, R01)
    trainer.initialize()
    training, validation = trainer.get_dataloaders()
    for _ in range(6):
        keys = next(training)["keys"]
        assert sorted(key in PSEUDO for key in keys) == [False, True]
        batch = next(validation)
        assert not set(batch["keys"]) & set(PSEUDO)
        assert batch["data"].shape[1] == 1


def test_mirroring_is_off_in_training_and_prediction(roots: NnunetRoots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_sam2_mirroring", "false")
    trainer = make_trainer(roots, R01)
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] is None
    assert trainer.inference_allowed_mirroring_axes is None


def test_a_spent_time_budget_ends_the_training_with_a_final_checkpoint(
    roots: NnunetRoots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_sam2_time_budget_s", "1e-6")
    trainer = make_trainer(roots, R01)
    trainer.run_training()
    final = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)
    assert final["current_epoch"] == 1


def test_adamw_and_threads_are_as_asked(roots: NnunetRoots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_sam2_optimizer", "adamw")
    torch.set_num_threads(2)
    trainer = make_trainer(roots, R01)
    assert torch.get_num_threads() == 1
    trainer.initialize()
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    trainer.lr_scheduler.step(2)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**0.9)


def test_sequential_validation_writes_what_stock_writes(roots: NnunetRoots) -> None:
    trainer = make_trainer(roots, R01, "all")
    trainer.initialize()
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    trainer.perform_actual_validation()
    folder = Path(trainer.output_folder) / "validation"
    ours = read_json(folder / "summary.json")
    assert {Path(case["prediction_file"]).name for case in ours["metric_per_case"]} == {f"{c}.nii.gz" for c in LABELLED}
    assert ours["foreground_mean"]["n_ref"] > 0
    stock_file = Path(trainer.output_folder) / "stock.json"
    compute_metrics_on_folder(
        str(roots.preprocessed / "gt_segmentations"),
        str(folder),
        str(stock_file),
        trainer.plans_manager.image_reader_writer_class(),
        ".nii.gz",
        trainer.label_manager.foreground_labels,
        num_processes=1,
    )
    assert load_summary_json(str(folder / "summary.json")) == load_summary_json(str(stock_file))


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("kind", ["regions", "ignore", "regions_ignore"])
def test_regions_and_an_ignore_label_train_and_validate(
    tiny_nnunet: NnunetRoots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configuration: str, kind: str
) -> None:
    roots = tiny_nnunet.copy_to(tmp_path)
    for name, value in roots.environment.items():
        monkeypatch.setenv(name, value)
    description = read_json(roots.preprocessed / "dataset.json")
    small, large = (description["labels"][name] for name in ("small_organ", "large_organ"))
    if "regions" in kind:
        description["labels"] = {"background": 0, "whole": [large, small], "small": [small]}
        description["regions_class_order"] = [large, small]
    if "ignore" in kind:
        description["labels"]["ignore"] = 3
    write_json(roots.preprocessed / "dataset.json", description)
    for number, case in enumerate((*LABELLED, *PSEUDO)):
        human = case in LABELLED
        label_file = (roots.raw / "labelsTr" if human else roots.pseudo_labels) / f"{case}.nii.gz"
        label_zyx, geometry = read_label(label_file)
        if "ignore" in kind:
            label_zyx[number % 3] = 3
        write_label(label_file, label_zyx, geometry)
        if human:
            write_label(roots.preprocessed / "gt_segmentations" / f"{case}.nii.gz", label_zyx, geometry)
            for path in (roots.preprocessed / f"nnUNetPlans_{configuration}").glob(f"{case}*"):
                path.unlink()
            image = roots.raw / "imagesTr" / f"{case}_0000.nii.gz"
            preprocess(roots, configuration, case, image, label_file, data_identifier=f"nnUNetPlans_{configuration}")
    settings = dataclasses.replace(ROUND, num_epochs=1)
    add_round(roots, base=configuration, name=f"{configuration}_r01", settings=settings, confidence=0.7)
    trainer = make_trainer(roots, f"{configuration}_r01")
    trainer.run_training()
    assert trainer.loss._confidence is None
    losses = trainer.logger.get_value("train_losses", step=None)
    assert np.isfinite(losses).all()
    trainer.perform_actual_validation()
    summary = read_json(Path(trainer.output_folder) / "validation" / "summary.json")
    wanted = {f"({large}, {small})", f"({small},)"} if "regions" in kind else {str(large), str(small)}
    assert set(summary["mean"]) == wanted


def test_a_named_folder_of_maps_must_be_there(roots: NnunetRoots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_sam2_confidence_folder", "nowhere")
    trainer = make_trainer(roots, R01)
    trainer.initialize()
    with pytest.raises(InputError, match=r"nowhere with the distrust maps does not exist"):
        trainer.get_tr_and_val_datasets()


def test_wrong_settings_are_refused_before_anything_is_trained(
    tiny_nnunet: NnunetRoots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = tiny_nnunet.copy_to(tmp_path)
    for name, value in roots.environment.items():
        monkeypatch.setenv(name, value)
    add_configuration(roots, "3d_wrong", {"inherits_from": "3d_fullres", SETTINGS_KEY: {"epochs": 3}})
    with pytest.raises(InputError, match="unknown settings epochs"):
        make_trainer(roots, "3d_wrong")
