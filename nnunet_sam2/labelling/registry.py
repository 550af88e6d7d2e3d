"""The labelling strategies by name, and their options from text."""

from __future__ import annotations

import dataclasses
import importlib
import math
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nnunet_sam2.errors import InputError

if TYPE_CHECKING:
    from nnunet_sam2.labelling.strategy import Strategy

# name -> (module, strategy class, options class); imported only when called for.
STRATEGIES: dict[str, tuple[str, str, str]] = {
    "insert": ("nnunet_sam2.labelling.strategies.insert.strategy", "Insert", "InsertOptions"),
    "match": ("nnunet_sam2.labelling.strategies.match.strategy", "Match", "MatchOptions"),
    "guided": ("nnunet_sam2.labelling.strategies.guided.strategy", "Guided", "GuidedOptions"),
    "auto": ("nnunet_sam2.labelling.strategies.auto.strategy", "Auto", "AutoOptions"),
    "transfer": ("nnunet_sam2.labelling.strategies.transfer.strategy", "Transfer", "TransferOptions"),
    "refine": ("nnunet_sam2.labelling.strategies.refine.strategy", "Refine", "RefineOptions"),
    "chain": ("nnunet_sam2.labelling.strategies.chain.strategy", "Chain", "ChainOptions"),
    "prompted": ("nnunet_sam2.labelling.strategies.prompted", "Prompted", "PromptedOptions"),
}


def make_strategy(name: str, settings: Mapping[str, Any] | None = None) -> Strategy:
    """Build a strategy by name with option values given as JSON values or as text.

    ``preset`` among the settings stands for a named set of values, such as a paper's; other settings change those.
    Raises `InputError` naming the known strategies, the known options or the expected kind of value.
    """
    if name not in STRATEGIES:
        raise InputError(f"no labelling strategy {name!r}; choose one of: {', '.join(sorted(STRATEGIES))}")
    module_name, class_name, options_name = STRATEGIES[name]
    module = importlib.import_module(module_name)
    strategy: Strategy = getattr(module, class_name)(
        _make_options(name, getattr(module, options_name), dict(settings or {}))
    )
    return strategy


def options_json(options: Any) -> dict[str, Any]:
    """Return a strategy's options as a JSON value, for records and input keys."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(options).items()}


def parse_settings(items: Sequence[str]) -> dict[str, str]:
    """Split ``key=value`` texts of the command line; raise `InputError` on anything else or on a key given twice."""
    settings: dict[str, str] = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise InputError(f"--set {item}: write it as --set NAME=VALUE")
        if key in settings:
            raise InputError(f"--set {key} is given twice")
        settings[key] = value
    return settings


def _make_options(strategy: str, options_type: type, settings: dict[str, Any]) -> Any:
    kinds = typing.get_type_hints(options_type)
    known = [field.name for field in dataclasses.fields(options_type)]
    presets: Mapping[str, Mapping[str, Any]] = getattr(options_type, "PRESETS", {})
    if presets and "preset" in settings:
        preset = settings.pop("preset")
        if preset not in presets:
            raise InputError(f"strategy {strategy} has no preset {preset!r}; it has: {', '.join(sorted(presets))}")
        settings = {**presets[preset], **settings}
    known += ["preset"] * bool(presets)
    values = {}
    for key, value in settings.items():
        if key not in known:
            raise InputError(f"strategy {strategy} has no option {key!r}; it has: {', '.join(known)}")
        values[key] = _convert(strategy, key, value, kinds[key])
    try:
        return options_type(**values)
    except ValueError as error:
        raise InputError(f"strategy {strategy}: {error}") from None


def _convert(strategy: str, key: str, value: Any, kind: Any) -> Any:
    accepted = typing.get_args(kind) if typing.get_origin(kind) not in (tuple, None) else (kind,)
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    text = value.strip()
    if type(None) in accepted and text.lower() in ("none", "null"):
        return None
    for candidate in accepted:
        if candidate is bool and text.lower() in ("true", "false", "yes", "no", "1", "0"):
            return text.lower() in ("true", "yes", "1")
        if typing.get_origin(candidate) is tuple:
            item = typing.get_args(candidate)[0]
            try:
                return tuple(item(part) for part in text.split(",") if part)
            except ValueError:
                continue
        if candidate in (int, float):
            try:
                number = candidate(text)
            except ValueError:
                continue
            if math.isfinite(number):  # records of runs are JSON, which knows no other
                return number
        if candidate is str:
            return text
    names = " or ".join(getattr(c, "__name__", str(c)) for c in accepted if c is not type(None))
    raise InputError(f"strategy {strategy}: {key}={value} is not of kind {names}")
