"""What people's word makes of a round's label.

Shape letters: C channels (background first), z y x voxels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.temperature import DOUBTED
from nnunet_sam2.rounds.decisions.holds import CaseHold
from nnunet_sam2.rounds.decisions.record import accepted_path
from nnunet_sam2.storage import file_hash
from nnunet_sam2.volumes import read_label

TAKEN_OUT = "a person took it out"
ALL_REJECTED = "a person rejected every class of it"


@dataclass(frozen=True, kw_only=True)
class Decided:
    """Hold a label after people's word, and what follows for the case."""

    label_zyx: np.ndarray
    confidence_zyx: np.ndarray
    estimate: dict[int, float | None]
    left_out: str | None
    distrusted: tuple[int, ...]


def freeze_classes(
    label_zyx: np.ndarray,
    confidence_zyx: np.ndarray,
    prob_czyx: np.ndarray,
    class_values: Sequence[int],
    frozen: Mapping[int, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Put classes where a person has seen them, with full confidence, and nowhere else.

    ``frozen`` maps a class value to its mask (z, y, x); where masks overlap, the highest value wins. Elsewhere a voxel
    that has lost its class goes to the most probable of what is left by ``prob_czyx``, background and the classes that
    nobody decided about, with its probability among these as confidence; the others keep label and confidence.
    Where all classes are frozen, nothing is left to doubt. Returns label and confidence; the arguments are not changed.
    """
    label_zyx, confidence_zyx = label_zyx.copy(), confidence_zyx.astype(np.float32, copy=True)
    values = np.array([0, *class_values])
    left = np.array([value not in frozen for value in values])
    lost_zyx = np.isin(label_zyx, list(frozen))
    if lost_zyx.any():
        prob_left_cn = prob_czyx[:, lost_zyx][left].astype(np.float32)
        total_n = prob_left_cn.sum(axis=0)
        best_n = prob_left_cn.argmax(axis=0)
        chosen_n = np.take_along_axis(prob_left_cn, best_n[None], axis=0)[0]
        label_zyx[lost_zyx] = values[left][best_n]
        # Where nothing else was probable at all, nothing else is known either.
        confidence_zyx[lost_zyx] = np.divide(chosen_n, total_n, out=np.zeros_like(chosen_n), where=total_n > 0)
    if left.sum() == 1:
        confidence_zyx[:] = 1.0
    for value, mask_zyx in frozen.items():
        label_zyx[mask_zyx] = value
        confidence_zyx[mask_zyx] = 1.0
    return label_zyx, confidence_zyx


def without_rejected(
    label_zyx: np.ndarray,
    confidence_zyx: np.ndarray,
    prob_czyx: np.ndarray,
    class_values: Sequence[int],
    rejected: Collection[int],
    *,
    doubted: float,
    keep_zyx: np.ndarray | None = None,
) -> np.ndarray:
    """Return the confidence with 0 where a rejected class is, or may be with a probability of ``doubted``.

    Such voxels are neither class nor background. Voxels of ``keep_zyx``, where another class was accepted, stay.
    """
    confidence_zyx = confidence_zyx.astype(np.float32, copy=True)
    for k, value in enumerate(class_values):
        if value in rejected:
            here_zyx = (label_zyx == value) | (prob_czyx[k + 1] >= doubted)
            confidence_zyx[here_zyx if keep_zyx is None else here_zyx & ~keep_zyx] = 0.0
    return confidence_zyx


def decide(
    case: Case,
    hold: CaseHold,
    *,
    run: Path,
    cohort: Cohort,
    label_zyx: np.ndarray,
    confidence_zyx: np.ndarray,
    prob_czyx: np.ndarray,
    estimate: Mapping[int, float | None],
    left_out: str | None,
    distrusted: Sequence[int],
) -> Decided:
    """Apply people's word to a case's fused label; raise `InputError` where a file that they saw is gone or changed."""
    values = cohort.class_values
    if hold.human is not None and hold.whole_human:
        human_zyx = _read(case, cohort.root / hold.human.label, hold.human.sha256)
        return Decided(
            label_zyx=human_zyx,
            confidence_zyx=np.ones(human_zyx.shape, np.float32),
            estimate=dict.fromkeys(values),
            left_out=TAKEN_OUT if hold.taken_out else None,
            distrusted=(),
        )
    masks = _masks(case, hold, run=run, cohort=cohort)
    settled_zyx = np.zeros(label_zyx.shape, bool)
    if masks:
        label_zyx, confidence_zyx = freeze_classes(label_zyx, confidence_zyx, prob_czyx, values, masks)
        drawn = np.sum(list(masks.values()), axis=0)
        # Labels of two rounds were accepted that contradict each other: neither is believed there.
        confidence_zyx[drawn > 1] = 0.0
        settled_zyx = drawn == 1
    if hold.rejected:
        confidence_zyx = without_rejected(
            label_zyx, confidence_zyx, prob_czyx, values, hold.rejected, doubted=DOUBTED, keep_zyx=settled_zyx
        )
    if masks:
        left_out = None
    if set(hold.rejected) >= set(values):
        left_out = ALL_REJECTED
    if hold.taken_out:
        left_out = TAKEN_OUT
    failed = {*distrusted, *hold.rejected} - set(masks)
    drawn_by_hand = set(hold.human.classes or ()) if hold.human else set()
    return Decided(
        label_zyx=label_zyx,
        confidence_zyx=confidence_zyx,
        estimate={value: None if value in drawn_by_hand else dice for value, dice in estimate.items()},
        left_out=left_out,
        distrusted=() if left_out else tuple(sorted(failed)),
    )


def _masks(case: Case, hold: CaseHold, *, run: Path, cohort: Cohort) -> dict[int, np.ndarray]:
    masks = {}
    files: dict[str, np.ndarray] = {}
    for value, label in hold.accepted.items():
        if label not in files:
            files[label] = _read(case, accepted_path(run, case.case_id, label, cohort.file_ending), label)
        masks[value] = files[label] == value
    if hold.human is not None and hold.human.classes:
        human_zyx = _read(case, cohort.root / hold.human.label, hold.human.sha256)
        # Where the person marked that nothing is to be judged, the class is not known to be absent either.
        unjudged = () if cohort.ignore_value is None else (cohort.ignore_value,)
        masks |= {value: human_zyx == value for value in (*hold.human.classes, *unjudged)}
    return dict(sorted(masks.items()))


def _read(case: Case, path: Path, expected: str) -> np.ndarray:
    if not path.is_file() or file_hash(path) != expected:
        raise InputError(
            f"{path}, a label of case {case.case_id} that a person accepted or drew, is missing or was changed; "
            "restore it, or decide about the case anew with nnunet_sam2 review"
        )
    label_zyx, geometry = read_label(path)
    if difference := case.geometry.mismatch(geometry):
        raise InputError(f"{path} and the image of case {case.case_id} differ in {difference}; restore the file")
    return label_zyx
