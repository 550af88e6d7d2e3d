"""One propagation's answer, and the pseudo-label that many of them make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Member:
    """Hold the answer of one propagation (or one pass) on the query's own grid.

    Axis k counts the cohort's class values in ascending order.
    """

    name: str
    prob_kzyx: np.ndarray
    """Probability of each class, float32, 0 to 1; the classes need not sum to one."""
    background_zyx: np.ndarray | None = None
    """Probability of the background where the strategy has one of its own; else 1 - max over classes is used."""
    weight_k: np.ndarray | None = None
    """How much the member counts for each class beside the others, not negative; None: 1 for all."""
    record: dict[str, Any] = field(default_factory=dict)
    """JSON value: supports, prompts, scores, seeds: how this member came about."""

    def __post_init__(self) -> None:
        weight_k = self.weight_k
        if weight_k is not None and not (
            weight_k.shape == self.prob_kzyx.shape[:1] and np.isfinite(weight_k).all() and (weight_k >= 0).all()
        ):
            raise ValueError(f"member {self.name} has weights {weight_k} for {len(self.prob_kzyx)} classes")


@dataclass(frozen=True, kw_only=True)
class PseudoLabel:
    """Hold what fusion makes of the members of one query."""

    label_zyx: np.ndarray
    """Label values of the cohort, uint8 (uint16 where a value exceeds 255)."""
    confidence_zyx: np.ndarray
    """How far to trust each voxel, float32, 0 to 1."""
    prob_czyx: np.ndarray
    """Fused probabilities with the background as channel 0, float32, summing to one over c."""
    record: dict[str, Any] = field(default_factory=dict)
    """JSON value: the members' records, class volumes, mean confidence, estimated quality a class where known."""
