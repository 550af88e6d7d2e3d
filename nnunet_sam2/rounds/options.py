"""The options of a run: what determines its result, and what may change between one start and the next."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nnunet_sam2.errors import InputError
from nnunet_sam2.sam2.weights.registry import EMBEDDED
from nnunet_sam2.trainers.settings import RoundSettings

PROFILES = ("gpu", "cpu")
"""``gpu``: the planned network with nnU-Net's schedule. ``cpu``: a lighter one, short enough for two cores."""

FINAL_STARTS = ("scratch", "warm")
DEFAULT_PLANS = "nnUNetPlans"

_OF_A_MACHINE = ("device", "threads", "hang_minutes")

FREE_OPTIONS = frozenset({"round_limit", *_OF_A_MACHINE})
"""May change when a run is continued: they say how long and where, not what."""

_SHARES = (
    "mean_change",
    "worst_tenth_change",
    "validation_drop",
    "least_quality",
    "empty_rise",
    "oscillation",
    "copy_paste",
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Hold everything that `nnunet_sam2 run` may be told."""

    configuration: str = "3d_fullres"
    fold: str = "0"
    """A fold of the labelled cases, or ``all`` for a training without validation."""
    branch: str | None = None
    plans: str = DEFAULT_PLANS
    """Identifier of nnU-Net's plans: its presets are planned where there are none, others must be there."""
    pretrained: str | None = None
    """Checkpoint of nnU-Net whose weights, heads left out, every training from scratch starts from."""
    sam2: str = EMBEDDED
    strategy: str = "auto"
    strategy_options: dict[str, str] = field(default_factory=dict)
    image_size: int | None = None
    supports: str = "train"
    """``train``: SAM 2 is prompted with the fold's training cases, so that validation stays untouched; or ``all``."""
    profile: str = "gpu"
    round_limit: int = 6
    mean_change: float = 0.01
    worst_tenth_change: float = 0.05
    validation_drop: float = 0.02
    volume_drift: float = 2.0
    """Factor by which a class's mean volume may move away from the human labels' since the first round."""
    empty_rise: float = 0.25
    """Share of the cases, beyond the first round's and the human labels', that may come to lack a class."""
    oscillation: float = 0.5
    """Labels oscillate that differ from those of two rounds before by less than this part of their last change."""
    least_quality: float = 0.3
    """Estimated Dice below which a class of a case is not learnt from; a case without another class is left out."""
    skip_baseline: bool = False
    pseudo_per_batch: float = 0.5
    ema_decay: float | None = None
    """Decay a step of the students' averaged weights, which predict and label; None keeps the last step's."""
    copy_paste: float = 0.0
    """Share of the batches in which labelled and pseudo-labelled samples exchange a box."""
    soft_targets: bool = False
    """Learn pseudo-labels as the fused probabilities, weighted by confidence, instead of as hard labels."""
    warm_lr: float | None = None
    """First learning rate of a training that starts from the last round's weights; None: the profile's."""
    num_epochs: int | None = None
    num_iterations_per_epoch: int | None = None
    final_epochs: int | None = None
    final_start: str | None = None
    """What the last training starts with: ``scratch``, or ``warm`` with the weights of the best round; None: the
    profile's."""
    seed: int = 12345
    device: str = "auto"
    threads: int | None = None
    hang_minutes: float = 60.0
    """Minutes without output and without computing after which a process of nnU-Net counts as hung."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.configuration):
            raise InputError(f"-c {self.configuration}: the name of a configuration has letters, digits, '_', '-', '.'")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.plans) or "__" in self.plans:
            raise InputError(f"-p {self.plans}: the name of plans has letters, digits, single '_', '-' and '.'")
        if self.fold != "all" and not re.fullmatch(r"[0-9]+", self.fold):
            raise InputError(f"-f {self.fold}: give a fold number or 'all'")
        if self.profile not in PROFILES:
            raise InputError(f"--profile {self.profile}: choose one of {', '.join(PROFILES)}")
        if self.final_start not in (None, *FINAL_STARTS):
            raise InputError(f"--final-start {self.final_start}: choose one of {', '.join(FINAL_STARTS)}")
        if self.supports not in ("train", "all"):
            raise InputError(f"--supports {self.supports}: choose 'train' or 'all'")
        if self.round_limit < 1:
            raise InputError("--rounds must be at least 1")
        if not 0 < self.pseudo_per_batch < 1:
            raise InputError("--pseudo-per-batch must lie between 0 and 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError("--ema-decay must lie between 0 and 1")
        if self.warm_lr is not None and not self.warm_lr > 0:
            raise InputError("--warm-lr must be positive")
        if self.branch is not None and not re.fullmatch(r"[A-Za-z0-9]+", self.branch):
            raise InputError(f"--branch {self.branch}: use letters and digits")
        if self.fold == "0" and self.branch is not None and re.fullmatch(r"f([0-9]+|all)", self.branch):
            fold = self.branch[1:]
            raise InputError(f"--branch {self.branch}: fold {fold} has its rounds under this name; use another")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name.replace('_', '-')} must lie between 0 and 1")
        # Said so that nan does not pass.
        if not self.volume_drift > 1:
            raise InputError("--volume-drift is a factor above 1")
        if not self.hang_minutes > 0:
            raise InputError("--hang-minutes must be positive")
        if not 0 <= self.seed < 2**31:
            raise InputError("--seed must lie between 0 and 2147483647")
        for name, least in (("num_epochs", 1), ("num_iterations_per_epoch", 1), ("final_epochs", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{_flag(name)} must be at least {least}")

    @property
    def tag(self) -> str:
        """Return what tells this run's configurations from another's: empty for fold 0 without a branch."""
        pieces = ([] if self.fold == "0" else [f"f{self.fold}"]) + ([self.branch] if self.branch else [])
        return "".join(f"_{piece}" for piece in pieces)

    @property
    def run_name(self) -> str:
        """Return the name of the run's folder."""
        return f"{self.configuration}_fold{self.fold}" + (f"_{self.branch}" if self.branch else "")

    def round_configuration(self, number: int, *, final: bool = False) -> str:
        """Return the name of a round's nnU-Net configuration, such as ``3d_fullres_r01``."""
        return f"{self.configuration}{self.tag}_" + ("final" if final else f"r{number:02d}")

    def training(self, light: RoundSettings, *, final: bool = False) -> RoundSettings:
        """Return the schedule of a round's training, or of the one after the last round.

        ``light`` is what the CPU profile trains with; the GPU profile gives nnU-Net's own schedule to the last
        training and a quarter of it to the rounds before.
        """
        settings = light if self.profile == "cpu" else RoundSettings()
        epochs = self.final_epochs if final else self.num_epochs
        if epochs is None:
            epochs = settings.num_epochs if final or self.profile == "cpu" else settings.num_epochs // 4
        return replace(
            settings,
            num_epochs=epochs,
            num_iterations_per_epoch=self.num_iterations_per_epoch or settings.num_iterations_per_epoch,
            sequential_validation=self.profile == "cpu",
            ema_decay=self.ema_decay,
            copy_paste=self.copy_paste,
            soft_targets=self.soft_targets,
        )

    @property
    def has_final(self) -> bool:
        """Return whether a longer training follows the last round."""
        return bool(self.final_epochs) if self.final_epochs is not None else self.profile == "gpu"

    @property
    def starts_final_warm(self) -> bool:
        """Return whether the last training goes on from the best round's weights; a full schedule needs none."""
        return self.final_start == "warm" or (self.final_start is None and self.profile == "cpu")

    def identity(self) -> dict[str, Any]:
        """Return the options that determine the result, as a JSON value."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE_OPTIONS}

    def to_json(self) -> dict[str, Any]:
        """Return all options as a JSON value."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def command(self, dataset_id: int) -> str:
        """Return the command that begins or continues a run with these options, on any machine."""
        words = ["nnunet_sam2", "run", "-d", str(dataset_id), "-c", self.configuration, "-f", self.fold]
        for f in fields(self):
            value = getattr(self, f.name)
            same = f.default_factory() if callable(f.default_factory) else f.default
            if f.name in ("configuration", "fold", *_OF_A_MACHINE) or (value == same and f.name != "profile"):
                continue
            if isinstance(value, dict):
                words += [word for key, entry in value.items() for word in (_flag(f.name), f"{key}={entry}")]
            else:
                words += [_flag(f.name)] if value is True else [_flag(f.name), str(value)]
        return shlex.join(words)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, where: object) -> RunOptions:
        """Rebuild options from `to_json`; raise `InputError` with the field that does not fit and ``where`` it stands.

        Options that were added since the value was written have their defaults.
        """
        known = {f.name: str(f.type) for f in fields(cls)}
        for name, given in value.items():
            if name not in known:
                raise InputError(f"{where}: option {name!r} is unknown to this version; use the one that wrote it")
            if not _fits(known[name], given):
                raise InputError(f"{where}: option {name!r} is {given!r}, not {known[name]}; restore the file")
        try:
            return cls(**value)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def _fits(annotation: str, value: Any) -> bool:
    """Say whether a JSON value is of a field's type, such as ``int | None``."""
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
    for kind in annotation.split(" | "):
        if kind == "None" and value is None:
            return True
        if kind.startswith("dict") and isinstance(value, dict):
            return True
        if kind in kinds and isinstance(value, kinds[kind]) and (kind == "bool" or not isinstance(value, bool)):
            return True
    return False


def describe_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """List the options in which two runs differ, as ``--option: old -> new``; None is the default."""
    names = sorted(set(before) | set(now))
    return ", ".join(
        f"{_flag(n)}: {'default' if before.get(n) is None else before[n]} -> "
        f"{'default' if now.get(n) is None else now[n]}"
        for n in names
        if before.get(n) != now.get(n)
    )


_FLAGS = {
    "configuration": "-c",
    "fold": "-f",
    "plans": "-p",
    "num_epochs": "--epochs",
    "num_iterations_per_epoch": "--iterations",
    "round_limit": "--rounds",
    "strategy_options": "--set",
}


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")
