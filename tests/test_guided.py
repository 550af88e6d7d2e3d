"""Strategy guided: what is remembered, how the first mask guides the second, and what is left alone."""

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
from nnunet_sam2.labelling.prompting.support_slices import SupportSlices
from nnunet_sam2.labelling.registry import make_strategy, options_json
from nnunet_sam2.labelling.strategies.guided.strategy import Guided, GuidedOptions
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.sam2.protocol import Decoded
from nnunet_sam2.support.cases import Query, Support
from nnunet_sam2.support.library import load_query, load_support

SIZE = 64


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=SIZE, threads=1)


@pytest.fixture(scope="module")
def supports(cohort: Cohort, backend: MetaSam2Backend) -> list[Support]:
    return [load_support(cohort, case, backend, slice_axis=0) for case in cohort.labelled]


@pytest.fixture(scope="module")
def query(cohort: Cohort, backend: MetaSam2Backend) -> Query:
    return load_query(cohort, cohort.unlabelled[0], backend, slice_axis=0)


class _Memory:
    """Stand in for memory and decoder: what is remembered comes out, and every question is kept.

    The first pass answers with the mean of the remembered masks, the second with the human label of the query.
    """

    def __init__(self, backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch, case: Support | None = None) -> None:
        self.recalled: list[dict[str, Any]] = []
        self.decoded: list[dict[str, Any]] = []
        self.score = 5.0
        self.second_is_wrong = False
        self.first_is_empty = False
        self._case = case
        monkeypatch.setattr(backend, "recall", self.recall)
        monkeypatch.setattr(backend, "decode", self.decode)

    def recall(self, frame: Any, memories: Any, masks_mkss: np.ndarray) -> torch.Tensor:
        self.recalled.append({"frame": frame, "memories": list(memories), "masks": masks_mkss})
        return torch.zeros(1, 64, SIZE // 16, SIZE // 16)

    def decode(self, embeddings: Any, index: int, **prompts: Any) -> Decoded:
        self.decoded.append({"slice": index, **{key: value for key, value in prompts.items() if value is not None}})
        masks = self.recalled[-1]["masks"]
        if "boxes_k4" in self.decoded[-1] and self._case is not None:
            values = np.unique(self._case.label_zyx)[1:]
            truths = [self._case.frames.masks_to_model(self._case.label_zyx == v)[index] for v in values]
            best = max(truths, key=lambda truth: (truth & masks.any(axis=(0, 1))).sum())
            prob = best != self.second_is_wrong
        else:
            prob = masks.mean(axis=(0, 1)) * (0 if self.first_is_empty else 1)
        logits = torch.from_numpy(prob.astype(np.float32) * 16 - 8)[None]
        return Decoded(
            logits_kss=logits,
            low_res_logits_khw=logits[:, ::4, ::4],
            iou_k=torch.ones(1),
            object_score_k=torch.tensor([self.score]),
        )


def _member(
    options: GuidedOptions | None, query: Query, supports: list[Support], values: tuple[int, ...], backend: Any
) -> Member:
    (member,) = Guided(options).members(query, supports, values, backend, np.random.default_rng(0))
    return member


def test_every_slice_of_every_class_gets_probabilities_and_an_explanation(
    query: Query, supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> None:
    options = GuidedOptions(supports_per_slice=2, previous_slices=1)
    member = _member(options, query, supports, values, backend)
    assert member.prob_kzyx.shape == (len(values), *query.geometry.shape_zyx)
    assert member.prob_kzyx.dtype == np.float32
    assert 0 <= member.prob_kzyx.min() <= member.prob_kzyx.max() <= 1
    assert [s["slice"] for s in member.record["slices"]] == list(range(len(query.frames)))
    for record in member.record["slices"]:
        assert len(record["supports"]) == 2
        assert record["supports"][0]["similarity"] >= record["supports"][1]["similarity"]
        assert sum(s["weight"] for s in record["supports"]) == pytest.approx(1, abs=0.01)
        assert set(record["classes"]) == {str(v) for v in values}
    again = list(Guided(options).members(query, supports, values, backend, np.random.default_rng(9)))
    assert np.array_equal(again[0].prob_kzyx, member.prob_kzyx)
    assert again[0].record == member.record


def test_the_first_mask_asks_for_the_second_by_box_logits_and_gate(
    query: Query,
    supports: list[Support],
    values: tuple[int, ...],
    backend: MetaSam2Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = _Memory(backend, monkeypatch)
    options = GuidedOptions(supports_per_slice=1, previous_slices=0, padding=0.0, gate_floor=0.25)
    _member(options, query, supports, values, backend)
    firsts, seconds = memory.decoded[::2], memory.decoded[1::2]
    assert len(firsts) == len(seconds) == len(memory.recalled) > 0
    for first, second, recalled in zip(firsts, seconds, memory.recalled, strict=True):
        assert set(first) == {"slice", "features_kchw", "several"}
        assert set(second) == {"slice", "features_kchw", "boxes_k4", "mask_logits_khw", "gate_khw"}
        assert second["features_kchw"] is first["features_kchw"]
        mask = recalled["masks"][0, 0, ::4, ::4]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = 4 * np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        np.testing.assert_allclose(second["boxes_k4"][0], box.clip(0, SIZE - 1))
        prob = torch.sigmoid(torch.from_numpy(mask * 16.0 - 8.0)).float()
        torch.testing.assert_close(second["gate_khw"][0], 0.25 + 0.75 * prob)


def test_an_empty_first_mask_and_an_absent_object_ask_for_nothing_more(
    query: Query,
    supports: list[Support],
    values: tuple[int, ...],
    backend: MetaSam2Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = _Memory(backend, monkeypatch)
    memory.first_is_empty = True
    member = _member(None, query, supports, values, backend)
    assert not any("boxes_k4" in asked for asked in memory.decoded)
    assert member.prob_kzyx.max() < 0.01
    memory.first_is_empty, memory.score = False, -1.0
    member = _member(None, query, supports, values, backend)
    assert not any("boxes_k4" in asked for asked in memory.decoded)
    assert not member.prob_kzyx.any()


def test_classes_that_the_found_slices_do_not_show_are_not_asked_for(
    supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = _Memory(backend, monkeypatch)
    case = supports[0]
    options = GuidedOptions(supports_per_slice=1, previous_slices=0, second_pass="off")
    member = _member(options, case.as_query(), [case], values, backend)
    for k, value in enumerate(values):
        shown = case.frames.masks_to_model(case.label_zyx == value).any(axis=(1, 2))
        assert 0 < shown.sum() < len(shown)
        assert np.array_equal(member.prob_kzyx[k].any(axis=(1, 2)), shown)
    assert all(r["memories"] == [(case.embeddings, r["frame"][1])] for r in memory.recalled)
    assert all(s["supports"][0]["slice"] == s["slice"] for s in member.record["slices"])


def test_weak_votes_do_not_raise_a_class(
    supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}
    for presence in (0.0, 0.25, 0.9):
        memory = _Memory(backend, monkeypatch)
        options = GuidedOptions(supports_per_slice=4, previous_slices=0, temperature=1.0, least_presence=presence)
        _member(options, supports[0].as_query(), supports[1:], values, backend)
        asked[presence] = len(memory.recalled)
        assert all(1 <= len(r["memories"]) <= 4 for r in memory.recalled)
    assert asked[0.0] >= asked[0.25] > asked[0.9] > 0


@pytest.mark.parametrize("order", ["outward", "forward"])
def test_labelled_slices_of_the_query_join_the_memory_nearest_last(
    order: str,
    supports: list[Support],
    values: tuple[int, ...],
    backend: MetaSam2Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = _Memory(backend, monkeypatch, supports[0])
    options = GuidedOptions(supports_per_slice=2, previous_slices=2, order=order, second_pass="always")
    query = supports[0].as_query()
    _member(options, query, supports[1:], values, backend)
    visited = list(dict.fromkeys(r["frame"][1] for r in memory.recalled))
    start = visited[0]
    if order == "forward":
        assert visited == sorted(visited)
    else:
        assert visited == [n for n in range(start, 99) if n in visited] + sorted(
            (n for n in visited if n < start), reverse=True
        )
    joined = 0
    for recalled in memory.recalled:
        n = recalled["frame"][1]
        own = [i for embeddings, i in recalled["memories"] if embeddings is query.embeddings]
        sign = 1 if n >= start else -1
        assert own == sorted(own, key=lambda i: sign * i)
        assert all(0 < sign * (n - i) <= 2 for i in own)
        assert [e is query.embeddings for e, _ in recalled["memories"]] == sorted(
            e is query.embeddings for e, _ in recalled["memories"]
        )
        joined += len(own)
    assert joined


def test_labelled_cases_decide_between_the_masks(
    supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = supports[0]
    memory = _Memory(backend, monkeypatch, case)
    strategy = Guided(GuidedOptions(previous_slices=0, check_slices=6))
    library = SupportSlices(supports, values)
    for wrong, expected in ((False, {"second", "mean"}), (True, {"first"})):
        memory.second_is_wrong = wrong
        # The stand-in knows the first case alone, so that is the one that is checked.
        strategy._rows = {case.case_id: strategy._check(0, library, 1, backend)}
        (member,) = strategy.members(
            supports[1].as_query(), [case, supports[2]], values, backend, np.random.default_rng(0)
        )
        assert set(member.record["choice"].values()) <= expected
        (own,) = strategy.members(case.as_query(), supports[1:], values, backend, np.random.default_rng(0))
        assert set(own.record["choice"].values()) == {"second"}


def test_prepare_checks_each_case_without_itself(
    supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> None:
    strategy = Guided(GuidedOptions(check_slices=3))
    check = strategy.prepare(supports, values, backend)["second_pass_check"]
    assert sorted(check) == sorted(s.case_id for s in supports)
    assert all(set(row) == {"first", "mean", "second"} for row in check.values())
    assert strategy.prepare(supports[:1], values, backend) == {"second_pass_check": {}}


def test_a_guided_label_is_right_where_memory_and_decoder_are(
    supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = supports[0]
    _Memory(backend, monkeypatch, case)
    member = _member(GuidedOptions(least_presence=0.0), case.as_query(), supports[1:], values, backend)
    label = np.where(member.prob_kzyx.max(axis=0) > 0.5, np.array(values)[member.prob_kzyx.argmax(axis=0)], 0)
    found = dice_by_class(label, case.label_zyx, values)
    assert all((dice or 0) > 0.5 for dice in found.values()), found


def test_a_class_that_no_support_shows_is_named_and_none_at_all_is_refused(
    query: Query, supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> None:
    without = [dataclasses.replace(s, label_zyx=np.where(s.label_zyx == values[0], 0, s.label_zyx)) for s in supports]
    member = _member(GuidedOptions(supports_per_slice=1), query, without, values, backend)
    assert member.record["absent_in_all_supports"] == [values[0]]
    assert not member.prob_kzyx[0].any()
    empty = [dataclasses.replace(s, label_zyx=np.zeros_like(s.label_zyx)) for s in supports]
    with pytest.raises(InputError, match="shows a class at model size"):
        _member(None, query, empty, values, backend)
    with pytest.raises(InputError, match="no support"):
        _member(None, query, [], values, backend)


def test_slices_that_nobody_judged_say_nothing(
    query: Query, supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> None:
    label = supports[0].label_zyx.copy()
    shown = np.isin(label, values).any(axis=(1, 2))
    label[~shown] = 255
    unjudged = dataclasses.replace(supports[0], label_zyx=label, ignore_value=255)
    member = _member(GuidedOptions(supports_per_slice=1), query, [unjudged], values, backend)
    assert {s["supports"][0]["slice"] for s in member.record["slices"]} <= set(np.flatnonzero(shown).tolist())


def test_one_slice_volumes_take_their_labels_from_larger_supports(
    supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> None:
    case = supports[0]
    n = int(np.argmax((case.label_zyx > 0).sum(axis=(1, 2))))
    geometry = Geometry(shape_zyx=(1, 30, 28))
    frames = Frames(
        array_czyx=case.frames._array_cnhw[:, n : n + 1, 4:34, 6:34],
        geometry=geometry,
        size=SIZE,
        slice_axis=0,
        channels=(0, 0, 0),
        windows=case.frames.windows,
    )
    query = Query(case_id="one", frames=frames, embeddings=backend.embed(frames), geometry=geometry)
    member = _member(None, query, supports[1:], values, backend)
    assert member.prob_kzyx.shape == (len(values), 1, 30, 28)
    single = Support(
        case_id="one",
        frames=frames,
        embeddings=query.embeddings,
        label_zyx=case.label_zyx[n : n + 1, 4:34, 6:34],
        geometry=geometry,
    )
    member = _member(None, supports[1].as_query(), [single], values, backend)
    assert member.prob_kzyx.shape == (len(values), *supports[1].geometry.shape_zyx)


def test_a_checkpoint_without_memory_is_refused(
    cohort: Cohort, backend: MetaSam2Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {
        "cohort": cohort,
        "case_ids": [cohort.unlabelled[0].case_id],
        "support_ids": [c.case_id for c in cohort.labelled[:2]],
        "strategy": make_strategy("guided", {"supports_per_slice": "1", "check_slices": "2"}),
        "seed": 0,
    }
    (record,) = label_cases(**arguments, backend=backend, out=tmp_path / "labels")
    assert record["members"][0]["name"] == "guided"
    monkeypatch.setattr(backend, "_spec", dataclasses.replace(backend.spec, has_memory=False))
    with pytest.raises(InputError, match="needs SAM 2's video memory"):
        label_cases(**arguments, backend=backend, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_papers_preset_has_its_numbers() -> None:
    options = options_json(make_strategy("guided", {"preset": "paper"}).options)
    assert (options["supports_per_slice"], options["previous_slices"], options["lora_rank"]) == (4, 16, 16)
    assert options["second_pass"] == "always"
    assert options["order"] == "forward"
    assert np.log(options["threshold"] / (1 - options["threshold"])) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"supports_per_slice": 0},
        {"temperature": 0.0},
        {"least_presence": 1.5},
        {"previous_slices": -1},
        {"order": "backward"},
        {"gate_floor": -0.1},
        {"second_pass": "never"},
        {"check_slices": 0},
        {"lora_rank": -1},
    ],
)
def test_options_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        GuidedOptions(**settings)
