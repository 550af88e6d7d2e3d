"""The real commands find the trainer, and a training that is killed for real goes on as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from nnunet_data import PSEUDO, NnunetRoots, add_round, make_trainer, run_tool

from nnunet_sam2.storage import read_json
from nnunet_sam2.trainers import discovery
from nnunet_sam2.trainers.settings import RoundSettings
from nnunet_sam2.volumes import read_label

R01 = "2d_r01"
SETTINGS = RoundSettings(
    num_epochs=6,
    num_iterations_per_epoch=25,
    num_val_iterations_per_epoch=1,
    save_every=1,
    optimizer="adamw",
    initial_lr=1e-3,
    pseudo_cases=PSEUDO,
    pseudo_per_batch=0.5,
    seed=11,
    threads=1,
    sequential_validation=True,
)


def kill_after_first_checkpoint(command: list[str], environment: dict[str, str], checkpoint: Path) -> None:
    """Start a training and end its whole process group with SIGKILL as soon as it can be continued."""
    script = Path(sys.executable).parent / command[0]
    process = subprocess.Popen(
        [str(script), *command[1:]],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 120
        while not checkpoint.is_file() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_real_commands_train_after_a_real_kill_and_predict(
    tiny_nnunet: NnunetRoots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = tiny_nnunet.copy_to(tmp_path)
    add_round(roots, base="2d", name=R01, settings=SETTINGS, confidence=0.5)
    environment = {**roots.environment, **discovery.environment({})}
    dataset = roots.dataset[7:10]
    train = ["nnUNetv2_train", dataset, R01, "0", "-tr", discovery.TRAINER_NAME, "-device", "cpu"]
    model = roots.results / f"{discovery.TRAINER_NAME}__nnUNetPlans__{R01}"
    latest, final = (model / "fold_0" / f"checkpoint_{name}.pth" for name in ("latest", "final"))

    kill_after_first_checkpoint(train, environment, latest)
    assert latest.is_file()
    assert not final.exists(), "the training was over before it could be killed"
    run_tool([*train, "--c"], environment)
    killed = torch.load(final, weights_only=False)
    assert killed["trainer_name"] == discovery.TRAINER_NAME
    assert read_json(model / "fold_0" / "validation" / "summary.json")["foreground_mean"]["Dice"] >= 0

    for name, value in roots.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "straight"))
    threads = torch.get_num_threads()
    straight = make_trainer(roots, R01)
    straight.run_training()
    torch.set_num_threads(threads)
    weights = torch.load(Path(straight.output_folder) / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert [name for name in weights if not torch.equal(weights[name], killed["network_weights"][name])] == []

    images, predictions = roots.raw / "imagesUn", tmp_path / "predictions"
    predict = ["nnUNetv2_predict", "-i", str(images), "-o", str(predictions), "-d", dataset, "-c", R01, "-f", "0"]
    options = ["-tr", discovery.TRAINER_NAME, "-device", "cpu", "-npp", "0", "-nps", "0", "--disable_tta"]
    run_tool([*predict, *options], environment)
    for case in PSEUDO:
        label_zyx, _ = read_label(predictions / f"{case}.nii.gz", allowed=(0, 1, 2))
        assert label_zyx.shape == read_label(roots.pseudo_labels / f"{case}.nii.gz")[0].shape


def test_the_search_gives_one_class_that_workers_can_unpickle(monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_sam2.trainers.loader import RoundDataLoader
    from nnunet_sam2.trainers.nnUNetTrainerSAM2 import nnUNetTrainerSAM2

    for name, value in discovery.environment({}).items():
        monkeypatch.setenv(name, value)
    found = recursive_find_trainer_class_by_name(discovery.TRAINER_NAME)
    assert found is nnUNetTrainerSAM2
    assert recursive_find_trainer_class_by_name(discovery.TRAINER_NAME) is found
    assert pickle.loads(pickle.dumps(found)) is found
    assert pickle.loads(pickle.dumps(RoundDataLoader)) is RoundDataLoader


def test_without_the_variable_nnunet_does_not_know_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    monkeypatch.delenv(discovery.EXTENSION_VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer"):
        recursive_find_trainer_class_by_name(discovery.TRAINER_NAME)
