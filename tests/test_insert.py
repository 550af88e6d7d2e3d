"""The strategy `insert`, on a real SAM 2 with its memory."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.fusion import fuse
from nnunet_sam2.labelling.strategies.insert.strategy import Insert, InsertOptions
from nnunet_sam2.sam2.backend import load_backend
from nnunet_sam2.support.cases import Query, Support

SIZE = 64
SHAPE = (6, 20, 24)
CLASSES = (1, 3)


@pytest.fixture(scope="module")
def backend():
    return Recording(load_backend("untrained", device="cpu", image_size=SIZE))


class Recording:
    """Pass everything on to a real back end and keep what it was asked to walk through."""

    def __init__(self, backend):
        self._backend = backend
        self.walks = []

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def walk_many(self, walks):
        self.walks += [(list(walk.video), dict(walk.masks_kss), walk.reverse) for walk in walks]
        return self._backend.walk_many(walks)


def volume(seed, slice_axis=0):
    array = np.random.default_rng(seed).normal(0, 1, (1, *SHAPE)).astype(np.float32)
    return SimpleNamespace(array_czyx=np.moveaxis(array, 1, slice_axis + 1))


def make_case(backend, seed, *, slice_axis=0):
    array = volume(seed, slice_axis).array_czyx
    geometry = Geometry(shape_zyx=array.shape[1:])
    frames = Frames.from_volume(SimpleNamespace(array_czyx=array, geometry=geometry), size=SIZE, slice_axis=slice_axis)
    return {"case_id": f"case_{seed}", "frames": frames, "embeddings": backend.embed(frames), "geometry": geometry}


def label(slices=(1, 2, 3), classes=CLASSES):
    out = np.zeros(SHAPE, np.uint8)
    for value in classes:
        out[list(slices), 4 + value : 12 + value, 5:15] = value
    return out


@pytest.fixture
def query(backend):
    backend.walks.clear()
    return Query(**make_case(backend, 0))


@pytest.fixture(scope="module")
def support(backend):
    return Support(**make_case(backend, 1), label_zyx=label())


def run(backend, query, cases, classes=CLASSES, seed=0, **options):
    strategy = Insert(InsertOptions(**options))
    return list(strategy.members(query, cases, classes, backend, np.random.default_rng(seed)))


def test_each_support_and_insertion_gives_one_member_on_the_querys_grid(backend, query, support):
    second = Support(**make_case(backend, 2), label_zyx=label((0, 1)))
    members = run(backend, query, [support, second], insertions=2)
    assert [(m.record["support"], m.record["insertion"]) for m in members] == [
        ("case_1", 0),
        ("case_1", 1),
        ("case_2", 0),
        ("case_2", 1),
    ]
    for member in members:
        assert member.prob_kzyx.shape == (2, *SHAPE)
        assert member.prob_kzyx.dtype == np.float32
        assert 0 <= member.prob_kzyx.min() <= member.prob_kzyx.max() <= 1
    assert fuse(members, CLASSES).label_zyx.shape == SHAPE


@pytest.mark.parametrize("both", [False, True])
def test_every_query_slice_is_visited_once_or_once_in_each_direction(backend, query, support, both):
    (member,) = run(backend, query, [support], insertions=1, both_directions=both, classes=(1,))
    position = member.record["classes"]["1"]["place"]["before_query_slice"]
    after, before = set(range(position, SHAPE[0])), set(range(position))
    visits = []
    for video, masks, reverse in backend.walks:
        prompted = [video[t][1] for t in sorted(masks)]
        assert prompted == [1, 2, 3]
        assert len(video) - len(masks) == sum(e is query.embeddings for e, _ in video)
        reached = range(min(masks)) if reverse else range(max(masks) + 1, len(video))
        visits.append({video[t][1] for t in reached})
    assert [v for v in visits if v] == [v for v in [after, before, *([before, after] if both else [])] if v]


def test_no_empty_prompt_is_sent(backend, query):
    late = label((4,))
    late[2] = label((2,), classes=(3,))[2]
    support = Support(**make_case(backend, 1), label_zyx=late)
    run(backend, query, [support], insertions=2)
    assert backend.walks
    assert all(mask.any(axis=(1, 2)).all() for _, masks, _ in backend.walks for mask in masks.values())


def test_the_same_generator_gives_the_same_members(backend, query, support):
    first = run(backend, query, [support], positions="random", seed=1, insertions=2)
    again = run(backend, query, [support], positions="random", seed=1, insertions=2)
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.prob_kzyx, b.prob_kzyx)
        assert a.record == b.record
    others = [run(backend, query, [support], positions="random", seed=s, insertions=2) for s in (2, 3, 4)]
    assert any(o[0].record != first[0].record for o in others)


def test_matched_positions_find_the_slice_that_was_copied_into_the_query(backend, support):
    case = make_case(backend, 0)
    array = volume(0).array_czyx.copy()
    array[:, 4] = volume(1).array_czyx[:, 2]
    frames = Frames.from_volume(SimpleNamespace(array_czyx=array, geometry=case["geometry"]), size=SIZE, slice_axis=0)
    query = Query(**{**case, "frames": frames, "embeddings": backend.embed(frames)})
    (member,) = run(backend, query, [support], insertions=1)
    assert member.record["classes"]["1"]["place"] == {"before_query_slice": 4}


def test_a_class_that_a_support_does_not_show_comes_from_one_that_does(backend, query, support):
    without = Support(**make_case(backend, 2), label_zyx=label(classes=(1,)))
    first, second = run(backend, query, [without, support], insertions=1)
    assert first.record["classes"]["1"]["support"] == "case_2"
    assert first.record["classes"]["3"]["support"] == "case_1"
    assert second.record["classes"]["3"]["support"] == "case_1"
    assert first.prob_kzyx[1].any()


def test_a_class_that_no_support_shows_is_nowhere_and_said_to_be(backend, query, support):
    (member,) = run(backend, query, [support], classes=(1, 2), insertions=1)
    assert not member.prob_kzyx[1].any()
    assert member.record["classes"]["2"] == {"absent_in_all_supports": True}


def test_supports_that_show_nothing_are_refused_by_name(backend, query):
    empty = Support(**make_case(backend, 5), label_zyx=np.zeros(SHAPE, np.uint8))
    with pytest.raises(InputError, match="case_5"):
        run(backend, query, [empty])


def test_a_mask_that_vanishes_at_model_size_is_reported(backend):
    shape = (3, 300, 300)
    array = np.random.default_rng(7).normal(size=(1, *shape)).astype(np.float32)
    geometry = Geometry(shape_zyx=shape)
    frames = Frames.from_volume(SimpleNamespace(array_czyx=array, geometry=geometry), size=SIZE)
    case = {"case_id": "small", "frames": frames, "embeddings": backend.embed(frames), "geometry": geometry}
    mask = np.zeros(shape, np.uint8)
    mask[0, 100:200, 100:200] = 1
    mask[2, 50, 50] = 1
    (member,) = run(backend, Query(**case), [Support(**case, label_zyx=mask)], classes=(1,), insertions=1)
    assert member.record["classes"]["1"]["vanished_slices"] == [2]
    assert member.record["classes"]["1"]["prompted_slices"] == [0]


def test_slices_with_ignored_voxels_prompt_nothing_while_others_can(backend, query):
    marked = label()
    marked[2, 0, 0] = 9
    support = Support(**make_case(backend, 1), label_zyx=marked, ignore_value=9)
    (member,) = run(backend, query, [support], insertions=1)
    assert member.record["classes"]["1"]["prompted_slices"] == [1, 3]
    assert member.record["classes"]["1"]["partly_judged_slices"] == [2]


def test_another_slice_axis_comes_back_on_the_querys_own_grid(backend, support):
    query = Query(**make_case(backend, 0, slice_axis=2))
    (member,) = run(backend, query, [support], insertions=1)
    assert member.prob_kzyx.shape == (2, *query.geometry.shape_zyx)


def test_the_most_similar_supports_are_taken_first(backend, query, support):
    same = Support(**{**make_case(backend, 0), "case_id": "twin"}, label_zyx=label())
    members = run(backend, query, [support, same], supports=1, insertions=1)
    assert [m.record["support"] for m in members] == ["twin"]


def test_slices_beyond_the_limit_are_left_out_and_named(backend, query, support):
    (member,) = run(backend, query, [support], insertions=1, prompted_slices=2, classes=(1,))
    assert member.record["classes"]["1"]["prompted_slices"] == [1, 3]
    assert member.record["classes"]["1"]["slices_beyond_limit"] == [2]


def test_classes_of_one_support_are_put_at_the_same_drawn_places(backend, query, support):
    for member in run(backend, query, [support], insertions=3, positions="random", seed=5):
        places = [record["place"] for record in member.record["classes"].values()]
        assert places[0] == places[1]


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "here"},
        {"insertions": 0},
        {"prompted_slices": 0},
        {"mode": "swap"},
        {"components": "some"},
        {"insertions": 2, "mode": "chunk"},
        {"prompted_slices": 1, "mode": "switch"},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        InsertOptions(**options)


def test_members_that_do_not_fit_in_memory_together_are_the_same_members(backend, query, support, monkeypatch):
    together = run(backend, query, [support], insertions=3)
    monkeypatch.setattr("nnunet_sam2.labelling.strategies.insert.strategy._MEMBERS_BYTES", 1)
    apart = run(backend, query, [support], insertions=3)
    assert [m.name for m in together] == [m.name for m in apart]
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_allclose(a.prob_kzyx, b.prob_kzyx, atol=0.02)


def test_walks_of_all_members_and_classes_advance_together(backend, query, support, monkeypatch):
    calls = []
    walk_many = backend.walk_many
    monkeypatch.setattr(backend, "walk_many", lambda walks: calls.append(len(walks)) or walk_many(walks), raising=False)
    run(backend, query, [support], insertions=2)
    assert len(calls) == 1
    assert calls[0] >= 2 * len(CLASSES)
