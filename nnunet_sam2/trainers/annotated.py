"""Which classes of which training case were annotated, as `cohort.json` has it, in the trainer's terms.

Shape letters: b samples of a batch, c output channels (classes with the background first, or regions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_sam2.cohort.cohort import COHORT_FILE, Cohort

HARD = ("tp_hard", "fp_hard", "fn_hard")
"""Keys of what nnU-Net's validation step counts, one number a class or region."""


@dataclass(frozen=True, kw_only=True)
class PartlyAnnotated:
    """Hold the cases that are not annotated with all classes."""

    known: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Annotated class values, by case."""
    never: tuple[int, ...] = ()
    """Classes that no training case is annotated for. They count as annotated, and so as background: merged with it
    everywhere, nothing would keep them out of it."""

    @classmethod
    def of_training(
        cls, raw_folder: Path | None, training: Sequence[str], class_values: Sequence[int]
    ) -> PartlyAnnotated:
        """Read ``cohort.json``, for a fold that trains on ``training``; nothing is partly annotated without one."""
        if raw_folder is None or not (raw_folder / COHORT_FILE).is_file():
            return cls()
        cases = Cohort.load(raw_folder).labelled
        known = {case.case_id: frozenset(case.known_classes) for case in cases if case.known_classes is not None}
        if not known:
            return cls()
        answered = frozenset().union(*(known.get(case, frozenset(class_values)) for case in training))
        never = frozenset(class_values) - answered
        return cls(known={case: values | never for case, values in known.items()}, never=tuple(sorted(never)))

    def counts(self, case: str, label_or_region: Any) -> bool:
        """Say whether a class, or every class of a region, was annotated in a case; the background always is."""
        values = label_or_region if isinstance(label_or_region, (tuple, list)) else (label_or_region,)
        return case not in self.known or all(int(value) in self.known[case] for value in values if int(value) != 0)

    def channels(self, cases: Sequence[str], label_manager: Any) -> torch.Tensor | None:
        """Return which output channels are annotated in which case, (b, c) bool; None where all are in all."""
        if not any(case in self.known for case in cases):
            return None
        channels = label_manager.foreground_regions if label_manager.has_regions else label_manager.all_labels
        return torch.tensor([[self.counts(case, channel) for channel in channels] for case in cases])

    def to_json(self) -> dict[str, list[int]]:
        """Return the annotated values by case, for a checkpoint's provenance."""
        return {case: sorted(values) for case, values in sorted(self.known.items())}


def validate_one_by_one(
    step: Callable[[dict[str, Any], torch.Tensor], dict[str, Any]],
    batch: Mapping[str, Any],
    annotated_bc: torch.Tensor,
    *,
    background: bool,
) -> dict[str, Any]:
    """Run nnU-Net's validation step sample by sample and add up what was annotated, as the step of a batch returns it.

    ``background`` says that the first channel is the background, which the step does not count.
    """
    counted_bc = annotated_bc[:, 1:] if background else annotated_bc
    target = batch["target"]
    found = []
    for i in range(len(annotated_bc)):
        one = [scale[i : i + 1] for scale in target] if isinstance(target, list) else target[i : i + 1]
        found.append(step({"data": batch["data"][i : i + 1], "target": one}, annotated_bc[i : i + 1]))
    loss = np.mean([outcome["loss"] for outcome in found], axis=0)
    sums = {key: sum(f[key] * counted_bc[i].numpy() for i, f in enumerate(found)) for key in HARD}
    return {"loss": loss, **sums}
