"""What guided labelling asks of the back end: memory read without a walk, a gate on the decoder, replaced weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lively_sam2 import SIZE, lively_model, make_backend, masks

from nnunet_sam2.errors import InputError
from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.backend import MetaSam2Backend
from nnunet_sam2.sam2.protocol import Embeddings

BOXES = ((8, 8, 40, 30), (40, 36, 60, 60))


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return make_backend(lively_model())


@pytest.fixture(scope="module")
def embeddings(backend: MetaSam2Backend) -> Embeddings:
    rng = np.random.default_rng(0)
    base = rng.uniform(size=(3, 8, 8))
    drift = np.stack([base + 0.15 * n * rng.uniform(-1, 1, size=base.shape) for n in range(6)])
    return backend.embed(Frames.from_images(np.clip(drift, 0, 1).repeat(8, 2).repeat(8, 3).astype(np.float32)))


class _Changed:
    """Embeddings whose features are others at some locations of the grid."""

    key = "changed"

    def __init__(self, embeddings: Embeddings, there_hw: torch.Tensor) -> None:
        self._embeddings, self._there_hw = embeddings, there_hw

    def __len__(self) -> int:
        return len(self._embeddings)

    def top(self, index: int) -> torch.Tensor:
        top = self._embeddings.top(index)
        return torch.where(self._there_hw, top.flip(0) + 1.0, top)

    def high(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._embeddings.high(index)


def test_recall_and_decode_answer_as_a_walk_to_the_same_frame(backend: MetaSam2Backend, embeddings: Embeddings) -> None:
    shown = masks(*BOXES)
    moved = np.roll(shown, 3, axis=2)
    video = [(embeddings, 0), (embeddings, 1), (embeddings, 2)]
    (walked,) = backend.propagate(video, {0: shown, 1: moved})
    features = backend.recall(video[2], video[:2], np.stack([shown, moved]))
    decoded = backend.decode(embeddings, 2, features_kchw=features, several=True)
    assert decoded.object_score_k is not None
    torch.testing.assert_close(decoded.object_score_k, walked.object_score_k)
    there = decoded.object_score_k > 0
    assert there.any()
    torch.testing.assert_close(decoded.logits_kss[there], walked.logits_kss[there], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoded.iou_k, walked.iou_k.clamp(0, 1))


def test_an_object_without_a_mask_cannot_be_recalled(backend: MetaSam2Backend, embeddings: Embeddings) -> None:
    with pytest.raises(ValueError, match="every object needs a mask"):
        backend.recall((embeddings, 2), [(embeddings, 0)], masks(BOXES[0], None)[None])
    with pytest.raises(ValueError, match="every object needs a mask"):
        backend.recall((embeddings, 2), [], np.zeros((0, 1, SIZE, SIZE), bool))


def test_a_checkpoint_without_memory_recalls_nothing(embeddings: Embeddings) -> None:
    image_model = make_backend(lively_model(), has_memory=False)
    with pytest.raises(InputError, match="holds no video memory"):
        image_model.recall((embeddings, 1), [(embeddings, 0)], masks(BOXES[0])[None])


def test_an_open_gate_changes_nothing_and_leaves_nothing_behind(
    backend: MetaSam2Backend, embeddings: Embeddings
) -> None:
    boxes = np.array(BOXES, np.float32)
    plain = backend.decode(embeddings, 0, boxes_k4=boxes)
    opened = backend.decode(embeddings, 0, boxes_k4=boxes, gate_khw=torch.ones(2, 16, 16))
    torch.testing.assert_close(opened.logits_kss, plain.logits_kss, atol=1e-5, rtol=1e-5)
    half = torch.zeros(2, 16, 16)
    half[:, :, :8] = 1
    gated = backend.decode(embeddings, 0, boxes_k4=boxes, gate_khw=half)
    assert not torch.allclose(gated.logits_kss, plain.logits_kss, atol=1e-2)
    again = backend.decode(embeddings, 0, boxes_k4=boxes)
    assert torch.equal(again.logits_kss, plain.logits_kss)


def test_what_lies_where_the_gate_is_closed_has_no_say_in_the_mask(
    backend: MetaSam2Backend, embeddings: Embeddings
) -> None:
    box = np.array(BOXES[:1], np.float32)
    closed_hw = torch.zeros(SIZE // 16, SIZE // 16, dtype=torch.bool)
    closed_hw[:, -1] = True
    changed = _Changed(embeddings, closed_hw)
    gate = torch.ones(1, SIZE // 16, SIZE // 16)
    gate[:, closed_hw] = 0
    seen = (slice(None), slice(None), slice(0, SIZE // 4 - 8))  # what the closed column's own pixels do not reach
    free, other = (backend.decode(e, 0, boxes_k4=box).low_res_logits_khw[seen] for e in (embeddings, changed))
    assert not torch.allclose(free, other, atol=1e-2)
    free, other = (
        backend.decode(e, 0, boxes_k4=box, gate_khw=gate).low_res_logits_khw[seen] for e in (embeddings, changed)
    )
    torch.testing.assert_close(free, other, atol=1e-3, rtol=1e-3)


def test_replaced_weights_answer_otherwise_under_another_hash(backend: MetaSam2Backend, embeddings: Embeddings) -> None:
    name = "sam_mask_decoder.iou_prediction_head.layers.2.bias"
    changed = {name: backend.model_copy().state_dict()[name] - 1.0}
    adapted = backend.adapted(changed, name="test")
    assert adapted.spec.name == "lively+test"
    assert adapted.spec.checkpoint_hash != backend.spec.checkpoint_hash
    again = backend.adapted(changed, name="test")
    assert again.spec == adapted.spec
    box = np.array(BOXES[:1], np.float32)
    before, after = (b.decode(embeddings, 0, boxes_k4=box).iou_k for b in (backend, adapted))
    assert float(after) < float(before)
    with pytest.raises(ValueError, match="no weights"):
        backend.adapted({"nothing": torch.zeros(1)}, name="test")
