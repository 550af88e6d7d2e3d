"""Seconds that add up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Hold wall and processor seconds."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(seconds=self.seconds + other.seconds, cpu_seconds=self.cpu_seconds + other.cpu_seconds)

    def __mul__(self, factor: float) -> Cost:
        return Cost(seconds=self.seconds * factor, cpu_seconds=self.cpu_seconds * factor)

    def less(self, other: Cost) -> Cost:
        """Return what is left without ``other``, at least nothing."""
        return Cost(
            seconds=max(0.0, self.seconds - other.seconds), cpu_seconds=max(0.0, self.cpu_seconds - other.cpu_seconds)
        )

    @classmethod
    def of(cls, answer: Mapping[str, Any], name: str) -> Cost:
        """Read what a probe's clock has put under ``name``."""
        return cls(seconds=float(answer[name]["seconds"]), cpu_seconds=float(answer[name]["cpu_seconds"]))

    @classmethod
    def total(cls, costs: Iterable[Cost]) -> Cost:
        """Add up."""
        return sum(costs, cls())


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """Say what a stage of the ledger is expected to take."""

    stage: str
    what: str
    cost: Cost
    memory_bytes: int
    """Most main memory that the run's processes hold at once, together."""
    gpu_bytes: int
    """The same of the accelerator's."""
    disk_bytes: int
    """What the stage leaves on the disk."""
    preprocessed: bool
    """True where it writes to ``nnUNet_preprocessed``, else to ``nnUNet_results``."""
    done: bool = False
    """The ledger shows it as done: it takes nothing any more."""

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as a JSON value."""
        return {
            "stage": self.stage,
            "what": self.what,
            "seconds": round(self.cost.seconds, 1),
            "cpu_seconds": round(self.cost.cpu_seconds, 1),
            "memory_bytes": self.memory_bytes,
            "gpu_bytes": self.gpu_bytes,
            "disk_bytes": self.disk_bytes,
            "done": self.done,
        }
