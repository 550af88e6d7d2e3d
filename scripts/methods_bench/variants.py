"""Every way of labelling that the bench compares: strategies, their presets, and the copies that learn nothing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench_data import WEIGHTS

from nnunet_sam2.labelling.registry import STRATEGIES, make_strategy
from nnunet_sam2.labelling.strategy import Strategy

DEFORMABLE = "deformable registration"
COPIES = ("copy", "copy, registered", DEFORMABLE)
_LEFT_OUT = ("prompted",)
"""`prompted` redraws a student's map and has no supports of its own: `refine` stands for it."""

STUDENT = "transfer"
"""Variant whose maps stand for a student's where a strategy redraws one."""

ALEXNET = WEIGHTS / "alexnet_features.safetensors"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Name a strategy with settings, or a copy."""

    name: str
    strategy: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def copies(self) -> bool:
        """Say whether this is a copy, which no checkpoint has a say in."""
        return self.strategy in COPIES

    def make(self, *, has_memory: bool, settings: Mapping[str, Any] | None = None) -> Strategy:
        """Make the strategy; ``settings`` are the user's own for its presets."""
        chosen = {**self.settings, **(settings or {})}
        if self.strategy == "chain" and not has_memory:
            chosen["propagate"] = False
        if chosen.get("preset") and self.strategy == "match" and ALEXNET.is_file():
            chosen.setdefault("lpips_weights", str(ALEXNET))
        return make_strategy(self.strategy, chosen)


def all_variants() -> list[Variant]:
    """Return the copies and, of each strategy, its defaults and its presets."""
    found = [Variant(name=name, strategy=name) for name in COPIES]
    for strategy in STRATEGIES:
        if strategy in _LEFT_OUT:
            continue
        found.append(Variant(name=strategy, strategy=strategy))
        found += [
            Variant(name=f"{strategy}, {preset}", strategy=strategy, settings={"preset": preset})
            for preset in presets_of(strategy)
        ]
    return found


def presets_of(strategy: str) -> Sequence[str]:
    """Name a strategy's presets."""
    module, _, options = STRATEGIES[strategy]
    return tuple(getattr(getattr(importlib.import_module(module), options), "PRESETS", {}))
