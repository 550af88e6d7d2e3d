"""The SAM 2 back end held against sam2's own predictors."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from lively_sam2 import CONFIG, SIZE, drifting_images, lively_model, make_backend, masks, stock_walk

from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.backend import MetaSam2Backend, default_precision, load_backend
from nnunet_sam2.sam2.cache import EmbeddingCache

WEIGHTS = Path(os.environ.get("NNUNET_SAM2_WEIGHTS", Path(__file__).parents[2] / "shared" / "weights"))
IMAGE_WEIGHTS = WEIGHTS / "sam2_hiera_tiny_image.safetensors"


@pytest.fixture(scope="module")
def model():
    return lively_model()


@pytest.fixture(scope="module")
def backend(model):
    return make_backend(model)


@pytest.fixture(scope="module")
def images():
    return drifting_images()


@pytest.fixture(scope="module")
def embeddings(backend, images):
    return backend.embed(Frames.from_images(images))


SCENES = {
    "one object, one prompt": {2: masks((8, 8, 40, 30))},
    "two objects on the same frames": {
        3: masks((8, 8, 40, 30), (40, 36, 60, 60)),
        4: masks((10, 8, 42, 30), (38, 36, 58, 60)),
    },
    "three objects, each on its own frames": {
        2: masks((8, 8, 40, 30), None, (2, 50, 20, 62)),
        3: masks((8, 9, 40, 33), (40, 36, 60, 60), None),
        5: masks((12, 9, 40, 33), (42, 36, 60, 60), None),
    },
}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("scene", SCENES)
def test_propagation_answers_as_sam2s_own_video_predictor(model, backend, embeddings, monkeypatch, scene, reverse):
    prompts = SCENES[scene]
    video = [(embeddings, i) for i in range(len(embeddings))]
    answers = backend.propagate(video, prompts, reverse=reverse)
    expected = stock_walk(model, monkeypatch, embeddings, prompts, reverse=reverse)
    walked = range(max(prompts), -1, -1) if reverse else range(min(prompts), len(video))
    assert [a.frame for a in answers] == [t for t in walked if t not in prompts]
    for answer in answers:
        torch.testing.assert_close(answer.logits_kss, expected[answer.frame], rtol=1e-4, atol=1e-3)
    spread = torch.stack([a.logits_kss for a in answers]).std(dim=0).mean()
    assert spread > 0.05, "the scene must move, or the comparison says nothing"


def test_a_long_walk_forgets_only_what_attention_cannot_read(model, monkeypatch, backend, images):
    many = np.concatenate([images, images[::-1], images])
    embeddings = backend.embed(Frames.from_images(many))
    prompts = {0: masks((8, 8, 40, 30))}
    answers = backend.propagate([(embeddings, i) for i in range(len(many))], prompts)
    expected = stock_walk(model, monkeypatch, embeddings, prompts, reverse=False)
    assert len(answers) == 26
    torch.testing.assert_close(answers[-1].logits_kss, expected[26], rtol=1e-4, atol=1e-3)


def test_a_walk_past_many_prompts_reads_what_is_near_alone(model, monkeypatch, backend, images):
    many = np.concatenate([images, images[::-1], images])
    embeddings = backend.embed(Frames.from_images(many))
    box, moved = (8, 8, 40, 30), (10, 8, 44, 30)
    prompts = {2: masks(box)} | {t: masks(moved) for t in range(5, 14)}
    video = [(embeddings, i) for i in range(len(many))]
    for reverse in (False, True):
        answers = backend.propagate(video, prompts, reverse=reverse)
        expected = stock_walk(model, monkeypatch, embeddings, prompts, reverse=reverse)
        assert len(answers) == (15 if not reverse else 4)
        for answer in answers:
            torch.testing.assert_close(answer.logits_kss, expected[answer.frame], rtol=1e-4, atol=1e-3)


def test_version_2_0_is_walked_as_by_sam2_too(monkeypatch, images):
    config = dataclasses.replace(CONFIG, version="2.0")
    older = lively_model(config)
    backend = make_backend(older)
    embeddings = backend.embed(Frames.from_images(images[:6]))
    prompts = {1: masks((8, 8, 40, 30), (40, 36, 60, 60))}
    expected = stock_walk(older, monkeypatch, embeddings, prompts, reverse=False, config=config)
    for answer in backend.propagate([(embeddings, i) for i in range(6)], prompts):
        torch.testing.assert_close(answer.logits_kss, expected[answer.frame], rtol=1e-4, atol=1e-3)


def test_kept_prompt_memories_change_nothing(model, embeddings):
    prompts = SCENES["three objects, each on its own frames"]
    video = [(embeddings, i) for i in range(len(embeddings))]
    fresh, used = make_backend(model), make_backend(model)
    used.propagate(video, prompts, reverse=True)
    for a, b in zip(fresh.propagate(video, prompts), used.propagate(video, prompts), strict=True):
        assert torch.equal(a.logits_kss, b.logits_kss)


def test_an_object_without_any_prompt_is_nowhere(backend, embeddings):
    video = [(embeddings, i) for i in range(3)]
    answers = backend.propagate(video, {0: masks((8, 8, 40, 30), None)})
    assert len(answers) == 2
    assert all((a.logits_kss[1] < -1000).all() and a.iou_k[1] == 0 for a in answers)
    assert backend.propagate(video, {0: masks(None, None)}) == []


def test_embeddings_are_those_of_the_stock_encoder(model, backend, embeddings, images):
    normalised = (images[3] - np.array(([[0.485]], [[0.456]], [[0.406]]))) / np.array(([[0.229]], [[0.224]], [[0.225]]))
    with torch.no_grad():
        maps = model.forward_image(torch.from_numpy(normalised[None]).float())["backbone_fpn"]
    for mine, stock in zip((*embeddings.high(3), embeddings.top(3)), maps, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, stock[0], rtol=2e-3, atol=2e-3)


def test_the_decoder_answers_as_sam2s_own_image_predictor(model, backend, embeddings):
    predictor_module = pytest.importorskip("sam2.sam2_image_predictor")
    predictor = predictor_module.SAM2ImagePredictor(model)
    top = embeddings.top(2)[None] + model.no_mem_embed.reshape(1, -1, 1, 1)
    predictor._features = {"image_embed": top, "high_res_feats": [m[None] for m in embeddings.high(2)]}
    predictor._orig_hw, predictor._is_image_set = [(SIZE, SIZE)], True
    boxes = np.array([[5.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 30.0]], np.float32)
    points = [(np.array([[20.0, 20.0], [50.0, 50.0]]), np.array([True, False])), (np.array([[30.0, 20.0]]), [True])]
    for k in range(2):
        xy, positive = points[k]
        stock, iou, low_res = predictor.predict(
            point_coords=xy,
            point_labels=np.asarray(positive, int),
            box=boxes[k],
            multimask_output=False,
            return_logits=True,
        )
        mine = backend.decode(embeddings, 2, boxes_k4=boxes[k : k + 1], points=points[k : k + 1])
        assert mine.logits_kss[0].numpy() == pytest.approx(stock[0], abs=1e-4)
        assert float(mine.iou_k[0]) == pytest.approx(float(iou[0]), abs=1e-5)
        assert mine.low_res_logits_khw[0].clamp(-32, 32).numpy() == pytest.approx(low_res[0], abs=1e-4)


def test_prompts_in_one_call_are_answered_as_one_by_one(backend, embeddings):
    boxes = np.array([[5.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 30.0]], np.float32)
    together = backend.decode(embeddings, 1, boxes_k4=boxes)
    again = backend.decode(embeddings, 1, boxes_k4=boxes, mask_logits_khw=together.low_res_logits_khw)
    for k in range(2):
        one = backend.decode(embeddings, 1, boxes_k4=boxes[k : k + 1])
        torch.testing.assert_close(together.logits_kss[k], one.logits_kss[0], rtol=1e-4, atol=1e-4)
    assert together.logits_kss.shape == (2, SIZE, SIZE)
    assert together.low_res_logits_khw.shape == (2, SIZE // 4, SIZE // 4)
    assert not torch.equal(again.logits_kss, together.logits_kss)
    assert bool(((together.iou_k >= 0) & (together.iou_k <= 1)).all())
    with pytest.raises(ValueError, match="prompts"):
        backend.decode(embeddings, 1)


def test_a_caller_finds_threads_precision_and_gradients_as_they_were(model, images):
    backend = MetaSam2Backend(
        model=model,
        spec=make_backend(model, precision="bfloat16").spec,
        device=torch.device("cpu"),
        cache=EmbeddingCache(None),
        threads=3,
    )
    before = (torch.get_num_threads(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())
    embeddings = backend.embed(Frames.from_images(images[:3]))
    for _ in backend.walk([(embeddings, i) for i in range(3)], {0: masks((8, 8, 40, 30))}):
        assert (torch.get_num_threads(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()) == before
    assert (torch.get_num_threads(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()) == before


def test_real_image_weights_segment_a_bright_disc_from_its_box(tmp_path):
    if not IMAGE_WEIGHTS.is_file():
        pytest.skip(f"{IMAGE_WEIGHTS} is absent; set NNUNET_SAM2_WEIGHTS")
    size = 256
    y, x = np.mgrid[:size, :size]
    disc = (y - 120) ** 2 + (x - 140) ** 2 < 50**2
    noise = np.random.default_rng(0).normal(0, 0.03, disc.shape)
    image = np.clip(0.3 + 0.4 * disc + noise, 0, 1).astype(np.float32)
    frames = Frames.from_images(np.broadcast_to(image, (1, 3, size, size)))
    backend = load_backend(str(IMAGE_WEIGHTS), device="cpu", image_size=size, cache_dir=tmp_path)
    assert backend.spec.config == "sam2_hiera_tiny"
    assert not backend.spec.has_memory
    decoded = backend.decode(backend.embed(frames), 0, boxes_k4=np.array([[88.0, 68.0, 192.0, 172.0]]))
    found = decoded.logits_kss[0].numpy() > 0
    assert 2 * (found & disc).sum() / (found.sum() + disc.sum()) > 0.95
    if default_precision(torch.device("cpu")) == "bfloat16":
        exact = load_backend(str(IMAGE_WEIGHTS), device="cpu", image_size=size, precision="float32").embed(frames)
        cosine = torch.cosine_similarity(exact.top(0), backend.embed(frames).top(0), dim=0)
        assert float(cosine.mean()) > 0.999
