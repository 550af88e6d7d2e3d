"""How far a label that was taken in agrees with what the run had drawn: a sign of what was mended, or mixed up."""

from __future__ import annotations

from pathlib import Path

from nnunet_sam2.report.run_files import RunFiles
from nnunet_sam2.rounds.ending.convergence import class_change
from nnunet_sam2.volumes import read_label

LITTLE = 0.3
"""Mean Dice below which a label is more likely another case's than a correction."""


def agreement(
    files: RunFiles, case_id: str, label: Path, *, classes: tuple[int, ...] | None = None
) -> dict[str, float]:
    """Return the Dice of a label file with the run's newest label of a case, by class; empty where the run has none.

    ``classes`` are those that the file answers for, None for all. Classes that neither shows are left out.
    """
    machine = files.newest_label(files.cohort.case(case_id))
    if machine is None:
        return {}
    values = classes or files.cohort.class_values
    changes = class_change(read_label(machine[0])[0], read_label(label)[0], values)
    return {files.class_names[value]: 1.0 - change for value, change in changes.items()}
