"""Where the pseudo-videos of `insert` are joined: slices as numbers, no images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_sam2.labelling.strategies.insert.plans import MODES, Asked, Pair, best_window, spread, spread_peaks
from nnunet_sam2.labelling.strategies.insert.videos import QUERY, SUPPORT, Inserted


def pair(total: int, depth: int, prompts: list[int], *, whole: bool = False, seed: int = 0) -> Pair:
    rng = np.random.default_rng(seed)
    vectors = [rng.normal(size=(count, 6)) for count in (total, depth)]
    query_nf, support_mf = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
    kept = tuple(range(depth)) if whole else tuple(prompts)
    return Pair(query_nf=query_nf, support_mf=support_mf, support=Inserted(kept=kept, prompts=tuple(prompts)))


def asked(count: int = 3, *, matched: bool = True, twice: bool = True, chunks: int = 5) -> Asked:
    return Asked(count=count, matched=matched, twice=twice, chunks=chunks)


@given(
    mode=st.sampled_from(sorted(MODES)),
    total=st.integers(1, 9),
    depth=st.integers(1, 12),
    count=st.integers(1, 4),
    matched=st.booleans(),
    twice=st.booleans(),
    whole=st.booleans(),
    data=st.data(),
)
def test_every_plan_reaches_every_query_slice_from_a_prompt(mode, total, depth, count, matched, twice, whole, data):
    prompts = sorted(data.draw(st.sets(st.integers(0, depth - 1), min_size=1)))
    given_pair = pair(total, depth, prompts, whole=whole)
    plans = MODES[mode](given_pair, asked(count, matched=matched, twice=twice), np.random.default_rng(1))
    if mode == "switch" and len(prompts) < 2:
        assert plans == []
        return
    assert 1 <= len(plans) <= count
    for plan in plans:
        visits = dict.fromkeys(range(total), 0)
        for walk in plan.walks:
            assert len(set(walk.slots)) == len(walk.slots)
            prompted = [t for t, (kind, m) in enumerate(walk.slots) if kind == SUPPORT and m in prompts]
            for n in walk.asked:
                t = walk.slots.index((QUERY, n))
                assert t < max(prompted) if walk.reverse else t > min(prompted)
                visits[n] += 1
        assert set(visits.values()) <= ({1, 2} if twice else {1})
        if mode == "la_to_un" and twice:
            assert set(visits.values()) == {2}


@pytest.mark.parametrize("mode", ["la_to_un", "un_to_la", "switch"])
@pytest.mark.parametrize("matched", [True, False])
def test_plans_of_one_call_differ(mode, matched):
    plans = MODES[mode](pair(9, 9, [1, 3, 4, 6, 7]), asked(3, matched=matched), np.random.default_rng(2))
    assert len({str(plan.place) for plan in plans}) == 3


def test_the_query_comes_between_prompted_slices_so_that_both_sides_prompt():
    for whole in (False, True):
        given_pair = pair(4, 10, [3, 5, 8], whole=whole)
        for plan in MODES["un_to_la"](given_pair, asked(9), np.random.default_rng(0)):
            assert plan.place["after_support_slice"] in (3, 5)
            assert [walk.reverse for walk in plan.walks] == [False, True]
            assert plan.walks[0].slots == plan.walks[1].slots


def test_a_switch_puts_half_of_the_prompts_into_the_query_and_leaves_the_others():
    for plan in MODES["switch"](pair(12, 12, [2, 3, 6, 8, 9]), asked(9, twice=False), np.random.default_rng(0)):
        low, high = plan.place["support_slices"]
        first, last = plan.place["query_slices"]
        inside = [w for w in plan.walks if w.asked == set(range(first, last + 1))]
        outside = [w for w in plan.walks if w not in inside]
        assert {n for w in outside for n in w.asked} == set(range(12)) - set(range(first, last + 1))
        for walks, expected in ((outside, True), (inside, False)):
            for walk in walks:
                shown = [m for kind, m in walk.slots if kind == SUPPORT]
                assert shown == [m for m in (2, 3, 6, 8, 9) if (low <= m <= high) is expected]


def test_a_switch_of_a_long_support_and_a_short_query_keeps_relative_lengths():
    (plan,) = MODES["switch"](pair(3, 30, list(range(10, 20))), asked(1, matched=False), np.random.default_rng(0))
    low, high = plan.place["support_slices"]
    assert high - low + 1 == 5
    assert plan.place["query_slices"] in ([1, 1], [2, 2])


def test_chunks_cover_the_query_and_never_take_more_than_half_of_the_prompts():
    (plan,) = MODES["chunk"](pair(11, 10, [4, 5]), asked(matched=False, twice=False), np.random.default_rng(0))
    assert [c["query_slices"] for c in plan.place["chunks"]] == [[0, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    for walk in plan.walks:
        assert len([m for kind, m in walk.slots if kind == SUPPORT]) >= 1


def test_whole_supports_lose_the_stretch_that_a_chunk_takes():
    (plan,) = MODES["chunk"](
        pair(10, 10, [4, 5, 6, 7], whole=True), asked(matched=False, twice=False), np.random.default_rng(0)
    )
    for walk, place in zip(plan.walks, plan.place["chunks"], strict=True):
        low, high = place["query_slices"]
        assert place["instead_of_support_slices"] == list(range(low, high + 1))
        slots = [(QUERY, n) if low <= n <= high else (SUPPORT, n) for n in range(10)]
        assert list(walk.slots) == slots


def test_a_run_is_matched_where_the_query_shows_the_same():
    copied = pair(12, 12, [2, 3, 4, 5, 6, 7], seed=4)
    query_nf = np.roll(copied.support_mf, 3, axis=0)
    plans = MODES["switch"](
        Pair(query_nf=query_nf, support_mf=copied.support_mf, support=copied.support),
        asked(4),
        np.random.default_rng(0),
    )
    for plan in plans:
        low, high = plan.place["support_slices"]
        assert plan.place["query_slices"] == [low + 3, high + 3]


def test_the_best_window_is_the_most_alike_and_in_a_tie_the_expected_one():
    assert best_window(np.array([[0.1, 0.9, 0.2, 0.1]]), 1, 3) == 1
    assert best_window(np.eye(5)[1:3], 2, 0) == 1
    assert best_window(np.zeros((2, 6)), 2, 3) == 3


def test_slices_are_spread_and_peaks_keep_their_distance():
    assert spread(np.arange(10, 21), 3) == [10, 15, 20]
    assert spread(np.arange(4), 8) == [0, 1, 2, 3]
    assert spread(np.arange(5), 1) == [2]
    score = np.array([0.0, 0.9, 1.0, 0.9, 0.0, 0.1, 0.8, 0.1])
    assert spread_peaks(score, 2) == [2, 6]
    assert sorted(spread_peaks(score, 8)) == list(range(8))
