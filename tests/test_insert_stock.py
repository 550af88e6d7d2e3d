"""`insert` held against sam2's own video predictor on the pseudo-videos laid out as a reader would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lively_sam2 import SIZE, lively_model, make_backend, stock_walk

from nnunet_sam2.frames import Frames
from nnunet_sam2.labelling.fusion import FusionOptions
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.labelling.strategies.insert.strategy import Insert
from nnunet_sam2.support.cases import Query, Support

N, M = 5, 6
SHOWN = (1, 2, 3, 4)
TOLERANCE = 1e-4
"""Of probabilities: float32 sums in another order."""


@pytest.fixture(scope="module")
def model():
    return lively_model()


@pytest.fixture(scope="module")
def backend(model):
    return make_backend(model)


def smooth_images(count, seed):
    rng = np.random.default_rng(seed)
    base = rng.uniform(size=(3, 8, 8))
    drift = np.stack([base + 0.15 * n * rng.uniform(-1, 1, size=base.shape) for n in range(count)])
    return np.clip(drift, 0, 1).repeat(8, 2).repeat(8, 3).astype(np.float32)


QUERY_IMAGES, SUPPORT_IMAGES = smooth_images(N, 0), smooth_images(M, 1)


@pytest.fixture(scope="module")
def query(backend):
    frames = Frames.from_images(QUERY_IMAGES)
    return Query(case_id="q", frames=frames, embeddings=backend.embed(frames), geometry=frames.geometry)


@pytest.fixture(scope="module")
def support(backend):
    frames = Frames.from_images(SUPPORT_IMAGES)
    label = np.zeros((M, SIZE, SIZE), np.uint8)
    for m in SHOWN:
        label[m, 8 + m : 34, 8 : 40 + m] = 1
    return Support(
        case_id="s", frames=frames, embeddings=backend.embed(frames), geometry=frames.geometry, label_zyx=label
    )


class Stock:
    """Walk literal pseudo-videos in both directions, as the released code does, with sam2's own predictor."""

    def __init__(self, model, backend, monkeypatch, support):
        self.model, self.backend, self.monkeypatch, self.support = model, backend, monkeypatch, support

    def __call__(self, video):
        """Return {query slice: [forward logits, backward logits]} where a direction reaches it."""
        images = np.stack([(QUERY_IMAGES if kind == "q" else SUPPORT_IMAGES)[n] for kind, n in video])
        embeddings = self.backend.embed(Frames.from_images(images))
        prompts = {
            t: (self.support.label_zyx[n] == 1)[None] for t, (kind, n) in enumerate(video) if kind == "s" and n in SHOWN
        }
        found = {}
        for reverse in (False, True):
            walked = stock_walk(self.model, self.monkeypatch, embeddings, prompts, reverse=reverse)
            for t, logits in walked.items():
                if video[t][0] == "q":
                    found.setdefault(video[t][1], {})[reverse] = logits[0]
        return found


@pytest.fixture
def stock(model, backend, monkeypatch, support):
    return Stock(model, backend, monkeypatch, support)


def q(*slices):
    return [("q", n) for n in slices]


def s(*slices):
    return [("s", m) for m in slices]


def members(backend, query, support, **options):
    strategy = make_strategy("insert", options)
    return list(strategy.members(query, [support], (1,), backend, np.random.default_rng(3)))


def assert_same(member, expected):
    """Compare with {query slice: probability}."""
    assert sorted(expected) == list(range(N))
    mine = torch.from_numpy(member.prob_kzyx[0])
    torch.testing.assert_close(mine, torch.stack([expected[n] for n in range(N)]), rtol=0, atol=TOLERANCE)
    assert mine.std(dim=0).mean() > 1e-3, "the scene must move, or the comparison says nothing"


def mean_probability(found):
    return {n: torch.stack([torch.sigmoid(a) for a in ways.values()]).mean(dim=0) for n, ways in found.items()}


def test_the_papers_preset_gives_what_the_released_code_computes(backend, query, support, stock):
    made = members(backend, query, support, preset="paper", insertions=3)
    assert len({m.record["classes"]["1"]["place"]["before_query_slice"] for m in made}) == 3
    for member in made:
        p = member.record["classes"]["1"]["place"]["before_query_slice"]
        found = stock(q(*range(p)) + s(*range(M)) + q(*range(p, N)))
        # Released: the mean of two directions, which never both reach a query slice.
        assert all(set(ways) == {n < p} for n, ways in found.items())
        expected = {n: torch.sigmoid(sum(ways.values()) / len(ways)) for n, ways in found.items()}
        assert_same(member, expected)


def test_products_in_bfloat16_change_little(model, query, support):
    exact, rounded = (make_backend(model, precision=precision) for precision in ("float32", "bfloat16"))
    # Both on the same embeddings: what is compared is the reading of memory.
    found = [members(backend, query, support, preset="paper", insertions=2) for backend in (exact, rounded)]
    for a, b in zip(*found, strict=True):
        difference = np.abs(a.prob_kzyx - b.prob_kzyx)
        # How a product rounds is the processor's own; single voxels at a border differ most.
        assert 0 < np.quantile(difference, 0.999) < 0.05
        assert difference.max() < 0.2
        assert difference.mean() < 0.005


def test_both_directions_cover_the_query_when_their_mean_is_asked_for(backend, query, support, stock):
    (member,) = members(backend, query, support, insertions=1)
    p = member.record["classes"]["1"]["place"]["before_query_slice"]
    outward = stock(q(*range(p)) + s(*SHOWN) + q(*range(p, N)))
    back = {**stock(s(*SHOWN) + q(*range(p))), **stock(q(*range(p, N)) + s(*SHOWN))}
    passes = {n: [next(iter(outward[n].values())), next(iter(back[n].values()))] for n in range(N)}
    assert_same(member, {n: torch.sigmoid(torch.stack(both)).mean(dim=0) for n, both in passes.items()})


@pytest.mark.parametrize("whole", [False, True])
def test_un_to_la_is_walked_through_from_both_sides(backend, query, support, stock, whole):
    (member,) = members(backend, query, support, mode="un_to_la", insertions=1, whole_support=whole)
    after = member.record["classes"]["1"]["place"]["after_support_slice"]
    kept = range(M) if whole else SHOWN
    found = stock(s(*[m for m in kept if m <= after]) + q(*range(N)) + s(*[m for m in kept if m > after]))
    assert all(set(ways) == {False, True} for ways in found.values())
    assert_same(member, mean_probability(found))


def test_switch_joins_what_its_two_videos_say(backend, query, support, stock):
    (member,) = members(backend, query, support, mode="switch", insertions=1, both_directions=False)
    place = member.record["classes"]["1"]["place"]
    (low, high), (first, last) = place["support_slices"], place["query_slices"]
    run = s(*[m for m in SHOWN if low <= m <= high])
    outside = stock(q(*range(first)) + run + q(*range(last + 1, N)))
    before, after = s(*[m for m in SHOWN if m < low]), s(*[m for m in SHOWN if m > high])
    inside = stock(before + q(*range(first, last + 1)) + after)
    one_way = {n: ways.get(False, ways.get(True)) for n, ways in {**outside, **inside}.items()}
    assert_same(member, {n: torch.sigmoid(logits) for n, logits in one_way.items()})


def test_chunk_puts_each_stretch_of_the_query_into_the_support(backend, query, support, stock):
    (member,) = members(backend, query, support, mode="chunk", chunks=2, positions="random", whole_support=True)
    chunks = member.record["classes"]["1"]["place"]["chunks"]
    assert [c["query_slices"] for c in chunks] == [[0, 2], [3, 4]]
    found = {}
    for c in chunks:
        kept = [m for m in range(M) if m not in c["instead_of_support_slices"]]
        assert len(set(kept) & set(SHOWN)) >= len(SHOWN) / 2
        joint, (first, last) = c["before_support_slice"], c["query_slices"]
        found |= stock(
            s(*[m for m in kept if m < joint]) + q(*range(first, last + 1)) + s(*[m for m in kept if m >= joint])
        )
    assert_same(member, mean_probability(found))


def test_the_preset_is_the_released_codes_protocol():
    options = make_strategy("insert", {"preset": "paper"}).options
    assert (options.mode, options.supports, options.insertions) == ("la_to_un", None, 5)
    assert (options.positions, options.prompted_slices, options.whole_support) == ("random", None, True)
    assert not options.both_directions
    assert Insert(options).fusion(FusionOptions()).components == "largest"
    assert make_strategy("insert", {"components": "none"}).fusion(FusionOptions()).components == "none"
    assert Insert().fusion(FusionOptions(components="confident")).components == "confident"
    assert make_strategy("insert", {"preset": "paper", "insertions": "2"}).options.insertions == 2
    assert Insert().options.positions == "matched"
