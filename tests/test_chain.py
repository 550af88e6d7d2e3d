"""Strategy chain: images of a cohort as one video, a decoder that trains itself, and what labels may not do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_chain_images import SIZE, frames_of, mammogram

from nnunet_sam2.cohort.cohort import Cohort, Role
from nnunet_sam2.cohort.convert import ConvertOptions, convert
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.pictures import write_picture
from nnunet_sam2.folders import DatasetFolders, new_dataset_folders
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.labeller import label_cases
from nnunet_sam2.labelling.leave_one_out import dice_by_class
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.prompting.adapt import TrainingOptions
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.labelling.strategies.chain import labels as chain_labels
from nnunet_sam2.labelling.strategies.chain.strategy import Chain, ChainOptions
from nnunet_sam2.labelling.strategies.chain.training import Example, core_places, image_examples, train_decoder
from nnunet_sam2.labelling.strategies.chain.video import ChainImage, carry_all
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.support.cases import Query, Support
from nnunet_sam2.support.library import load_support

QUICK: dict[str, Any] = {"steps": 2, "variants": 0}


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=SIZE, threads=1)


def _image_case(name: str, image: np.ndarray, label: np.ndarray, backend: MetaSam2Backend, size: int = SIZE) -> Support:
    frames = frames_of(image, size)
    return Support(
        case_id=name,
        frames=frames,
        embeddings=backend.embed(frames),
        label_zyx=label[None].astype(np.uint8),
        geometry=Geometry(shape_zyx=(1, *image.shape)),
    )


@pytest.fixture(scope="module")
def breasts(backend: MetaSam2Backend) -> list[Support]:
    return [_image_case(f"m{i}", *mammogram(i, right=i % 2 == 1), backend) for i in range(5)]


@pytest.fixture(scope="module")
def volumes(cohort: Cohort, backend: MetaSam2Backend) -> list[Support]:
    return [load_support(cohort, case, backend, slice_axis=0) for case in cohort.labelled]


def _member(
    strategy: Chain, query: Query, supports: Sequence[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> Member:
    (member,) = strategy.members(query, supports, values, backend, np.random.default_rng(0))
    return member


def _queries(cases: Sequence[Support]) -> list[Query]:
    return [case.as_query() for case in cases]


def test_an_image_gets_one_mask_and_the_story_of_its_prompt(breasts: list[Support], backend: MetaSam2Backend) -> None:
    strategy = Chain(ChainOptions(**QUICK))
    prepared = strategy.prepare_cohort(_queries(breasts), breasts[:2], (1,), backend)
    assert prepared["seeds"] == "points"
    assert prepared["images"] == 5
    assert sorted(prepared["check"]) == ["m0", "m1"]
    member = _member(strategy, breasts[3].as_query(), breasts[:2], (1,), backend)
    assert member.prob_kzyx.shape == (1, 1, 96, 48)
    assert 0 <= member.prob_kzyx.min() <= member.prob_kzyx.max() <= 1
    (story,) = member.record["slices"]
    assert set(story) >= {"threshold", "component", "point", "flipped", "place", "neighbours", "trust", "chain_mask"}
    assert story["flipped"] is True
    x, y = story["point"]
    assert breasts[3].label_zyx[0, int(y), int(x)]
    assert 1 <= len(member.record["anchors"]) <= 3
    assert member.record["self_training"]["kind"] == "mask decoder"


def test_without_labels_the_same_comes_out(breasts: list[Support], backend: MetaSam2Backend) -> None:
    blank = [dataclasses.replace(case, label_zyx=np.zeros_like(case.label_zyx)) for case in breasts]
    found = []
    for cases in (breasts, blank):
        strategy = Chain(ChainOptions(self_training="always", **QUICK))
        strategy.prepare_cohort(_queries(cases), cases[:2], (1,), backend)
        found.append(_member(strategy, cases[4].as_query(), cases[:2], (1,), backend))
    assert np.array_equal(found[0].prob_kzyx, found[1].prob_kzyx)
    assert found[0].record == found[1].record


def test_an_image_outside_of_the_chain_is_labelled_with_what_the_chain_learnt(
    breasts: list[Support], backend: MetaSam2Backend
) -> None:
    for way in ("always", "off"):
        strategy = Chain(ChainOptions(self_training=way, **QUICK))
        strategy.prepare_cohort(_queries(breasts[:4]), breasts[:2], (1,), backend)
        member = _member(strategy, breasts[4].as_query(), breasts[:2], (1,), backend)
        assert member.record["images"] == 4
        assert member.record["slices"][0]["place"] is None
        assert set(member.record["choice"].values()) == {"trained" if way == "always" else "chain"}


def test_labelled_images_choose_the_way_and_never_for_themselves(
    breasts: list[Support], backend: MetaSam2Backend
) -> None:
    strategy = Chain(ChainOptions(**QUICK))
    strategy.prepare_cohort(_queries(breasts), breasts[:2], (1,), backend)
    strategy._rows = {
        "m0": {"subject": {1: 0.5}, "point": {1: 0.95}, "chain": {1: 0.5}, "trained": {1: 0.6}},
        "m1": {"subject": {1: 0.5}, "point": {1: 0.4}, "chain": {1: 0.8}, "trained": {1: 0.6}},
    }
    chosen = {c.case_id: _member(strategy, c.as_query(), breasts[:2], (1,), backend).record["choice"] for c in breasts}
    assert chosen["m0"] == {"1": "chain"}
    assert chosen["m1"] == {"1": "point"}
    assert chosen["m2"] == {"1": "point"}


def test_masks_that_nobody_can_trust_teach_nothing(
    breasts: list[Support], backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = torch.zeros(1, SIZE // 4, SIZE // 4)
    nothing[0, 0, 0] = 1.0
    monkeypatch.setattr(chain_labels, "masks_from_points", lambda backend, image: nothing)
    strategy = Chain(ChainOptions(propagate=False, **QUICK))
    prepared = strategy.prepare_cohort(_queries(breasts), breasts[:3], (1,), backend)
    assert set(prepared["check"]["m0"]) == {"subject", "point", "chain"}
    member = _member(strategy, breasts[4].as_query(), breasts[:3], (1,), backend)
    assert member.record["self_training"] is None
    assert member.record["choice"] == {"1": "subject"}
    label = (member.prob_kzyx[0] > 0.5).astype(np.uint8)
    assert (dice_by_class(label, breasts[4].label_zyx, (1,))[1] or 0) > 0.9
    strategy = Chain(ChainOptions(propagate=False, self_training="always", **QUICK))
    strategy.prepare_cohort(_queries(breasts), [], (1,), backend)
    with pytest.raises(InputError, match="no mask could be trusted"):
        _member(strategy, breasts[4].as_query(), [], (1,), backend)


def test_masks_are_carried_from_both_sides_to_every_image_without_a_prompt(
    breasts: list[Support], backend: MetaSam2Backend
) -> None:
    chain = [
        ChainImage(
            case_id=case.case_id,
            index=0,
            embeddings=case.embeddings,
            frame=0,
            descriptor_f=np.zeros(1),
            subject_hw=np.zeros((16, 16), bool),
            point_xy=np.zeros(2),
            flipped=False,
            record={},
        )
        for case in breasts
    ]
    prompts = {t: breasts[t].frames.masks_to_model(breasts[t].label_zyx == 1) for t in (1, 3)}
    carried = carry_all(backend, chain, prompts)
    assert sorted(carried) == [0, 2, 4]
    video = [(case.embeddings, 0) for case in breasts]
    slow: dict[int, list[torch.Tensor]] = {}
    for reverse in (False, True):
        for answer in backend.propagate(video, prompts, reverse=reverse):
            slow.setdefault(answer.frame, []).append(torch.sigmoid(answer.logits_kss))
    assert {t: len(found) for t, found in slow.items()} == {0: 1, 2: 2, 4: 1}
    for t, found in slow.items():
        mean = torch.stack(found).mean(dim=0)[None]
        torch.testing.assert_close(carried[t].float(), torch.nn.functional.avg_pool2d(mean, 4)[0], atol=2e-3, rtol=0)


def test_only_the_mask_decoder_learns_and_its_stored_inputs_stay_valid(
    breasts: list[Support], backend: MetaSam2Backend
) -> None:
    examples = []
    for case in breasts:
        mask = case.frames.masks_to_model(case.label_zyx == 1)[:, 2::4, 2::4]
        examples += image_examples(case.embeddings, 0, mask, None, SIZE)
    options = TrainingOptions(steps=40, learning_rate=3e-3, seed=0)
    adapted, record = train_decoder(backend, examples, options)
    assert record["loss_at_last"] < 0.8 * record["loss_at_first"]
    assert record["examples"] == 5
    before, after = backend.model_copy().state_dict(), adapted.model_copy().state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("sam_mask_decoder.") for name in changed)
    assert not any("conv_s0" in name or "conv_s1" in name for name in changed)
    again, _ = train_decoder(backend, examples, options)
    assert again.spec.checkpoint_hash == adapted.spec.checkpoint_hash != backend.spec.checkpoint_hash
    with pytest.raises(InputError, match="nothing to learn from"):
        train_decoder(backend, [], options)


def test_examples_are_prompted_inside_of_their_own_mask_with_the_others_as_negatives(backend: Any) -> None:
    masks = np.zeros((3, 16, 16), bool)
    masks[0, 2:9, 2:9] = True
    masks[1, 5:14, 5:14] = True
    (first, second) = image_examples(backend, 0, masks, None, SIZE)
    rng = np.random.default_rng(0)
    for example, own, other in ((first, masks[0], masks[1]), (second, masks[1], masks[0])):
        drawn = set()
        for _ in range(30):
            xy, positive = example.prompt(rng)
            assert positive.tolist() == [True, False]
            (x, y), (u, v) = (xy / 4).astype(int)
            assert own[y, x]
            assert not other[y, x]
            assert other[v, u]
            assert not own[v, u]
            drawn.add((x, y))
        assert len(drawn) > 1
    around = np.zeros((16, 16), bool)
    around[3:8, 3:8] = True
    (only,) = image_examples(backend, 0, masks[:1], around, SIZE)
    assert isinstance(only, Example)
    assert {tuple(p) for p in only.places_p2} == {tuple(p) for p in core_places(around, SIZE)}


def test_several_classes_need_supports_and_get_every_class(
    volumes: list[Support], cohort: Cohort, backend: MetaSam2Backend
) -> None:
    values = cohort.class_values
    with pytest.raises(InputError, match="finds one foreground by points, the cohort has classes 1, 2"):
        Chain(ChainOptions(seeds="points", **QUICK)).prepare_cohort(_queries(volumes), volumes, values, backend)
    with pytest.raises(InputError, match="cannot do without propagate"):
        Chain(ChainOptions(propagate=False, **QUICK)).prepare_cohort(_queries(volumes), volumes, values, backend)
    strategy = Chain(ChainOptions(**QUICK))
    prepared = strategy.prepare_cohort(_queries(volumes), volumes[:2], values, backend)
    assert prepared["seeds"] == "supports"
    assert prepared["images"] == sum(len(v.frames) for v in volumes)
    assert sorted(prepared["check"]) == sorted(v.case_id for v in volumes[:2])
    member = _member(strategy, volumes[2].as_query(), volumes[:2], values, backend)
    assert member.prob_kzyx.shape == (len(values), *volumes[2].geometry.shape_zyx)
    assert {case for case, _ in member.record["anchors"]} == {v.case_id for v in volumes[:2]}
    assert not any(s["flipped"] or s["removed_share_of_image"] for s in member.record["slices"])
    with pytest.raises(InputError, match="needs labelled images"):
        _member(strategy, volumes[2].as_query(), [], values, backend)
    empty = [dataclasses.replace(v, label_zyx=np.zeros_like(v.label_zyx)) for v in volumes[:1]]
    with pytest.raises(InputError, match="shows a class at model size"):
        _member(strategy, volumes[2].as_query(), empty, values, backend)


def test_a_cases_own_label_does_not_prompt_the_chain_that_labels_it(
    volumes: list[Support], cohort: Cohort, backend: MetaSam2Backend
) -> None:
    values = cohort.class_values
    forged = dataclasses.replace(volumes[0], label_zyx=np.roll(volumes[0].label_zyx, 9, axis=1))
    found = []
    for own in (volumes[0], forged):
        strategy = Chain(ChainOptions(self_training="off"))
        strategy.prepare_cohort(_queries(volumes), [own, *volumes[1:]], values, backend)
        found.append(_member(strategy, own.as_query(), volumes[1:], values, backend))
    assert np.array_equal(found[0].prob_kzyx, found[1].prob_kzyx)
    assert all(case != volumes[0].case_id for case, _ in found[0].record["anchors"])


def test_a_class_that_no_support_shows_stays_empty(
    volumes: list[Support], cohort: Cohort, backend: MetaSam2Backend
) -> None:
    without = [dataclasses.replace(v, label_zyx=np.where(v.label_zyx == 1, 0, v.label_zyx)) for v in volumes[:2]]
    strategy = Chain(ChainOptions(self_training="always", **QUICK))
    member = _member(strategy, volumes[2].as_query(), without, cohort.class_values, backend)
    assert not member.prob_kzyx[0].any()
    assert member.prob_kzyx[1].any()


def test_supports_of_another_size_and_a_single_slice_make_a_chain(
    volumes: list[Support], cohort: Cohort, backend: MetaSam2Backend
) -> None:
    case = volumes[0]
    n = int(np.argmax((case.label_zyx > 0).sum(axis=(1, 2))))
    image, label = case.frames._array_cnhw[0, n, 4:34, 6:34], case.label_zyx[n, 4:34, 6:34]
    single = _image_case("one", image, label, backend)
    member = _member(Chain(ChainOptions(**QUICK)), single.as_query(), volumes[1:], cohort.class_values, backend)
    assert member.prob_kzyx.shape == (2, 1, 30, 28)
    member = _member(Chain(ChainOptions(**QUICK)), volumes[1].as_query(), [single], cohort.class_values, backend)
    assert member.prob_kzyx.shape == (2, *volumes[1].geometry.shape_zyx)


@pytest.fixture
def pictures(fresh_roots: Path, tmp_path: Path) -> DatasetFolders:
    """Five pictures as a dataset: two labelled, two unlabelled, one test."""
    source = tmp_path / "source"
    for folder in ("images", "labels"):
        (source / folder).mkdir(parents=True)
    for i in range(4):
        image, breast = mammogram(i, right=i % 2 == 1)
        write_picture(source / "images" / f"m{i}.png", (image / 16).astype(np.uint8)[None])
        if i < 2:
            write_picture(source / "labels" / f"m{i}.png", breast.astype(np.uint8)[None])
    folders = new_dataset_folders(533, "Pictures")
    convert(source, folders, ConvertOptions())
    return folders


def test_a_cohort_of_pictures_is_chained_from_labelled_and_unlabelled_images(
    pictures: DatasetFolders, backend: MetaSam2Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = Cohort.load(pictures.raw)
    arguments: dict[str, Any] = {
        "cohort": cohort,
        "case_ids": [c.case_id for c in cohort.cases],
        "support_ids": [c.case_id for c in cohort.labelled],
        "strategy": make_strategy("chain", {"steps": "2", "variants": "1"}),
        "backend": backend,
        "out": tmp_path / "labels",
        "seed": 0,
    }
    records = label_cases(**arguments)
    assert [r["prepared"]["images"] for r in records] == [4] * 4
    assert [r["dice_with_human_label"] is not None for r in records] == [True, True, False, False]
    monkeypatch.setattr(backend, "embed", lambda frames: pytest.fail("a finished case was read again"))
    assert label_cases(**arguments) == records
    monkeypatch.undo()
    fewer = dataclasses.replace(
        cohort, cases=tuple(c for c in cohort.cases if c.role is Role.LABELLED or c is cohort.unlabelled[0])
    )
    less = {**arguments, "cohort": fewer, "case_ids": [cohort.unlabelled[0].case_id]}
    (other,) = label_cases(**less)
    assert other["prepared"]["images"] == 3
    assert other["input_key"] != records[2]["input_key"]


def test_an_image_checkpoint_is_refused_with_the_way_out_and_can_do_without_memory(
    pictures: DatasetFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = Cohort.load(pictures.raw)
    model = load_backend("untrained", device="cpu", image_size=SIZE, threads=1)
    monkeypatch.setattr(model, "_spec", dataclasses.replace(model.spec, has_memory=False))
    monkeypatch.setattr(model, "_walker", None)
    arguments: dict[str, Any] = {
        "cohort": cohort,
        "case_ids": [cohort.unlabelled[0].case_id],
        "support_ids": [c.case_id for c in cohort.labelled],
        "backend": model,
        "out": tmp_path / "labels",
        "seed": 0,
    }
    with pytest.raises(InputError, match="use --set propagate=no or a whole checkpoint"):
        label_cases(**arguments, strategy=make_strategy("chain"))
    assert not (tmp_path / "labels").exists()
    settings = {"propagate": "no", "steps": "1", "variants": "0"}
    (record,) = label_cases(**arguments, strategy=make_strategy("chain", settings))
    assert record["members"][0]["anchors"] == []


@pytest.mark.parametrize(
    "settings",
    [
        {"seeds": "boxes"},
        {"threshold": "yen"},
        {"self_training": "never"},
        {"anchors": 0},
        {"training_images": 0},
        {"variants": -1},
        {"least_trust": 1.1},
        {"steps": 0},
        {"learning_rate": 0.0},
        {"seeds": "supports", "propagate": False},
    ],
)
def test_options_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ChainOptions(**settings)


def test_real_weights_train_themselves_on_mammogram_like_images(shared_weights: Path) -> None:
    backend = load_backend(
        str(shared_weights / "sam2_hiera_tiny_image.safetensors"), device="cpu", image_size=256, threads=1
    )
    cases = [_image_case(f"m{i}", *mammogram(i, right=i % 2 == 1), backend, 256) for i in range(4)]
    dice = {}
    for way, steps in (("off", 1), ("always", 15)):
        options = ChainOptions(propagate=False, self_training=way, steps=steps, variants=0, learning_rate=3e-4)
        strategy = Chain(options)
        strategy.prepare_cohort(_queries(cases), [], (1,), backend)
        found = []
        for case in cases:
            label = (_member(strategy, case.as_query(), [], (1,), backend).prob_kzyx[0] > 0.5).astype(np.uint8)
            found.append(dice_by_class(label, case.label_zyx, (1,))[1] or 0.0)
        dice[way] = float(np.mean(found))
    assert dice["always"] > 0.9, dice
    assert dice["always"] > dice["off"] - 0.01, dice
