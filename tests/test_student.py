"""What the trainer does with averaged weights, copy-paste and soft targets, in its own steps and files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_data import PSEUDO, NnunetRoots, add_round, make_trainer
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_sam2.errors import InputError
from nnunet_sam2.storage import read_json, write_json
from nnunet_sam2.trainers.settings import RoundSettings

R01 = "3d_fullres_r01"
ROUND = RoundSettings(
    num_epochs=2,
    num_iterations_per_epoch=2,
    num_val_iterations_per_epoch=1,
    seed=5,
    threads=1,
    sequential_validation=True,
    pseudo_cases=PSEUDO,
    pseudo_per_batch=0.5,
)


@pytest.fixture(scope="module")
def round_roots(tiny_nnunet: NnunetRoots, tmp_path_factory: pytest.TempPathFactory) -> NnunetRoots:
    roots = tiny_nnunet.copy_to(tmp_path_factory.mktemp("student"))
    add_round(roots, base="3d_fullres", name=R01, settings=ROUND, confidence=0.5)
    add_round(
        roots,
        base="3d_fullres",
        name="3d_soft",
        settings=dataclasses.replace(ROUND, soft_targets=True),
        confidence=1.0,
        sure=1.0,
    )
    return roots


@pytest.fixture
def roots(round_roots: NnunetRoots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NnunetRoots]:
    for name, value in round_roots.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    threads = torch.get_num_threads()
    yield round_roots
    torch.set_num_threads(threads)


def ready(trainer: Any) -> Any:
    """Prepare a trainer up to its first step, with the same random numbers each time."""
    trainer.initialize()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    torch.manual_seed(1)
    np.random.seed(1)
    return trainer


def losses(trainer: Any, number: int) -> list[float]:
    return [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(number)]


def own_weights(trainer: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.network.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_averaged_weights_are_what_is_saved_validated_and_started_from(
    roots: NnunetRoots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_sam2_ema_decay", "0.99")
    trainer = ready(make_trainer(roots, R01))
    expected, last = own_weights(trainer), []
    for t in range(3):
        losses(trainer, 1)
        decay, last = (1 + t) / (10 + t), own_weights(trainer)
        expected = [torch.lerp(own, mean, decay) for mean, own in zip(expected, last, strict=True)]
    with trainer.average.in_use():
        averaged = own_weights(trainer)
    for mean, own in zip(averaged, expected, strict=True):
        torch.testing.assert_close(mean, own, atol=1e-6, rtol=1e-5)

    seen = []
    stock_step = nnUNetTrainer.validation_step

    def look(one: Any, batch: dict) -> dict:
        seen.append(own_weights(one))
        return stock_step(one, batch)

    monkeypatch.setattr(nnUNetTrainer, "validation_step", look)
    trainer.validation_step(next(trainer.dataloader_val))
    monkeypatch.setattr(
        "nnunet_sam2.trainers.nnUNetTrainerSAM2.validate_sequentially",
        lambda one, **_: seen.append(own_weights(one)) or {"foreground_mean": {"Dice": 0.5}},
    )
    trainer.perform_actual_validation()
    assert [same(weights, averaged) for weights in seen] == [True, True]
    assert same(own_weights(trainer), last)

    path = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    stock = make_trainer(roots, "3d_fullres", trainer=nnUNetTrainer)
    stock.load_checkpoint(str(path))
    assert same(own_weights(stock), averaged)
    continued = make_trainer(roots, R01)
    continued.load_checkpoint(str(path))
    assert same(own_weights(continued), last)
    assert continued.average.updates == 3
    monkeypatch.setenv("nnUNet_sam2_warm_start", str(path))
    warm = make_trainer(roots, R01)
    warm.initialize()
    assert same(own_weights(warm), averaged)


def test_a_training_that_goes_on_without_averaging_says_so(
    roots: NnunetRoots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_sam2_ema_decay", "0.99")
    trainer = ready(make_trainer(roots, R01))
    losses(trainer, 1)
    path = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    monkeypatch.delenv("nnUNet_sam2_ema_decay")
    continued = make_trainer(roots, R01)
    continued.load_checkpoint(str(path))
    assert "ema_decay 0.99 -> None" in capsys.readouterr().out
    with trainer.average.in_use():
        assert same(own_weights(continued), own_weights(trainer))


def test_a_pasted_batch_reaches_the_network_with_labels_and_confidence_alike(
    roots: NnunetRoots, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: dict[str, list[tuple]] = {}
    for share in ("0", "1"):
        monkeypatch.setenv("nnUNet_sam2_copy_paste", share)
        trainer = ready(make_trainer(roots, R01))
        seen = steps[share] = []

        def look(one: Any, batch: dict, seen: list = seen) -> dict:
            seen.append((batch["data"].clone(), [t.clone() for t in batch["target"]], one.loss._confidence.clone()))
            return {"loss": np.zeros(1)}

        batch = next(trainer.dataloader_train)
        assert sorted(key in PSEUDO for key in batch["keys"]) == [False, True]
        with monkeypatch.context() as patch:
            patch.setattr(nnUNetTrainer, "train_step", look)
            trainer.train_step(batch)
    (data, targets, confidence), (pasted, pasted_targets, pasted_confidence) = steps["0"][0], steps["1"][0]
    changed = (pasted != data).any(dim=1)
    share = changed.float().mean(dim=(1, 2, 3))
    sides = [round(2 / 3 * n) / n for n in data.shape[2:]]
    torch.testing.assert_close(share, torch.full((2,), float(np.prod(sides))), atol=0.02, rtol=0)
    for before, after in ((data, pasted), (targets[0], pasted_targets[0]), (confidence, pasted_confidence)):
        swapped = torch.where(changed[:, None], before.flip(0), before)
        torch.testing.assert_close(after.float(), swapped.float(), atol=0, rtol=0)
    assert set(pasted_confidence[0].unique().tolist()) > {1.0}
    for before, after in zip(targets, pasted_targets, strict=True):
        assert torch.equal(before.sum(dim=0), after.sum(dim=0)), "a label went to nobody"


def test_probabilities_of_one_and_full_confidence_train_as_labels(
    roots: NnunetRoots, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = []
    for soft in ("true", "false"):
        monkeypatch.setenv("nnUNet_sam2_soft_targets", soft)
        monkeypatch.setenv("nnUNet_sam2_copy_paste", "1")
        trainer = ready(make_trainer(roots, "3d_soft"))
        assert trainer.soft_cases == (frozenset(PSEUDO) if soft == "true" else frozenset())
        values.append(losses(trainer, 4))
    # Borders of rotated samples are blurred in probabilities and sharp in labels.
    np.testing.assert_allclose(values[0], values[1], atol=0.03)
    assert values[0] != values[1], "the soft path has not run"


def test_human_samples_are_learnt_from_their_labels_and_the_others_from_probabilities(roots: NnunetRoots) -> None:
    trainer = ready(make_trainer(roots, "3d_soft"))
    for _ in range(3):
        batch = next(trainer.dataloader_train)
        with _captured_soft(trainer) as soft:
            trainer.train_step(batch)
        torch.testing.assert_close(soft[0].sum(dim=1), torch.ones_like(soft[0][:, 0]), atol=0.01, rtol=0)
        agree = (soft[0].argmax(dim=1, keepdim=True) == batch["target"][0]).float().mean(dim=(1, 2, 3, 4))
        for key, share, one in zip(batch["keys"], agree.tolist(), soft[0], strict=True):
            assert share > 0.95
            if key not in PSEUDO:
                assert share == 1.0
                assert set(one.unique().tolist()) == {0.0, 1.0}


@contextlib.contextmanager
def _captured_soft(trainer: Any) -> Iterator[list[torch.Tensor]]:
    """Note the probabilities that the loss is given."""
    found: list[torch.Tensor] = []
    weighted_by = trainer.loss.weighted_by

    def look(*args: Any, soft: torch.Tensor | None = None) -> Any:
        found.append(soft)
        return weighted_by(*args, soft=soft)

    trainer.loss.weighted_by = look
    yield found
    trainer.loss.weighted_by = weighted_by


def test_regions_train_on_probabilities_with_everything_on(
    tiny_nnunet: NnunetRoots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = tiny_nnunet.copy_to(tmp_path)
    for name, value in roots.environment.items():
        monkeypatch.setenv(name, value)
    description = read_json(roots.preprocessed / "dataset.json")
    small, large = (description["labels"][name] for name in ("small_organ", "large_organ"))
    description["labels"] = {"background": 0, "whole": [large, small], "small": [small]}
    description["regions_class_order"] = [large, small]
    write_json(roots.preprocessed / "dataset.json", description)
    for path in (roots.preprocessed / "nnUNetPlans_2d").glob("*.pkl"):
        _name_regions(path, large, small)
    settings = dataclasses.replace(ROUND, ema_decay=0.9, copy_paste=1.0, soft_targets=True, num_epochs=1)
    add_round(roots, base="2d", name="2d_r01", settings=settings, confidence=0.7, sure=0.9)
    trainer = make_trainer(roots, "2d_r01")
    trainer.run_training()
    assert trainer.soft_cases == frozenset(PSEUDO)
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()


def _name_regions(path: Path, large: int, small: int) -> None:
    """Let a preprocessed case know where its regions are."""
    import pickle

    properties = pickle.loads(path.read_bytes())
    where = properties["class_locations"]
    properties["class_locations"] = {
        (large, small): np.concatenate((where[large], where[small])),
        (small,): where[small],
    }
    path.write_bytes(pickle.dumps(properties))


def test_soft_targets_without_probabilities_are_refused_with_the_way_out(
    roots: NnunetRoots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_sam2_soft_targets", "true")
    trainer = make_trainer(roots, R01)
    trainer.initialize()
    with pytest.raises(InputError, match="make the round again with soft targets, or train it without"):
        trainer.get_tr_and_val_datasets()
