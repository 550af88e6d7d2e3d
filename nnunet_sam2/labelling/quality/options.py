"""How quality is estimated."""

from __future__ import annotations

from dataclasses import dataclass

_FEATURES_VERSION = 2
"""Raised when the same label gets other features than before."""


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """Say how much is looked at, and what the lower bounds promise; cost grows with ``references`` x ``slices``."""

    references: int = 3
    """Labelled cases, the most similar ones, that a pseudo-label is held against."""
    slices: int = 16
    """Most slices of a case on which that is done; of a short volume half, but not fewer than four."""
    calibration_cases: int = 8
    """Labelled cases that are labelled from other patients to calibrate, where nobody asked for their labels anyway."""
    coverage: float = 0.9
    """Share of new cases in which a lower bound is to hold; n labelled patients allow n / (n + 1) at most."""

    def __post_init__(self) -> None:
        for name in ("references", "slices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.calibration_cases < 0:
            raise ValueError(f"calibration_cases={self.calibration_cases} must not be negative")
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage={self.coverage} must lie between 0 and 1")

    @property
    def looked_at(self) -> dict[str, int]:
        """Return the options that features depend on, as a JSON value; the others say what is made of features."""
        return {"version": _FEATURES_VERSION, "references": self.references, "slices": self.slices}

    def slices_of(self, length: int) -> int:
        """Return on how many slices a volume of ``length`` slices is looked at."""
        return min(self.slices, max(4, round(length / 2)))
