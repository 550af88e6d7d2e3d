"""Training settings: what may be asked, and how the environment overrides it."""

from __future__ import annotations

import json

import pytest

from nnunet_sam2.errors import InputError
from nnunet_sam2.trainers.settings import PROVENANCE_KEY, SETTINGS_KEY, RoundSettings


def test_defaults_are_the_stock_schedule() -> None:
    settings = RoundSettings()
    assert (settings.num_epochs, settings.num_iterations_per_epoch, settings.num_val_iterations_per_epoch) == (
        1000,
        250,
        50,
    )
    assert (settings.optimizer, settings.initial_lr, settings.weight_decay) == ("sgd", 1e-2, 3e-5)
    assert settings.mirroring
    assert RoundSettings.from_configuration({"patch_size": [1, 2]}, {}) == settings


def test_settings_survive_json() -> None:
    settings = RoundSettings(num_epochs=3, pseudo_cases=("a", "b"), pseudo_per_batch=0.5, seed=4, warm_start="x.pth")
    assert RoundSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_the_environment_overrides_the_plans() -> None:
    block = {SETTINGS_KEY: RoundSettings(threads=2, warm_start="x.pth").to_json()}
    environment = {
        "nnUNet_sam2_threads": "1",
        "nnUNet_sam2_warm_start": "none",
        "nnUNet_sam2_mirroring": "False",
        "nnUNet_sam2_initial_lr": "1e-3",
        "nnUNet_sam2_pseudo_cases": "a, b",
    }
    settings = RoundSettings.from_configuration(block, environment)
    assert settings == RoundSettings(threads=1, mirroring=False, initial_lr=1e-3, pseudo_cases=("a", "b"))


def test_an_unreadable_variable_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="nnUNet_sam2_num_epochs='ten'"):
        RoundSettings.from_configuration({}, {"nnUNet_sam2_num_epochs": "ten"})


def test_an_unknown_setting_is_refused_but_provenance_is_free() -> None:
    with pytest.raises(InputError, match="nm_epochs"):
        RoundSettings.from_json({"nm_epochs": 3})
    assert RoundSettings.from_json({PROVENANCE_KEY: {"anything": 1}}) == RoundSettings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_epochs", 0),
        ("num_epochs", "3"),
        ("num_epochs", True),
        ("optimizer", "adam"),
        ("initial_lr", 0),
        ("pseudo_per_batch", 1.5),
        ("ema_decay", 1),
        ("copy_paste", -0.1),
        ("soft_targets", 1),
        ("pseudo_cases", ["a", "a"]),
        ("pseudo_cases", "a"),
        ("confidence_folder", "../elsewhere"),
        ("threads", 0),
        ("mirroring", 1),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name):
        RoundSettings.from_json({name: value})


def test_later_settings_are_written_only_where_they_ask_for_something() -> None:
    assert not {"ema_decay", "copy_paste", "soft_targets"} & set(RoundSettings().to_json())
    settings = RoundSettings(ema_decay=0.99, copy_paste=0.5, soft_targets=True)
    assert RoundSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    environment = {"nnUNet_sam2_ema_decay": "0.9", "nnUNet_sam2_copy_paste": "1", "nnUNet_sam2_soft_targets": "false"}
    overridden = RoundSettings.from_configuration({SETTINGS_KEY: settings.to_json()}, environment)
    assert overridden == RoundSettings(ema_decay=0.9, copy_paste=1.0)


def test_settings_without_later_human_labels_are_written_as_before_there_were_any() -> None:
    assert "human_cases" not in RoundSettings().to_json()
    settings = RoundSettings(human_cases=("case_a",), pseudo_cases=("case_b",))
    assert RoundSettings.from_json(settings.to_json()) == settings
