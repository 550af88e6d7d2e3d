"""Training of the embedded SAM 2, tiny: after a kill it goes on as if nothing had been; its weights can be loaded."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedded_sam2.clips import Pool, draw_clips
from embedded_sam2.export import write_weights
from embedded_sam2.features_stage import FeatureSettings, train_features
from embedded_sam2.losses import frame_loss
from embedded_sam2.memory_stage import MemorySettings, train_memory
from embedded_sam2.run_state import RunState, learning_rate
from embedded_sam2.shards import Shards, ShardSettings
from embedded_sam2.student import feature_basis, fit_neck
from embedded_sam2.track import Tracker
from safetensors.torch import save_file

from nnunet_sam2.sam2.backend import load_backend
from nnunet_sam2.sam2.config import UNTRAINED, load_config
from nnunet_sam2.sam2.model import build_model, build_untrained

SIZE = 64
CPU = torch.device("cpu")


class KilledError(Exception):
    """Stand for a kill in the middle of a training."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small seeded SAM 2 in the place of Meta's."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(build_untrained(load_config(UNTRAINED), SIZE).state_dict(), path, metadata={"config": UNTRAINED})
    return path


@pytest.fixture(scope="module")
def shards(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    settings = ShardSettings(teacher=teacher, teacher_size=SIZE, size=SIZE, seed=5, families=1, slices=2)
    return Shards(tmp_path_factory.mktemp("shards"), settings, CPU)


def _student() -> Any:
    torch.manual_seed(0)
    return build_model(load_config("embedded"), SIZE)


def _features(shards: Shards, folder: Path) -> Any:
    model = _student()
    settings = FeatureSettings(
        shards=2, steps=4, batch=2, start="random", save_every_s=0.0, log_every=1, validate_every=100
    )
    train_features(model, shards, settings, folder, CPU)
    return model


def _memory(folder: Path, pools: Path) -> Any:
    model = _student()
    settings = MemorySettings(
        families=2, steps=4, batch_frames=6, prompt_part=0.5, save_every_s=0.0, log_every=1, validate_every=100
    )
    train_memory(model, settings, folder, CPU, pools=pools)
    return model


def _kill_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    save, done = RunState.save, [0]

    def killing(self: RunState, *args: Any) -> None:
        save(self, *args)
        done[0] += 1
        if done[0] == saves:
            raise KilledError

    monkeypatch.setattr(RunState, "save", killing)


def _same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def _log(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_distillation_killed_half_way_ends_with_the_same_weights_and_log(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    straight = _features(shards, tmp_path / "straight")
    with monkeypatch.context() as patch:
        _kill_after(patch, 2)
        with pytest.raises(KilledError):
            _features(shards, tmp_path / "killed")
    with (tmp_path / "killed" / "features.jsonl").open("a") as handle:
        handle.write('{"step": 3, "err')
    resumed = _features(shards, tmp_path / "killed")
    assert _same(straight, resumed)
    assert not _same(straight, _student())
    assert _log(tmp_path / "killed" / "features.jsonl") == _log(tmp_path / "straight" / "features.jsonl")


def test_memory_training_killed_half_way_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    straight = _memory(tmp_path / "straight", tmp_path)
    with monkeypatch.context() as patch:
        _kill_after(patch, 2)
        with pytest.raises(KilledError):
            _memory(tmp_path / "killed", tmp_path)
    assert _same(straight, _memory(tmp_path / "killed", tmp_path))


def test_memory_training_leaves_the_encoder_alone_and_moves_the_rest(tmp_path: Path):
    before, after = _student().state_dict(), _memory(tmp_path / "run", tmp_path).state_dict()
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert {"memory_attention", "memory_encoder", "sam_mask_decoder", "obj_ptr_proj"} <= moved
    trunk = [key for key in before if key.startswith("image_encoder.trunk.")]
    assert all(torch.equal(before[key], after[key]) for key in trunk)


def test_a_checkpoint_of_other_settings_is_not_continued(tmp_path: Path):
    model = torch.nn.Linear(2, 2)
    RunState(tmp_path, "stage", {"rate": 1}).save(3, model, None)
    assert RunState(tmp_path, "stage", {"rate": 1}).load(model, None) == 3
    with pytest.raises(SystemExit, match="other settings"):
        RunState(tmp_path, "stage", {"rate": 2}).load(model, None)


def test_the_teacher_sees_an_image_once(shards: Shards, monkeypatch: pytest.MonkeyPatch):
    images, features = shards.get(0)
    assert images.dtype == torch.uint8
    assert features.shape == (len(images), 64, SIZE // 16, SIZE // 16)
    monkeypatch.setattr(Shards, "teacher", property(lambda self: pytest.fail("the teacher was asked again")))
    assert torch.equal(shards.get(0)[1], features)


def test_the_fitted_neck_beats_the_mean(shards: Shards):
    model = _student()
    data = [shards.get(0), shards.get(1)]
    basis = feature_basis(torch.cat([f.float() for _, f in data]), 64)
    assert torch.allclose(basis.T @ basis, torch.eye(64), atol=1e-4)
    assert fit_neck(model, iter(data), basis) < 0.9


def test_what_training_writes_is_taken_by_the_back_end_with_its_memory(tmp_path: Path):
    path = tmp_path / "embedded_sam2.safetensors"
    line = write_weights(_student(), load_config("embedded"), path)
    assert "5.58 million" in line
    assert path.stat().st_size <= 12_000_000
    backend = load_backend(str(path), device="cpu", image_size=SIZE)
    assert backend.spec.has_memory
    assert backend.spec.config == "embedded"


def test_the_trainers_walk_gives_the_masks_of_the_back_end(tmp_path: Path):
    """What is trained must be what is run: prompted frames, then answers, memories of answers included."""
    model = _student()
    pool = Pool(tmp_path, model, encoder_hash="x", size=SIZE, seed=1, count=2)
    rng = np.random.default_rng(4)
    batch = draw_clips(pool, rng, batch_frames=12, device=CPU, families=(0, 2))
    while batch.length - batch.prompted < 3:
        batch = draw_clips(pool, rng, batch_frames=12, device=CPU, families=(0, 2))
    tracker = Tracker(model)
    shown = []
    with torch.no_grad():
        for _, masks, iou, score in tracker.walk(batch):
            best = masks[0, 1 + int(iou[0, 1:].argmax())]
            shown.append(best if float(score[0]) > 0 else torch.full_like(best, -1024.0))
    from nnunet_sam2.sam2.propagation import VideoWalker

    class Maps:
        key = "clip"

        def top(self, index: int) -> torch.Tensor:
            return batch.maps_tb[index][2][0]

        def high(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            return batch.maps_tb[index][0][0], batch.maps_tb[index][1][0]

    video = [(Maps(), t) for t in range(batch.length)]
    prompts = {t: batch.masks_tbss[t, :1].numpy() for t in range(batch.prompted)}
    with torch.no_grad():
        for answer in VideoWalker(model, CPU).walk(video, prompts):
            expected = torch.nn.functional.interpolate(
                shown[answer.frame - batch.prompted][None, None], size=(SIZE, SIZE), mode="bilinear"
            )[0, 0]
            # The back end keeps memories in bfloat16, as sam2's predictor does.
            assert torch.allclose(answer.logits_kss[0], expected, rtol=0.05, atol=0.3)


def test_a_model_that_says_absent_still_learns_the_mask():
    masks = torch.zeros(1, 4, 8, 8, requires_grad=True)
    target = torch.zeros(1, 8, 8)
    target[:, 2:6, 2:6] = 1
    loss, dice = frame_loss(masks, torch.zeros(1, 4), torch.tensor([-20.0]), target, single=False)
    loss.sum().backward()
    assert masks.grad is not None
    assert float(masks.grad.abs().sum()) > 0
    assert float(dice) == 0.0


def test_the_rate_rises_then_falls():
    rates = [learning_rate(step, 100, peak=1.0, warmup=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.02
    assert all(a >= b for a, b in pairwise(rates[10:]))
