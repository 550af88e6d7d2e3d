"""Strategy refine: two passes over the student's best components, and what happens where there is no student."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.labeller import label_cases
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.registry import make_strategy, options_json
from nnunet_sam2.labelling.strategies.refine.strategy import Refine, RefineOptions
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.sam2.protocol import Decoded
from nnunet_sam2.support.cases import Query, Support
from nnunet_sam2.support.library import load_support

SIZE = 64


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=SIZE, threads=1)


@pytest.fixture(scope="module")
def cases(cohort: Cohort, backend: MetaSam2Backend, values: tuple[int, ...]) -> list[Support]:
    """Labelled cases whose student is right but for the first class, which it shifts by four voxels."""
    return [
        _with_student(load_support(cohort, case, backend, slice_axis=0), values, shift=4) for case in cohort.labelled
    ]


def _with_student(support: Support, values: tuple[int, ...], *, shift: int = 0, missing: int | None = None) -> Support:
    prob = np.stack([support.label_zyx == value for value in (0, *values)]).astype(np.float32)
    prob[1] = np.roll(prob[1], shift, axis=2)
    prob[2] *= 1 - prob[1]
    if missing is not None:
        prob[1 + values.index(missing)] = 0
    prob[0] = 1 - prob[1:].sum(axis=0)
    return dataclasses.replace(support, student_prob_czyx=np.round(prob * 255).astype(np.uint8))


class _Asked(list[dict[str, Any]]):
    """A decoder that answers with the human label that its box or positive point meets, and keeps what it was asked."""

    def __init__(self, cases: list[Support], values: tuple[int, ...], *, wrong: bool = False) -> None:
        self._wrong = wrong
        self._truths = {c.embeddings.key: [c.frames.masks_to_model(c.label_zyx == v) for v in values] for c in cases}

    def __call__(self, embeddings: Any, index: int, **prompts: Any) -> Decoded:
        self.append({"slice": index, **{key: value for key, value in prompts.items() if value is not None}})
        boxes, points = prompts.get("boxes_k4"), prompts.get("points")
        answers = []
        for i in range(len(points if points is not None else boxes)):
            masks = [truth[index] for truth in self._truths[embeddings.key]]
            if points is not None:
                x, y = points[i][0][0].astype(int)
                window = np.s_[max(0, y - 6) : y + 7, max(0, x - 6) : x + 7]
            else:
                x0, y0, x1, y1 = boxes[i].astype(int)
                window = np.s_[y0 : y1 + 1, x0 : x1 + 1]
            best = max(masks, key=lambda mask: mask[window].sum())
            answers.append(np.where(best != self._wrong, 8.0, -8.0))
        logits = torch.from_numpy(np.stack(answers)).float()
        return Decoded(logits_kss=logits, low_res_logits_khw=logits[:, ::4, ::4], iou_k=torch.ones(len(logits)))


def _member(
    strategy: Refine, query: Query, supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> Member:
    (member,) = strategy.members(query, supports, values, backend, np.random.default_rng(0))
    return member


def _label(member: Member, values: tuple[int, ...]) -> np.ndarray:
    score = np.concatenate([member.background_zyx[None], member.prob_kzyx])  # type: ignore[index]
    return np.array([0, *values])[score.argmax(axis=0)]


def test_the_second_pass_gets_points_and_the_firsts_logits_instead_of_the_box(
    cases: list[Support], values: tuple[int, ...], backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _Asked(cases, values)
    monkeypatch.setattr(backend, "decode", asked)
    options = RefineOptions(accept="always", component="confident")
    member = _member(Refine(options), cases[0].as_query(), cases[1:], values, backend)
    assert asked
    assert len(asked) % 2 == 0
    for first, second in zip(asked[::2], asked[1::2], strict=True):
        assert set(first) == {"slice", "boxes_k4"}
        assert set(second) == {"slice", "points", "mask_logits_khw"}
        assert second["mask_logits_khw"].shape == (len(first["boxes_k4"]), SIZE // 4, SIZE // 4)
        for p, (xy, positive) in enumerate(second["points"]):
            x0, y0, x1, y1 = first["boxes_k4"][p]
            assert positive.tolist() == [True] + [False] * (len(first["boxes_k4"]) - 1)
            assert x0 <= xy[0][0] <= x1
            assert y0 <= xy[0][1] <= y1
    assert [r["slice"] for r in member.record["prompts"]] == [a["slice"] for a in asked[::2]]
    assert {p["class"] for r in member.record["prompts"] for p in r["pieces"]} == set(values)
    asked.clear()
    _member(Refine(dataclasses.replace(options, keep_box=True)), cases[0].as_query(), cases[1:], values, backend)
    assert all(set(second) == {"slice", "boxes_k4", "points", "mask_logits_khw"} for second in asked[1::2])


def test_morphology_changes_what_is_asked(
    cases: list[Support], values: tuple[int, ...], backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _Asked(cases, values)
    monkeypatch.setattr(backend, "decode", asked)
    boxes = {}
    for radius in (0.0, 3.0):
        asked.clear()
        options = RefineOptions(
            accept="always",
            component="confident",
            padding=0.0,
            morphology="dilate" if radius else "none",
            radius=radius,
        )
        _member(Refine(options), cases[0].as_query(), cases[1:], values, backend)
        boxes[radius] = np.concatenate([a["boxes_k4"] for a in asked[::2]])
    grown = boxes[0.0] + np.array([-3, -3, 3, 3])
    np.testing.assert_allclose(boxes[3.0], grown.clip(0, SIZE - 1))


def test_a_class_that_gains_on_labelled_cases_is_redrawn_and_one_that_loses_is_not(
    cases: list[Support], values: tuple[int, ...], backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dice_by_class(_label(_start(cases[0]), values), cases[0].label_zyx, values)
    monkeypatch.setattr(backend, "decode", _Asked(cases, values))
    strategy = Refine(RefineOptions(check_slices=4))
    assert sorted(strategy.prepare(cases, values, backend)["prompt_check"]) == [c.case_id for c in cases]
    member = _member(strategy, cases[0].as_query(), cases[1:], values, backend)
    assert member.record["start"] == "student"
    assert not member.record["unchecked"]
    assert member.record["choice"][str(values[0])] != "before"
    after = dice_by_class(_label(member, values), cases[0].label_zyx, values)
    assert (after[values[0]] or 0) > (before[values[0]] or 0) + 0.05

    monkeypatch.setattr(backend, "decode", _Asked(cases, values, wrong=True))
    strategy.prepare(cases, values, backend)
    member = _member(strategy, cases[0].as_query(), cases[1:], values, backend)
    assert set(member.record["choice"].values()) == {"before"}
    np.testing.assert_allclose(member.prob_kzyx, _start(cases[0]).prob_kzyx, atol=1e-6)


def _start(case: Support) -> Member:
    assert case.student_prob_czyx is not None
    prob = case.student_prob_czyx / np.float32(255)
    return Member(name="student", prob_kzyx=prob[1:], background_zyx=prob[0])


def test_a_cases_own_label_has_no_say_in_its_redrawing(
    cases: list[Support], values: tuple[int, ...], backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "decode", _Asked(cases, values))
    strategy = Refine(RefineOptions(check_slices=4))
    others = [dataclasses.replace(case, student_prob_czyx=None) for case in cases[1:]]
    strategy.prepare([cases[0], *others], values, backend)
    own = _member(strategy, cases[0].as_query(), others, values, backend).record
    assert own["unchecked"]
    assert set(own["choice"].values()) == {"before"}
    other = _member(strategy, cases[1].as_query(), [cases[0], others[1]], values, backend).record
    assert not other["unchecked"]
    assert other["choice"][str(values[0])] != "before"


def test_a_class_that_the_student_misses_comes_back_from_the_supports(
    cases: list[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> None:
    missing = values[0]
    query = _with_student(cases[0], values, missing=missing).as_query()
    back = _member(Refine(RefineOptions(accept="always")), query, cases[1:], values, backend).record
    assert back["brought_back"] == [missing]
    assert any(p["class"] == missing for r in back["prompts"] for p in r["pieces"])
    options = RefineOptions(accept="always", bring_back=False)
    gone = _member(Refine(options), query, cases[1:], values, backend)
    assert gone.record["brought_back"] == []
    assert not (_label(gone, values) == missing).any()
    without = [dataclasses.replace(c, label_zyx=np.where(c.label_zyx == missing, 0, c.label_zyx)) for c in cases[1:]]
    absent = _member(Refine(RefineOptions(accept="always")), query, without, values, backend).record
    assert absent["brought_back"] == []


def test_without_a_student_it_starts_from_transfer_and_says_so(
    cases: list[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> None:
    query = dataclasses.replace(cases[0].as_query(), student_prob_czyx=None)
    alone = [dataclasses.replace(case, student_prob_czyx=None) for case in cases[1:]]
    strategy = Refine(RefineOptions(check_slices=2))
    strategy.prepare(alone, values, backend)
    member = _member(strategy, query, alone, values, backend)
    assert member.record["start"] == "transfer"
    assert not member.record["unchecked"]
    assert set(member.record["choice"].values()) <= {"before", "two passes", "two passes mean"}
    single = _member(Refine(), query, alone[:1], values, backend).record
    assert single["unchecked"]
    with pytest.raises(InputError, match="neither a prediction of the student nor a support"):
        _member(strategy, query, [], values, backend)


def test_refine_labels_a_cohort_with_and_without_a_student(
    cohort: Cohort, backend: MetaSam2Backend, tmp_path: Path
) -> None:
    case = cohort.unlabelled[0].case_id
    arguments: dict[str, Any] = {
        "cohort": cohort,
        "backend": backend,
        "case_ids": [case],
        "support_ids": [c.case_id for c in cohort.labelled[:2]],
        "seed": 0,
    }
    with pytest.raises(InputError, match=rf"{case}\.npz is missing"):
        label_cases(
            **arguments,
            strategy=make_strategy("refine"),
            out=tmp_path / "none",
            student_probabilities=tmp_path / "student",
        )
    settings = {"preset": "paper"}
    (record,) = label_cases(
        **arguments, strategy=make_strategy("refine", settings), out=tmp_path / "first", save_probabilities=True
    )
    assert record["members"][0]["start"] == "transfer"
    (record,) = label_cases(
        **arguments,
        strategy=make_strategy("refine", settings),
        out=tmp_path / "second",
        student_probabilities=tmp_path / "first" / "probabilities",
    )
    assert record["members"][0]["start"] == "student"


def test_one_slice_volumes_and_larger_supports_are_refined(
    cases: list[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> None:
    support = cases[0]
    n = int(np.argmax((support.label_zyx > 0).sum(axis=(1, 2))))
    image = support.frames._array_cnhw[:, n : n + 1, 4:36, 6:38]
    geometry = Geometry(shape_zyx=(1, 32, 32))
    frames = Frames(
        array_czyx=image, geometry=geometry, size=SIZE, slice_axis=0, channels=(0, 0, 0), windows=support.frames.windows
    )
    assert support.student_prob_czyx is not None
    query = Query(
        case_id="one",
        frames=frames,
        embeddings=backend.embed(frames),
        geometry=geometry,
        student_prob_czyx=support.student_prob_czyx[:, n : n + 1, 4:36, 6:38],
    )
    member = _member(Refine(RefineOptions(accept="always")), query, cases[1:], values, backend)
    assert member.prob_kzyx.shape == (len(values), 1, 32, 32)
    assert [r["slice"] for r in member.record["prompts"]] == [0]
    transferred = _member(Refine(), dataclasses.replace(query, student_prob_czyx=None), cases[1:], values, backend)
    assert transferred.record["start"] == "transfer"


def test_the_papers_preset_can_be_asked_for_and_changed() -> None:
    options = options_json(make_strategy("refine", {"preset": "paper", "padding": "0.1"}).options)
    assert options["morphology"] == "dilate"
    assert options["radius"] == 8
    assert options["padding"] == 0.1
    assert options["accept"] == "always"
    with pytest.raises(InputError, match="no preset 'best'; it has: paper"):
        make_strategy("refine", {"preset": "best"})
    with pytest.raises(InputError, match="no option 'preset'"):
        make_strategy("prompted", {"preset": "paper"})


@pytest.mark.parametrize(
    "settings",
    [
        {"accept": "never"},
        {"component": "largest"},
        {"morphology": "blur"},
        {"element": "star"},
        {"padding": -0.1},
        {"least_share": 1.5},
        {"check_slices": 0},
        {"morphology": "dilate"},
        {"radius": 3.0},
    ],
)
def test_options_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        RefineOptions(**settings)


def test_real_weights_redraw_a_rough_prediction(shared_weights: Path) -> None:
    backend = load_backend(
        str(shared_weights / "sam2_hiera_tiny_image.safetensors"), device="cpu", image_size=256, threads=1
    )
    y, x = np.mgrid[:96, :96]
    label = np.zeros((96, 96), np.uint8)
    label[((y - 50) / 30) ** 2 + ((x - 34) / 20) ** 2 <= 1] = 1
    label[((y - 46) / 16) ** 2 + ((x - 70) / 12) ** 2 <= 1] = 2
    image = np.array([0.2, 0.55, 0.9])[label] + np.random.default_rng(0).normal(0, 0.03, label.shape)
    rough = np.roll(label, (3, -3), axis=(0, 1))
    prob = np.stack([(rough == v) * 0.7 + 0.1 for v in range(3)]).astype(np.float32)[:, None]
    geometry = Geometry(shape_zyx=(1, 96, 96))
    frames = Frames(
        array_czyx=image[None, None].astype(np.float32),
        geometry=geometry,
        size=256,
        slice_axis=0,
        channels=(0, 0, 0),
        windows=[(0.0, 1.1)],
    )
    query = Query(
        case_id="two", frames=frames, embeddings=backend.embed(frames), geometry=geometry, student_prob_czyx=prob
    )
    member = _member(Refine(RefineOptions(accept="always", component="confident")), query, [], (1, 2), backend)
    before = dice_by_class(rough, label, (1, 2))
    after = dice_by_class(_label(member, (1, 2))[0], label, (1, 2))
    assert all((after[v] or 0) > (before[v] or 0) + 0.03 for v in (1, 2)), (before, after)
