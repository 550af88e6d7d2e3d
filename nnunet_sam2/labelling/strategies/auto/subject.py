"""Subject: what an intensity threshold parts from the background of a picture, in the place of a failed transfer.

A breast, or a lesion on a plain ground, shows by its intensity alone. The threshold learns nothing from labels, so
every labelled picture tells what it is worth, a single one as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch

from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.strategies.chain.images import ready_image
from nnunet_sam2.support.cases import Query, Support

LEAST_DICE = 0.8
"""Median Dice with human labels below which the subject is not what is asked for."""

RARELY_BELOW = 0.95
"""Dice that a subject may well miss on a new picture, whatever the few labelled ones say."""

ROOM = 0.05
"""Dice by which transfer and subject may differ beyond that, both being right."""


def may_be_subject(case: Query | Support, class_values: Sequence[int]) -> bool:
    """Say whether the subject as a whole can be meant: a single picture, and one class."""
    return len(case.frames) == 1 and len(class_values) == 1


def subject_member(query: Query) -> Member:
    """Return the picture's largest piece above its triangle threshold, holes filled, as a member of one class."""
    ready = ready_image(query.frames, 0, laterality=False, artefacts=False)
    inside_ss = torch.from_numpy(ready.subject_ss.astype(np.float32))
    prob_czyx = query.frames.to_volume(iter([torch.stack([1.0 - inside_ss, inside_ss])]))
    return Member(
        name="subject",
        prob_kzyx=prob_czyx[1:],
        background_zyx=prob_czyx[0],
        record={"threshold": ready.record["threshold"], "component": ready.record["component"]},
    )


def subject_dice(supports: Sequence[Support], value: int) -> dict[str, float]:
    """Return the subject's Dice with the human label of each support that shows the class, by case."""
    found: dict[str, float] = {}
    for support in supports:
        mask_zyx = np.where(subject_member(support.as_query()).prob_kzyx[0] > 0.5, value, 0)
        dice = dice_by_class(mask_zyx, support.label_zyx, [value], ignore_value=support.ignore_value)[value]
        if dice is not None and (support.label_zyx == value).any():
            found[support.case_id] = dice
    return found


def transfer_went_astray(agreement: float, subject: Mapping[str, float], *, without: Set[str]) -> bool:
    """Say whether labels transferred to a picture differ from its subject by more than human labels ever did.

    ``agreement`` is their Dice; ``subject`` the subject's on labelled pictures, those ``without`` left out.
    A picture unlike all labelled ones leads transfer astray, and nothing else in a single picture shows it.
    """
    known = [dice for case_id, dice in subject.items() if case_id not in without]
    if not known or np.median(known) < LEAST_DICE:
        return False
    return agreement < min(*known, RARELY_BELOW) - ROOM
