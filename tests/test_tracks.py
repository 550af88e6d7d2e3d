"""Walks as a tree of steps: what is shared, in which order steps are taken, and what walks together answer."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from lively_sam2 import lively_model, make_backend, masks, stock_walk

from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.protocol import VideoWalk
from nnunet_sam2.sam2.reduced import with_reduced_memory_encoder
from nnunet_sam2.sam2.tracks import plan_steps, rounds

BOX, MOVED, OTHER = (8, 8, 40, 30), (10, 8, 42, 30), (36, 36, 60, 60)


class Named:
    """Stand for embeddings where only their key is read."""

    def __init__(self, key):
        self.key = key


A, B = Named("a"), Named("b")


def walk(video, prompts, **options):
    """Lay out a walk of one object; ``prompts`` maps positions to the keys of its memories."""
    shown = {t: np.ones((1, 2, 2), bool) for t in prompts}
    return VideoWalk(video=video, masks_kss=shown, **options), {t: {0: key} for t, key in prompts.items()}


def steps_of(*walks):
    plan = plan_steps([w for w, _ in walks], [p for _, p in walks], longest_reach=16)
    return plan, list(rounds(plan.first))


def frames(embeddings, indices):
    return [(embeddings, n) for n in indices]


def test_walks_share_the_steps_that_see_the_same():
    support = frames(B, range(3))
    prompts = {0: "p", 1: "q"}  # slice 2 of the support has none: SAM 2 labels it on its way
    short = walk(support + frames(A, range(20)), prompts, asked=frozenset(range(3, 13)))
    long = walk(support + frames(A, range(20)), prompts)
    plan, taken = steps_of(short, long)
    assert sum(len(together) for together in taken) == 21
    # Asked for twice where both walks pass, each for itself.
    assert sum(len(step.answers) for together in taken for step in together) == 10 + 21
    assert plan.waited_for == {(0, t): 1 for t in range(3, 13)} | {(1, t): 1 for t in range(2, 23)}


def test_a_walk_back_is_a_walk_forth_through_the_reversed_video():
    forth = walk(frames(B, [0, 1]) + frames(A, range(20)), {0: "p", 1: "q"})
    back = walk((frames(B, [0, 1]) + frames(A, range(20)))[::-1], {21: "p", 20: "q"}, reverse=True)
    _, taken = steps_of(forth, back)
    assert sum(len(together) for together in taken) == 20


def test_other_prompts_other_frames_and_short_videos_share_nothing():
    base = walk(frames(B, [0]) + frames(A, range(20)), {0: "p"})
    other_mask = walk(frames(B, [0]) + frames(A, range(20)), {0: "q"})
    other_frame = walk(frames(B, [0]) + frames(A, range(1, 21)), {0: "p"})
    # In a video of fewer than 16 frames pointers have other distances.
    short_video = walk(frames(B, [0]) + frames(A, range(5)), {0: "p"})
    _, taken = steps_of(base, other_mask, other_frame, short_video)
    assert sum(len(together) for together in taken) == 20 + 20 + 20 + 5


def test_walks_to_the_same_end_stand_on_the_same_frame_together():
    walks = []
    for p in (2, 7, 4):
        video = frames(A, range(p)) + frames(B, [p]) + frames(A, range(p, 20))
        walks.append(walk(video, {p: f"p{p}"}, asked=frozenset(range(p + 1, 21))))
    _, taken = steps_of(*walks)
    assert [len(together) for together in taken] == [1] * 2 + [2] * 3 + [3] * 13
    for together in taken:
        assert len({(step.frame[0].key, step.frame[1]) for step in together}) == 1


@pytest.fixture(scope="module")
def model():
    return lively_model()


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    base = rng.uniform(size=(3, 8, 8))
    drift = np.stack([base + 0.15 * n * rng.uniform(-1, 1, size=base.shape) for n in range(12)])
    return np.clip(drift, 0, 1).repeat(8, 2).repeat(8, 3).astype(np.float32)


def scene(embeddings):
    """Return walks of one and of two objects, both ways, some with steps in common."""
    video = frames(embeddings, range(len(embeddings)))
    one = {3: masks(BOX), 4: masks(MOVED), 6: masks(MOVED)}
    two = {2: masks(BOX, None), 5: masks(MOVED, OTHER)}
    return [
        VideoWalk(video=video, masks_kss=one),
        VideoWalk(video=video, masks_kss=one, asked=frozenset({8, 9})),
        VideoWalk(video=video, masks_kss=one, reverse=True),
        VideoWalk(video=video, masks_kss=two),
        VideoWalk(video=video[:9], masks_kss=two, reverse=True),
        VideoWalk(video=video, masks_kss={0: masks(None)}),
    ]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_walks_together_answer_as_sam2s_own_predictor_one_by_one(model, images, monkeypatch, batch):
    backend = make_backend(model)
    monkeypatch.setattr(backend._walker, "batch", batch)
    embeddings = backend.embed(Frames.from_images(images))
    walks = scene(embeddings)
    found = {}
    for number, answer in backend.walk_many(walks):
        assert (number, answer.frame) not in found
        found[number, answer.frame] = answer.logits_kss
    assert {t for number, t in found if number == 1} == {8, 9}
    assert not any(number == 5 for number, _ in found)
    for number, lain_out in enumerate(walks[:5]):
        # The stock predictor takes its features from one volume, frame by frame.
        part = backend.embed(Frames.from_images(images[: len(lain_out.video)]))
        expected = stock_walk(model, monkeypatch, part, lain_out.masks_kss, reverse=lain_out.reverse)
        mine = {t: logits for n, t in found if n == number for logits in [found[n, t]]}
        assert mine
        for t, logits in mine.items():
            torch.testing.assert_close(logits, expected[t], rtol=1e-4, atol=1e-3)
        order = [t for n, t in found if n == number]
        assert order == sorted(order, reverse=lain_out.reverse)


def tensor_bytes():
    gc.collect()
    seen = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(seen.values())


def test_what_walks_remember_does_not_grow_with_the_volume(model, images):
    backend = make_backend(model)
    embeddings = backend.embed(Frames.from_images(np.concatenate([images] * 14)))
    video = frames(embeddings, range(160))
    walks = [VideoWalk(video=video, masks_kss={0: masks(BOX)}), VideoWalk(video=video, masks_kss={0: masks(OTHER)})]
    held = []
    for count, (_, answer) in enumerate(backend.walk_many(walks), start=1):
        if answer.frame in (40, 159) and count % 2 == 0:
            held.append(tensor_bytes())
        del answer
    assert len(held) == 2
    assert held[1] <= held[0] + 1000, "119 slices later"


def test_a_frame_is_read_once_for_all_objects_on_it(model, images):
    backend = make_backend(model)
    stored = backend.embed(Frames.from_images(images))

    class Counting:
        key = stored.key
        reads = 0

        def __len__(self):
            return len(stored)

        def top(self, index):
            Counting.reads += 1
            return stored.top(index)

        def high(self, index):
            return stored.high(index)

    video = frames(Counting(), range(12))
    walks = [VideoWalk(video=video, masks_kss={0: masks(box, OTHER)}) for box in (BOX, MOVED)]
    assert len(list(backend.walk_many(walks))) == 22
    assert Counting.reads == 12


def test_a_reduced_memory_encoder_shares_the_models_weights_and_writes_nearly_the_same(model):
    reduced = with_reduced_memory_encoder(model)
    assert reduced.memory_encoder.out_proj is model.memory_encoder.out_proj
    features = torch.randn(16, 2, model.hidden_dim)
    given = {
        "current_vision_feats": [features],
        "feat_sizes": [(4, 4)],
        "pred_masks_high_res": torch.randn(2, 1, 64, 64),
        "object_score_logits": torch.ones(2, 1),
        "is_mask_from_pts": False,
    }
    exact, rounded = (m._encode_new_memory(**given)[0] for m in (model, reduced))
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.02, atol=0.02)
    assert all(p.dtype == torch.float32 for p in model.parameters())
