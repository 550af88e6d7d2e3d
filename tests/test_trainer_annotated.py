"""The trainer on partly annotated cases: what it hands to the loss, counts online and measures in the end."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_data import LABELLED, NnunetRoots, add_configuration, make_trainer

from nnunet_sam2.cohort.cohort import COHORT_FILE
from nnunet_sam2.storage import read_json, write_json
from nnunet_sam2.trainers.annotated import PartlyAnnotated
from nnunet_sam2.trainers.settings import SETTINGS_KEY, RoundSettings

R00 = "3d_fullres_r00"
SETTINGS = RoundSettings(
    num_epochs=1,
    num_iterations_per_epoch=2,
    num_val_iterations_per_epoch=1,
    seed=5,
    threads=1,
    sequential_validation=True,
    validation_mirroring=False,
)


@pytest.fixture(scope="module")
def planned(tiny_nnunet: NnunetRoots, tmp_path_factory: pytest.TempPathFactory) -> NnunetRoots:
    """The tiny dataset with a configuration of human labels alone."""
    roots = tiny_nnunet.copy_to(tmp_path_factory.mktemp("annotated"))
    add_configuration(roots, R00, {"inherits_from": "3d_fullres", SETTINGS_KEY: SETTINGS.to_json()})
    return roots


@pytest.fixture
def roots(planned: NnunetRoots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NnunetRoots:
    """``planned`` as this process's nnU-Net folders, with a results folder of the test's own."""
    for name, value in planned.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    return planned


@pytest.fixture(autouse=True)
def _keep_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _annotate(roots: NnunetRoots, known: dict[str, list[int]]) -> None:
    value = read_json(roots.raw / COHORT_FILE)
    for case in value["cases"]:
        case.pop("annotated", None)
        if case["id"] in known:
            case["annotated"] = known[case["id"]]
    write_json(roots.raw / COHORT_FILE, value)


def _started(roots: NnunetRoots) -> Any:
    trainer = make_trainer(roots, R00)
    trainer.initialize()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def test_each_sample_of_a_batch_says_what_was_annotated(roots: NnunetRoots) -> None:
    _annotate(roots, {})
    split = make_trainer(roots, R00).do_split()
    partly, whole = split[0][0], split[0][1]
    _annotate(roots, {partly: [1]})
    trainer = _started(roots)
    seen = []
    forward = trainer.loss.forward
    trainer.loss.forward = lambda output, target: seen.append(trainer.loss._annotated_bc) or forward(output, target)
    batch = next(trainer.dataloader_train)
    losses = []
    for keys in ([whole, whole], [partly, whole]):
        trainer.network.load_state_dict(trainer.network.state_dict())
        losses.append(float(trainer.train_step({**batch, "keys": np.array(keys)})["loss"]))
    assert seen[0] is None
    assert seen[1].tolist() == [[True, True, False], [True, True, True]]
    assert losses[0] != losses[1]


def test_a_class_that_was_not_annotated_counts_nowhere_in_validation(roots: NnunetRoots) -> None:
    _annotate(roots, {})
    training, (validated,) = make_trainer(roots, R00).do_split()
    _annotate(roots, {validated: [2], training[0]: [1]})
    trainer = make_trainer(roots, R00)
    trainer.run_training()
    trainer.perform_actual_validation()
    batch = next(trainer.dataloader_val)
    counted = trainer.validation_step(batch)
    assert [counted[name][0] for name in ("tp_hard", "fp_hard", "fn_hard")] == [0, 0, 0]
    assert counted["tp_hard"][1] + counted["fn_hard"][1] > 0
    trainer.annotated = PartlyAnnotated()
    assert trainer.validation_step(batch)["fn_hard"].tolist()[0] > 0
    summary = read_json(Path(trainer.output_folder) / "validation" / "summary.json")
    (metrics,) = (case["metrics"] for case in summary["metric_per_case"])
    assert math.isnan(metrics["1"]["Dice"])
    assert math.isfinite(metrics["2"]["Dice"])
    assert summary["foreground_mean"]["Dice"] == metrics["2"]["Dice"]
    provenance = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)["nnunet_sam2"]
    assert provenance["annotated"] == {validated: [2], training[0]: [1]}


def test_a_class_that_no_training_case_is_annotated_for_is_learnt_as_background(roots: NnunetRoots) -> None:
    _annotate(roots, {})
    known = PartlyAnnotated.of_training(roots.raw, LABELLED, (1, 2))
    assert known == PartlyAnnotated()
    _annotate(roots, {case: [1] for case in LABELLED})
    known = PartlyAnnotated.of_training(roots.raw, LABELLED, (1, 2))
    assert known.never == (2,)
    assert known.counts(LABELLED[0], 2)
    _annotate(roots, {LABELLED[0]: [1]})
    known = PartlyAnnotated.of_training(roots.raw, LABELLED, (1, 2))
    assert known.never == ()
    assert [known.counts(LABELLED[0], one) for one in (0, 1, 2, (1, 2))] == [True, True, False, False]
    assert known.counts(LABELLED[1], (1, 2))
    with_pseudo = PartlyAnnotated.of_training(roots.raw, ["another", LABELLED[0]], (1, 2))
    assert with_pseudo.never == ()


def test_nothing_is_partly_annotated_without_a_cohort(tmp_path: Path) -> None:
    assert PartlyAnnotated.of_training(None, ["a"], (1,)) == PartlyAnnotated()
    assert PartlyAnnotated.of_training(tmp_path, ["a"], (1,)) == PartlyAnnotated()
    assert dataclasses.asdict(PartlyAnnotated()) == {"known": {}, "never": ()}
