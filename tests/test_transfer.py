"""Strategy transfer: labels from the nearest support locations, numbers chosen on held-out cases."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.fusion import fuse
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.strategies.transfer.memory import SupportMemory, slice_descriptors
from nnunet_sam2.labelling.strategies.transfer.recipe import Recipe, averaged, candidate_recipes, choose_recipes
from nnunet_sam2.labelling.strategies.transfer.strategy import Transfer, TransferOptions
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.sam2.protocol import Decoded
from nnunet_sam2.support.cases import Support
from nnunet_sam2.support.library import load_support

SIZE = 128
PLAIN = TransferOptions(check_slices=0)


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=SIZE, threads=1)


@pytest.fixture(scope="module")
def supports(tiny_dataset: DatasetFolders, backend: MetaSam2Backend) -> list[Support]:
    cohort = Cohort.load(tiny_dataset.raw)
    return [load_support(cohort, case, backend, slice_axis=0) for case in cohort.labelled]


def _member(strategy: Transfer, query: Support, supports: list[Support], values: tuple[int, ...], sam2: Any) -> Member:
    (member,) = strategy.members(query.as_query(), supports, values, sam2, np.random.default_rng(0))
    return member


def test_a_case_among_its_own_supports_gets_its_label_back(
    supports: list[Support], values: tuple[int, ...], backend: Any
) -> None:
    options = dataclasses.replace(PLAIN, edge_radius=0.0, sharpness=0.01)
    member = _member(Transfer(options), supports[0], supports, values, backend)
    label_zyx = fuse([member], values).label_zyx
    dice = dice_by_class(label_zyx, supports[0].label_zyx, values)
    # What is missing to 1 is the embedding's grid: a cell is five voxels wide here.
    assert (dice[values[0]] or 0) > 0.75


def test_a_class_is_found_in_a_case_that_was_held_out(
    supports: list[Support], values: tuple[int, ...], backend: Any
) -> None:
    member = _member(Transfer(PLAIN), supports[0], supports[1:], values, backend)
    assert member.background_zyx is not None
    total_zyx = member.prob_kzyx.sum(axis=0) + member.background_zyx
    np.testing.assert_allclose(total_zyx, 1.0, atol=1e-4)
    label_zyx = fuse([member], values).label_zyx
    assert (dice_by_class(label_zyx, supports[0].label_zyx, values)[values[0]] or 0) > 0.4


def test_with_one_support_nothing_is_checked_and_the_decoder_is_not_used(
    supports: list[Support], values: tuple[int, ...], backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "decode", lambda *a, **k: pytest.fail("the decoder was asked"))
    strategy = Transfer()
    assert strategy.prepare(supports[:1], values, backend) == {"recipe_check": {}, "decoder_check": {}}
    member = _member(strategy, supports[1], supports[:1], values, backend)
    assert set(member.record["decoder_share"].values()) == {0.0}


def _oracle(supports: list[Support], values: tuple[int, ...], *, right: bool) -> Any:
    """A decoder that answers with the human label of the class that the box fits best, or with its opposite."""
    truths = {s.embeddings.key: [s.frames.masks_to_model(s.label_zyx == v) for v in values] for s in supports}

    def decode(embeddings: Any, index: int, *, boxes_k4: np.ndarray, **_: Any) -> Decoded:
        answers = []
        for x0, y0, x1, y1 in boxes_k4.astype(int):
            masks = [truth[index] for truth in truths[embeddings.key]]
            best = max(masks, key=lambda m: m[y0 : y1 + 1, x0 : x1 + 1].sum())
            answers.append(np.where(best == right, 8.0, -8.0))
        logits = torch.from_numpy(np.stack(answers)).float()
        return Decoded(logits_kss=logits, low_res_logits_khw=logits[:, ::4, ::4], iou_k=torch.ones(len(logits)))

    return decode


def test_the_decoder_is_used_for_classes_that_it_helps_and_only_for_those(
    supports: list[Support], values: tuple[int, ...], backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = {}
    for right in (True, False):
        monkeypatch.setattr(backend, "decode", _oracle(supports, values, right=right))
        strategy = Transfer(TransferOptions(check_slices=9, edge_radius=0.0, sharpness=0.2, position_weight=1.5))
        prepared = strategy.prepare(supports, values, backend)
        assert sorted(prepared["decoder_check"]) == [s.case_id for s in supports]
        shares[right] = _member(strategy, supports[0], supports[1:], values, backend).record["decoder_share"]
    assert shares[True][str(values[0])] == 1.0
    assert set(shares[False].values()) == {0.0}


def test_unjudged_voxels_are_no_evidence(supports: list[Support], values: tuple[int, ...], backend: Any) -> None:
    ignore = 9
    masked_zyx = np.where(supports[1].label_zyx == 0, ignore, supports[1].label_zyx)
    partly = dataclasses.replace(supports[1], label_zyx=masked_zyx, ignore_value=ignore)
    features_mf, labels_mc = SupportMemory([partly], values).rows(range(len(partly.frames)))
    assert 0 < len(features_mf) < len(partly.frames) * (SIZE // 16) ** 2
    assert (labels_mc[:, 0] == 0).all()
    torch.testing.assert_close(labels_mc.sum(dim=1), torch.ones(len(labels_mc)))
    nothing = dataclasses.replace(partly, label_zyx=np.full_like(masked_zyx, ignore))
    with pytest.raises(InputError, match="no judged voxel"):
        _member(Transfer(PLAIN), supports[0], [nothing], values, backend)


def test_memory_is_bounded_and_holds_the_most_similar_slices(supports: list[Support], values: tuple[int, ...]) -> None:
    memory = SupportMemory(supports, values)
    descriptor_f = slice_descriptors(supports[1].embeddings)[4]
    depth = (4 + 0.5) / len(supports[1].frames)
    locations = (SIZE // 16) ** 2
    chosen = memory.choose(descriptor_f, depth, 5 * locations)
    assert len(chosen) == 5
    assert len(supports[0].frames) + 4 in chosen
    without = memory.choose(descriptor_f, depth, 10**9, without={1})
    assert len(without) == len(supports[0].frames) + len(supports[2].frames)
    assert len(memory.choose(descriptor_f, depth, 1)) == 1


def test_recipes_are_chosen_on_other_cases_and_those_that_cannot_be_told_apart_are_averaged() -> None:
    default = Recipe()
    better, alike = dataclasses.replace(default, edge_radius=0.0), dataclasses.replace(default, sharpness=0.3)
    rows = {
        "a": {default.name: {1: 0.5}, better.name: {1: 0.9}, alike.name: {1: 0.899}},
        "b": {default.name: {1: 0.8}, better.name: {1: 0.8}, alike.name: {1: 0.7}},
    }
    assert choose_recipes(rows, [better, alike], default, (1,)) == [better]
    assert choose_recipes(rows, [better, alike], default, (1,), without={"a"}) == [default]
    assert choose_recipes(rows, [better, alike], default, (1,), without={"b"}) == [better, alike]


def test_the_default_recipe_stays_where_no_other_clearly_beats_it() -> None:
    default = Recipe()
    other = dataclasses.replace(default, sharpness=0.3)
    rows = {"a": {default.name: {1: 0.8}, other.name: {1: 0.805}}}
    assert choose_recipes(rows, [other], default, (1,)) == [default]


def test_an_average_of_maps_still_sums_to_one() -> None:
    maps = {Recipe(sharpness=s): torch.softmax(torch.randn(3, 4, 4), dim=0) for s in (0.1, 0.2, 0.3)}
    torch.testing.assert_close(averaged(maps).sum(dim=0), torch.ones(4, 4))


def test_numbers_that_the_user_set_are_not_searched() -> None:
    options = TransferOptions(sharpness=0.7, edge_radius=0.0, slice_weight=4.0)
    assert candidate_recipes(options.fixed, Recipe()) == [Recipe(slice_weight=4.0, sharpness=0.7, edge_radius=0.0)]
    assert len(candidate_recipes(TransferOptions().fixed, Recipe())) > 1


@pytest.mark.parametrize(
    "settings",
    [{"neighbours": 0}, {"sharpness": 0.0}, {"edge_radius": -1.0}, {"decoder": "always"}, {"check_slices": -1}],
)
def test_options_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        TransferOptions(**settings)
