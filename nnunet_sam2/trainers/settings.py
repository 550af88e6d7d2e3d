"""What a round asks of its training: read from the round's plans configuration, overridden by the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nnunet_sam2.errors import InputError

SETTINGS_KEY = "nnunet_sam2"
"""Key of a plans configuration under which the settings lie; nnU-Net carries unknown keys along."""

PROVENANCE_KEY = "provenance"
"""Key inside the settings that is free for whoever wrote them; the trainer copies it into its checkpoints."""

ENVIRONMENT_PREFIX = "nnUNet_sam2_"
OPTIMIZERS = ("sgd", "adamw")
CPU_PRECISIONS = ("float32", "auto", "bfloat16")
"""``auto``: bfloat16 where the processor has matrix units for it (AMX), which makes it twice as fast."""

_LATER = ("human_cases", "cpu_precision", "ema_decay", "copy_paste", "soft_targets")
"""Settings that came later: written only where they ask for something, so that earlier settings stay the same ones."""


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """Hold the settings of one training; the defaults are stock nnU-Net's schedule and behaviour."""

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    save_every: int = 50
    """Epochs between two checkpoints from which a killed training continues."""
    optimizer: str = "sgd"
    initial_lr: float = 1e-2
    weight_decay: float = 3e-5
    mirroring: bool = True
    """Mirror in augmentation and, because the checkpoint says so, in prediction."""
    pseudo_cases: tuple[str, ...] = ()
    """Cases of the preprocessed folder with machine labels: trained on, never validated on."""
    human_cases: tuple[str, ...] = ()
    """Cases of the preprocessed folder that people labelled after the folds were made: they train in every fold."""
    pseudo_per_batch: float | None = None
    """Fraction of each batch that is pseudo-labelled; None draws from all training cases alike, as stock does."""
    confidence_folder: str | None = None
    """Folder with distrust maps beside the preprocessed folder; None means ``<data_identifier>_conf``."""
    ema_decay: float | None = None
    """Decay a step of the weights' moving mean, which validates, predicts and labels; None keeps the last weights."""
    copy_paste: float = 0.0
    """Probability of a batch in which pairs of samples, a labelled and a pseudo-labelled one, exchange a box."""
    soft_targets: bool = False
    """Learn pseudo-labelled cases from the probabilities beside their distrust maps instead of their hard labels."""
    warm_start: str | None = None
    """Checkpoint whose weights, heads included, a new training starts from: absolute, or under the results folder."""
    seed: int | None = None
    """Seed of all random numbers; with it and ``nnUNet_n_proc_DA=0`` a training on the CPU can be repeated exactly."""
    threads: int | None = None
    """Torch threads on the CPU; None leaves nnU-Net's choice, which is every core."""
    cpu_precision: str = "float32"
    """What a training on the CPU computes in: float32, as stock, bfloat16, or auto; see `precision`."""
    sequential_validation: bool = False
    """Run the final validation in this process, without worker processes that each import torch anew."""
    validation_mirroring: bool = True
    """Mirror in the final validation, where the training allows it: 4 times the work in 2D, 8 times in 3D."""
    time_budget_s: float | None = None
    """Seconds of training after which it ends at the next epoch's end; a safety net, the schedule is not shortened."""

    def __post_init__(self) -> None:
        for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.optimizer in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}", self.optimizer)
        _require(
            self.cpu_precision in CPU_PRECISIONS,
            "cpu_precision",
            f"one of {', '.join(CPU_PRECISIONS)}",
            self.cpu_precision,
        )
        _require(self.initial_lr > 0, "initial_lr", "positive", self.initial_lr)
        _require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        share = self.pseudo_per_batch
        _require(share is None or 0 <= share <= 1, "pseudo_per_batch", "between 0 and 1", share)
        decay, pasted = self.ema_decay, self.copy_paste
        _require(decay is None or 0 < decay < 1, "ema_decay", "between 0 and 1, or none", decay)
        _require(0 <= pasted <= 1, "copy_paste", "between 0 and 1", pasted)
        _require(len(set(self.pseudo_cases)) == len(self.pseudo_cases), "pseudo_cases", "unique", self.pseudo_cases)
        _require(self.threads is None or self.threads >= 1, "threads", "at least 1", self.threads)
        _require(self.seed is None or 0 <= self.seed < 2**32, "seed", "0 to 2**32 - 1", self.seed)
        budget = self.time_budget_s
        _require(budget is None or budget > 0, "time_budget_s", "positive", budget)
        folder = self.confidence_folder
        plain = folder is None or (folder not in ("", ".", "..") and "/" not in folder and "\\" not in folder)
        _require(plain, "confidence_folder", "a folder name without a path", folder)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a JSON value, for a configuration's `SETTINGS_KEY`."""
        value = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        stock = {field.name: field.default for field in fields(self)}
        return {k: v for k, v in value.items() if k not in _LATER or getattr(self, k) != stock[k]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RoundSettings:
        """Rebuild settings from `to_json`; absent keys keep their defaults, unknown ones are refused."""
        known = {field.name: str(field.type) for field in fields(cls)}
        unknown = sorted(set(value) - set(known) - {PROVENANCE_KEY})
        if unknown:
            raise InputError(f"unknown settings {', '.join(unknown)} under {SETTINGS_KEY!r}; known: {', '.join(known)}")
        return cls(**{name: _typed(name, known[name], given) for name, given in value.items() if name in known})

    @classmethod
    def from_configuration(
        cls, configuration: Mapping[str, Any], environment: Mapping[str, str] | None = None
    ) -> RoundSettings:
        """Read the settings of a plans configuration and apply ``nnUNet_sam2_<field>`` of the environment."""
        environment = os.environ if environment is None else environment
        value = dict(configuration.get(SETTINGS_KEY) or {})
        for field in fields(cls):
            text = environment.get(ENVIRONMENT_PREFIX + field.name)
            if text is not None:
                value[field.name] = _from_text(ENVIRONMENT_PREFIX + field.name, str(field.type), text)
        return cls.from_json(value)


def _require(fulfilled: bool, name: str, wanted: str, given: object) -> None:
    if not fulfilled:
        raise InputError(f"training setting {name} must be {wanted}, got {given!r}")


def _typed(name: str, annotation: str, value: Any) -> Any:
    if value is None and "None" in annotation:
        return None
    kind = annotation.split(" | ")[0]
    if kind == "bool":
        _require(isinstance(value, bool), name, "true or false", value)
    elif kind == "int":
        _require(isinstance(value, int) and not isinstance(value, bool), name, "an integer", value)
    elif kind == "float":
        _require(isinstance(value, (int, float)) and not isinstance(value, bool), name, "a number", value)
        return float(value)
    elif kind == "str":
        _require(isinstance(value, str), name, "text", value)
    else:
        is_list = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
        _require(is_list, name, "a list of case names", value)
        return tuple(value)
    return value


def _from_text(variable: str, annotation: str, text: str) -> Any:
    kind, text = annotation.split(" | ")[0], text.strip()
    if text.lower() in ("", "none") and "None" in annotation:
        return None
    truth = {"true": True, "1": True, "t": True, "false": False, "0": False, "f": False}
    try:
        if kind == "bool":
            return truth[text.lower()]
        if kind in ("int", "float"):
            return int(text) if kind == "int" else float(text)
    except (KeyError, ValueError):
        raise InputError(f"environment variable {variable}={text!r} is not {kind}; correct or unset it") from None
    if kind == "str":
        return text
    return [item.strip() for item in text.split(",") if item.strip()]
