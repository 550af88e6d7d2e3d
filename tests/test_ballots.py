"""Whether the supports agree by their own votes."""

from __future__ import annotations

import pytest
import torch

from nnunet_sam2.labelling.strategies.transfer.ballots import Ballots

BACKGROUND, ORGAN = (1.0, 0.0), (0.0, 1.0)


def _counted(
    labels: list[list[tuple[float, float]]], owners: list[list[int]], supports: int
) -> dict[str, float | None]:
    weights = torch.full((len(labels), len(labels[0])), 1.0 / len(labels[0]))
    ballots = Ballots(supports, 1)
    for rows in (slice(0, 2), slice(2, None)):  # slice by slice
        ballots.add(weights[rows], torch.tensor(labels)[rows], torch.tensor(owners)[rows])
    return ballots.agreement((7,))


def test_agreement_is_the_dice_of_what_two_supports_would_have_made() -> None:
    # Support 0 sees the organ in the first three places, support 1 in the last three of four.
    labels = [[ORGAN, BACKGROUND], [ORGAN, ORGAN], [ORGAN, ORGAN], [BACKGROUND, ORGAN]]
    assert _counted(labels, [[0, 1]] * 4, 2) == {"7": pytest.approx(2 * 2 / 6)}
    assert _counted([[ORGAN, ORGAN]] * 4, [[0, 1]] * 4, 2) == {"7": 1.0}


def test_a_support_without_a_vote_follows_the_others() -> None:
    labels = [[ORGAN, BACKGROUND], [ORGAN, ORGAN], [ORGAN, ORGAN], [BACKGROUND, ORGAN]]
    owners = [[0, 0], [0, 1], [0, 1], [0, 0]]
    # Alone on the first and the last place, support 0 is torn there: what wins for it wins for both.
    assert _counted(labels, owners, 2) == {"7": 1.0}


def test_one_support_and_a_class_that_nobody_sees_agree_with_nobody() -> None:
    assert _counted([[ORGAN, ORGAN]] * 3, [[0, 0]] * 3, 1) == {"7": None}
    assert _counted([[BACKGROUND, BACKGROUND]] * 3, [[0, 1]] * 3, 2) == {"7": None}
