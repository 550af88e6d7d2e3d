"""Strategy prompted: the student's prediction, redrawn by SAM 2 where that helps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.strategies.prompted import Prompted, PromptedOptions
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.sam2.protocol import Decoded
from nnunet_sam2.support.cases import Support
from nnunet_sam2.support.library import load_support


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=128, threads=1)


@pytest.fixture(scope="module")
def cases(tiny_dataset: DatasetFolders, backend: MetaSam2Backend, values: tuple[int, ...]) -> list[Support]:
    """Labelled cases with a student whose prediction of the first class is shifted by four voxels."""
    cohort = Cohort.load(tiny_dataset.raw)
    found = []
    for case in cohort.labelled:
        support = load_support(cohort, case, backend, slice_axis=0)
        prob_czyx = np.stack([support.label_zyx == value for value in (0, *values)]).astype(np.float32)
        prob_czyx[1] = np.roll(prob_czyx[1], 4, axis=2)
        prob_czyx[2] *= 1 - prob_czyx[1]
        prob_czyx[0] = 1 - prob_czyx[1:].sum(axis=0)
        stored = np.round(prob_czyx * 255).astype(np.uint8)
        found.append(dataclasses.replace(support, student_prob_czyx=stored))
    return found


def _perfect(cases: list[Support], values: tuple[int, ...], asked: list[int]) -> Any:
    """A decoder that answers with the human label of the class that a box overlaps most."""
    truths = {c.embeddings.key: [c.frames.masks_to_model(c.label_zyx == v) for v in values] for c in cases}

    def decode(embeddings: Any, index: int, *, boxes_k4: np.ndarray, **_: Any) -> Decoded:
        asked.append(index)
        answers = []
        for x0, y0, x1, y1 in boxes_k4.astype(int):
            masks = [truth[index] for truth in truths[embeddings.key]]
            best = max(masks, key=lambda m: m[y0 : y1 + 1, x0 : x1 + 1].sum())
            answers.append(np.where(best, 8.0, -8.0))
        logits = torch.from_numpy(np.stack(answers)).float()
        return Decoded(logits_kss=logits, low_res_logits_khw=logits[:, ::4, ::4], iou_k=torch.ones(len(logits)))

    return decode


def _member(strategy: Prompted, case: Support, values: tuple[int, ...], backend: Any) -> Member:
    (member,) = strategy.members(case.as_query(), [], values, backend, np.random.default_rng(0))
    return member


def _dice(member: Member, case: Support, values: tuple[int, ...]) -> dict[int, float | None]:
    score = np.concatenate([member.background_zyx[None], member.prob_kzyx])  # type: ignore[index]
    return dice_by_class(np.array([0, *values])[score.argmax(axis=0)], case.label_zyx, values)


def test_a_class_that_the_decoder_improves_is_redrawn(
    cases: list[Support], values: tuple[int, ...], backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "decode", _perfect(cases, values, []))
    plain = _dice(_member(Prompted(), cases[0], values, backend), cases[0], values)
    strategy = Prompted(PromptedOptions(check_slices=4))
    prepared = strategy.prepare(cases, values, backend)
    assert sorted(prepared["prompt_check"]) == [c.case_id for c in cases]
    member = _member(strategy, cases[0], values, backend)
    assert member.record["choice"][str(values[0])] != "student"
    assert (_dice(member, cases[0], values)[values[0]] or 0) > (plain[values[0]] or 0) + 0.05


def test_unchecked_the_student_comes_out_as_it_went_in(
    cases: list[Support], values: tuple[int, ...], backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(backend, "decode", _perfect(cases, values, asked))
    strategy = Prompted()
    assert strategy.prepare([dataclasses.replace(cases[1], student_prob_czyx=None)], values, backend) == {
        "prompt_check": {}
    }
    member = _member(strategy, cases[0], values, backend)
    assert not asked
    assert cases[0].student_prob_czyx is not None
    np.testing.assert_allclose(member.prob_kzyx, cases[0].student_prob_czyx[1:] / 255.0, atol=1e-6)
    assert set(member.record["choice"].values()) == {"student"}


def test_a_cases_own_label_has_no_say_in_whether_it_is_redrawn(
    cases: list[Support], values: tuple[int, ...], backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "decode", _perfect(cases, values, []))
    strategy = Prompted(PromptedOptions(check_slices=4))
    strategy.prepare(cases[:1], values, backend)
    assert set(_member(strategy, cases[0], values, backend).record["choice"].values()) == {"student"}
    assert _member(strategy, cases[1], values, backend).record["choice"][str(values[0])] != "student"


def test_what_the_decoder_leaves_alone_is_not_blurred(
    cases: list[Support], values: tuple[int, ...], backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "decode", _perfect(cases, values, []))
    strategy = Prompted(PromptedOptions(check_slices=4))
    strategy.prepare(cases, values, backend)
    member = _member(strategy, cases[0], values, backend)
    assert cases[0].student_prob_czyx is not None
    empty = ~(cases[0].student_prob_czyx[1:] > 0).any(axis=(0, 2, 3))
    assert empty.any()
    assert not member.prob_kzyx[:, empty].any()


def test_a_query_without_a_prediction_is_refused(cases: list[Support], values: tuple[int, ...], backend: Any) -> None:
    with pytest.raises(InputError, match="no prediction of the student"):
        _member(Prompted(), dataclasses.replace(cases[0], student_prob_czyx=None), values, backend)


@pytest.mark.parametrize("settings", [{"check_slices": 0}, {"least_gain": -0.1}])
def test_options_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        PromptedOptions(**settings)
