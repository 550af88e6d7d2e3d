"""Post-processing as nnU-Net decides it: of a class, or of all of them, the largest piece alone, where that helps.

It is decided on the fold's validation predictions, which the network has not learnt from, and lies in the model folder
in nnU-Net's own form: ``postprocessing.pkl`` for ``nnUNetv2_apply_postprocessing`` and ``postprocessing.json``.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.cohort.labels import BACKGROUND, IGNORE
from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.explain.cases import class_names
from nnunet_sam2.storage import read_json, write_json, write_stream
from nnunet_sam2.volumes import read_label

PICKLE, RECORD = "postprocessing.pkl", "postprocessing.json"

Region = tuple[int, ...]
"""Label values that together are one structure; a class is a region of one value."""


@dataclass(frozen=True, kw_only=True)
class Postprocessing:
    """Hold what is done to a model's label maps, step by step, and on what that was decided."""

    steps: tuple[Region, ...] = ()
    """Of each region, one after the other, the largest piece is kept and the rest becomes background."""
    before: Mapping[str, float | None]
    """Dice of each region, named as in nnU-Net's summaries, on the held-out cases: mean over patients."""
    after: Mapping[str, float | None]
    patients: int

    def to_json(self) -> dict[str, Any]:
        """Return the decision as a JSON value."""
        return {
            "steps": [list(step) for step in self.steps],
            "before": dict(self.before),
            "after": dict(self.after),
            "patients": self.patients,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Postprocessing:
        """Rebuild a decision from `to_json`."""
        return cls(
            steps=tuple(tuple(step) for step in value["steps"]),
            before=dict(value["before"]),
            after=dict(value["after"]),
            patients=value["patients"],
        )

    def described(self, cohort: Cohort) -> str:
        """Say in words what is kept."""
        if not self.steps:
            return "nothing: no largest piece alone was better"
        names = class_names(cohort)
        every = set(cohort.class_values)
        kept = [
            "the whole foreground" if len(step) > 1 and set(step) == every else "+".join(names[str(v)] for v in step)
            for step in self.steps
        ]
        return f"the largest piece alone of {', '.join(kept)}"


def keep_largest_pieces(label_zyx: np.ndarray, steps: Iterable[Sequence[int]]) -> np.ndarray:
    """Keep the largest piece of each region in turn by nnU-Net's own function; the rest becomes background."""
    from nnunetv2.postprocessing.remove_connected_components import (
        remove_all_but_largest_component_from_segmentation,
    )

    result_zyx = label_zyx.copy()
    for region in steps:
        # Pieces are what they are within their bounding box, and nnU-Net's function is slow on large volumes.
        box = _bounding_box(np.isin(result_zyx, region))
        if box is not None:
            result_zyx[box] = remove_all_but_largest_component_from_segmentation(result_zyx[box], list(region))
    return result_zyx


def without_removed(prob_czyx: np.ndarray, label_zyx: np.ndarray, kept_zyx: np.ndarray) -> np.ndarray:
    """Return probabilities (background first) with certain background where a label was removed."""
    removed_zyx = label_zyx != kept_zyx
    if not removed_zyx.any():
        return prob_czyx
    result_czyx = prob_czyx.copy()
    result_czyx[:, removed_zyx] = 0
    result_czyx[0, removed_zyx] = 1
    return result_czyx


def decide_postprocessing(cohort: Cohort, predictions: Mapping[str, Path]) -> Postprocessing:
    """Find the post-processing that helps on labelled cases, as ``nnUNetv2_determine_postprocessing`` does.

    ``predictions`` maps a case to the label map that a network drew which had not seen it. First all foreground as one:
    its largest piece is kept where the mean Dice rises and no region's falls. Then each region, where there are
    several, in the order of the label table: where its own Dice rises. Means are over patients, so that one with many
    scans does not decide alone; with a case a patient the decision is nnU-Net's. A region counts in a case whose human
    label answers for all of it, and nothing is taken from a class that no case answers for.
    """
    regions = _regions(cohort)
    pairs = [_read_pair(cohort, cohort.case(case_id), path) for case_id, path in predictions.items()]
    before = {region: _mean(pairs, region) for region in regions}
    steps: list[Region] = []
    foreground = cohort.class_values
    whole = [pair.reduced(foreground) for pair in pairs]
    after = {region: _mean(whole, region) for region in regions}
    judged = all(any(pair.answers_for(region) for pair in pairs) for region in regions)
    helps = _foreground_mean(after) > _foreground_mean(before) and not any(map(_fell, before.values(), after.values()))
    if judged and helps:
        steps, pairs = [foreground], whole
    for region in regions if len(regions) > 1 else ():
        reduced = [pair.reduced(region) for pair in pairs]
        if _rose(_mean(pairs, region), _mean(reduced, region)):
            steps, pairs = [*steps, region], reduced
    return Postprocessing(
        steps=tuple(steps),
        before={_name(region): dice for region, dice in before.items()},
        after={_name(region): _mean(pairs, region) for region in regions},
        patients=len({pair.case.patient for pair in pairs}),
    )


def write_postprocessing(folder: Path, decided: Postprocessing) -> tuple[Path, Path]:
    """Write a decision into a model folder in nnU-Net's form, and return both files."""
    from nnunetv2.postprocessing.remove_connected_components import (
        remove_all_but_largest_component_from_segmentation as function,
    )

    kwargs = [{"labels_or_regions": list(step)} for step in decided.steps]
    content = pickle.dumps(([function] * len(kwargs), kwargs), protocol=4)
    write_stream(folder / PICKLE, lambda stream: stream.write(content))
    write_json(
        folder / RECORD,
        {
            "input_folder": {"mean": _metrics(decided.before)},
            "postprocessed": {"mean": _metrics(decided.after)},
            "postprocessing_fns": [function.__name__] * len(kwargs),
            "postprocessing_kwargs": kwargs,
            "nnunet_sam2": decided.to_json(),
        },
    )
    return folder / PICKLE, folder / RECORD


def read_postprocessing(folder: Path) -> Postprocessing | None:
    """Read what was decided for the model in a folder; None where nothing was: all data trained, or an earlier version.

    The pickle is not read: what is in it stands in the JSON file as well. Raises `InputError` where that is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return Postprocessing.from_json(read_json(path)["nnunet_sam2"])
    except (KeyError, TypeError):
        raise InputError(f"{path} was not written by this package; remove it, or restore it") from None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pair:
    """Hold a prediction and its human label, both cut to the box outside of which both are background."""

    case: Case
    predicted_zyx: np.ndarray
    human_zyx: np.ndarray
    ignore_value: int | None

    def answers_for(self, region: Region) -> bool:
        return all(map(self.case.answers_for, region))

    def reduced(self, region: Region) -> _Pair:
        kept_zyx = keep_largest_pieces(self.predicted_zyx, [region])
        return _Pair(case=self.case, predicted_zyx=kept_zyx, human_zyx=self.human_zyx, ignore_value=self.ignore_value)

    def dice(self, region: Region) -> float | None:
        if not self.answers_for(region):
            return None
        judged_zyx = True if self.ignore_value is None else self.human_zyx != self.ignore_value
        mine = np.isin(self.predicted_zyx, region) & judged_zyx
        theirs = np.isin(self.human_zyx, region) & judged_zyx
        total = int(mine.sum()) + int(theirs.sum())
        return 2.0 * int((mine & theirs).sum()) / total if total else None


def _read_pair(cohort: Cohort, case: Case, prediction: Path) -> _Pair:
    predicted_zyx, _ = read_label(prediction)
    human_zyx, _ = read_label(cohort.label_path(case))
    box = _bounding_box((predicted_zyx > 0) | (human_zyx > 0)) or (slice(0, 0),) * predicted_zyx.ndim
    # Copies: a view would keep the whole volume.
    return _Pair(
        case=case,
        predicted_zyx=predicted_zyx[box].copy(),
        human_zyx=human_zyx[box].copy(),
        ignore_value=cohort.ignore_value,
    )


def _regions(cohort: Cohort) -> list[Region]:
    """Return what nnU-Net evaluates, in its order: the regions where the label table has some, else the classes."""
    entries = {name: value for name, value in cohort.labels.items() if name not in (BACKGROUND, IGNORE)}
    if not any(isinstance(value, list) and len(value) > 1 for value in entries.values()):
        return [(value,) for value in cohort.class_values]
    return [tuple(value) if isinstance(value, list) else (value,) for value in entries.values()]


def _mean(pairs: Sequence[_Pair], region: Region) -> float | None:
    by_patient: dict[str, list[float]] = {}
    for pair in pairs:
        if (dice := pair.dice(region)) is not None:
            by_patient.setdefault(pair.case.patient, []).append(dice)
    return float(np.mean([np.mean(found) for found in by_patient.values()])) if by_patient else None


def _foreground_mean(table: Mapping[Region, float | None]) -> float:
    known = [dice for dice in table.values() if dice is not None]
    return float(np.mean(known)) if known else 0.0


def _rose(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after > before


def _fell(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after < before


def _bounding_box(mask_zyx: np.ndarray) -> tuple[slice, ...] | None:
    if not mask_zyx.any():
        return None
    spans = []
    for axis in range(mask_zyx.ndim):
        found = np.flatnonzero(mask_zyx.any(axis=tuple(a for a in range(mask_zyx.ndim) if a != axis)))
        spans.append(slice(int(found[0]), int(found[-1]) + 1))
    return tuple(spans)


def _name(region: Region) -> str:
    # As in nnU-Net's summaries.
    return str(region[0]) if len(region) == 1 else str(region)


def _metrics(table: Mapping[str, float | None]) -> dict[str, dict[str, float | None]]:
    return {name: {"Dice": dice} for name, dice in table.items()}
