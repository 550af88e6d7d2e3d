"""What a run will take, before it is begun."""

from __future__ import annotations

from nnunet_sam2.rounds.estimate.estimate import RunEstimate, estimate_run

__all__ = ["RunEstimate", "estimate_run"]
