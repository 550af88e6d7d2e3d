"""Strategy match: similar slices in two-frame clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.labelling.member import Member
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.labelling.strategies.match.strategy import Match, MatchOptions
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.sam2.protocol import Propagated
from nnunet_sam2.support.cases import Query, Support
from nnunet_sam2.support.library import load_query, load_support


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=64, threads=1)


@pytest.fixture(scope="module")
def supports(cohort: Cohort, backend: MetaSam2Backend) -> list[Support]:
    return [load_support(cohort, case, backend, slice_axis=0) for case in cohort.labelled[:2]]


@pytest.fixture(scope="module")
def query(cohort: Cohort, backend: MetaSam2Backend) -> Query:
    return load_query(cohort, cohort.unlabelled[0], backend, slice_axis=0)


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _slices(member: Member) -> list[dict[str, Any]]:
    (pool,) = member.record["pools"]
    return list(pool["slices"])


def test_every_rank_gives_a_member_on_the_query_grid(
    cohort: Cohort, supports: list[Support], query: Query, backend: MetaSam2Backend
) -> None:
    match = Match(MatchOptions(matches=2, augmentations=1, shortlist=2))
    members = list(match.members(query, supports, cohort.class_values, backend, _rng()))
    assert [m.name for m in members] == ["match:0", "match:1"]
    for member in members:
        assert member.prob_kzyx.shape == (len(cohort.class_values), *query.geometry.shape_zyx)
        assert member.prob_kzyx.dtype == np.float32
        assert 0 <= member.prob_kzyx.min() <= member.prob_kzyx.max() <= 1
    best, second = (_slices(m) for m in members)
    assert all(a["embedding"] >= b["embedding"] for a, b in zip(best, second, strict=True))
    again = list(match.members(query, supports, cohort.class_values, backend, _rng()))
    assert all(np.array_equal(a.prob_kzyx, b.prob_kzyx) for a, b in zip(members, again, strict=True))


def test_a_slice_that_is_among_the_supports_is_matched_to_itself(
    cohort: Cohort, supports: list[Support], backend: MetaSam2Backend
) -> None:
    match = Match(MatchOptions(augmentations=1, shortlist=2))
    (member,) = match.members(supports[0].as_query(), supports, cohort.class_values, backend, _rng())
    found = [(s["support"], s["slice"], s["variant"]) for s in _slices(member)]
    assert found == [(supports[0].case_id, n, None) for n in range(len(supports[0].frames))]


def test_an_empty_matched_slice_says_that_there_is_nothing_and_no_empty_mask_is_sent(
    cohort: Cohort, supports: list[Support], backend: MetaSam2Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[np.ndarray] = []
    real = backend.propagate

    def watch(video: Sequence[Any], masks: Mapping[int, np.ndarray], **options: Any) -> list[Propagated]:
        sent.append(masks[0])
        return real(video, masks, **options)

    monkeypatch.setattr(backend, "propagate", watch)
    support = supports[0]
    match = Match(MatchOptions(augmentations=0))
    (member,) = match.members(support.as_query(), [support], cohort.class_values, backend, _rng())
    shown = support.frames.slices_first(np.isin(support.label_zyx, cohort.class_values)).any(axis=(1, 2))
    assert 0 < shown.sum() < len(shown)
    assert len(sent) == shown.sum()
    assert all(mask.any() for masks in sent for mask in masks)
    found = support.frames.slices_first(member.prob_kzyx.max(axis=0)).any(axis=(1, 2))
    assert np.array_equal(found, shown)


def test_variants_are_the_same_for_every_query_and_differ_between_slices(
    cohort: Cohort, supports: list[Support], query: Query, backend: MetaSam2Backend
) -> None:
    options = MatchOptions(shortlist=3, augmentations=3, matches=12)
    seen: dict[tuple[str, int, float], Any] = {}
    for volume in (query, supports[1].as_query()):
        for member in Match(options).members(volume, supports[:1], cohort.class_values, backend, _rng()):
            for found in _slices(member):
                if found["variant"]:
                    key = (found["support"], found["slice"], found["variant"]["rotation_degrees"])
                    assert seen.setdefault(key, found["variant"]) == found["variant"]
    per_slice: dict[tuple[str, int], set[float]] = {}
    for case_id, index, rotation in seen:
        per_slice.setdefault((case_id, index), set()).add(rotation)
    assert all(len(rotations) <= 3 for rotations in per_slice.values())
    assert len({frozenset(r) for r in per_slice.values()}) == len(per_slice)


@pytest.mark.parametrize(
    "settings",
    [
        {"metric": "mse"},
        {"support_set": "all"},
        {"components": "some"},
        {"hue": 0.7},
        {"augmentations": -1},
        {"shortlist": 0},
        {"matches": 0},
        {"scale": 2.0},
    ],
)
def test_options_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        MatchOptions(**settings)


def test_match_is_found_by_name_with_options_from_text() -> None:
    strategy = make_strategy("match", {"augmentations": "0", "lpips_weights": "none", "scale": "0.1"})
    assert strategy.options == MatchOptions(augmentations=0, scale=0.1)
    assert strategy.needs_memory
