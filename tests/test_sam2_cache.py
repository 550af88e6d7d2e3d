"""Embeddings are computed once, kept on disk bit for bit, and never taken for those of another model."""

from __future__ import annotations

import os

import pytest
import torch
from lively_sam2 import drifting_images, lively_model, make_backend

from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.cache import TENSORS, EmbeddingCache, joined_halves, to_half


@pytest.fixture(scope="module")
def model():
    return lively_model()


@pytest.fixture(scope="module")
def images():
    return drifting_images()


class Counting:
    """Count how often a model encodes."""

    def __init__(self, model, monkeypatch):
        self.images = 0
        forward = model.forward_image

        def counted(images):
            self.images += len(images)
            return forward(images)

        monkeypatch.setattr(model, "forward_image", counted)


def same(a, b):
    return all(
        torch.equal(x, y)
        for i in range(len(a))
        for x, y in zip((a.top(i), *a.high(i)), (b.top(i), *b.high(i)), strict=True)
    )


def test_each_slice_is_encoded_once_and_read_back_bit_for_bit(tmp_path, model, images, monkeypatch):
    counting = Counting(model, monkeypatch)
    frames = Frames.from_images(images[:3])
    first = make_backend(model, EmbeddingCache(tmp_path))
    fresh = first.embed(frames)
    assert counting.images == 3
    assert same(fresh, first.embed(frames))
    later = make_backend(model, EmbeddingCache(tmp_path)).embed(frames)
    assert counting.images == 3
    assert len(later) == 3
    assert later.key == fresh.key
    assert same(fresh, later)


@pytest.mark.parametrize("changes", [{"checkpoint_hash": "1"}, {"precision": "bfloat16"}, {"config": "other"}])
def test_another_model_does_not_find_the_embeddings(tmp_path, model, images, monkeypatch, changes):
    counting = Counting(model, monkeypatch)
    frames = Frames.from_images(images[:1])
    make_backend(model, EmbeddingCache(tmp_path)).embed(frames)
    make_backend(model, EmbeddingCache(tmp_path), **changes).embed(frames)
    assert counting.images == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other key"])
def test_a_damaged_cache_file_is_encoded_anew(tmp_path, model, images, monkeypatch, damage):
    counting = Counting(model, monkeypatch)
    frames = Frames.from_images(images[:2])
    fresh = make_backend(model, EmbeddingCache(tmp_path)).embed(frames)
    (path,) = tmp_path.glob("*/*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-100:]
    elif damage == "flipped":
        content[-100] ^= 255
    path.write_bytes(content)
    if damage == "other key":
        other = make_backend(model, EmbeddingCache(tmp_path), checkpoint_hash="other")
        wanted = other.embedding_key(frames)
        (tmp_path / wanted[:2]).mkdir(exist_ok=True)
        path.replace(tmp_path / wanted[:2] / f"{wanted}.safetensors")
        other.embed(frames)
    else:
        assert same(fresh, make_backend(model, EmbeddingCache(tmp_path)).embed(frames))
    assert counting.images == 4


def test_cache_files_are_the_same_bytes_every_time(tmp_path, model, images):
    frames = Frames.from_images(images[:2])
    contents = []
    for folder in ("a", "b"):
        make_backend(model, EmbeddingCache(tmp_path / folder)).embed(frames)
        (path,) = (tmp_path / folder).glob("*/*.safetensors")
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


def maps(value, frames=1):
    return {name: torch.full((frames, 1, 256, 256), float(value)) for name in TENSORS}


def test_memory_is_bounded_and_what_left_it_is_read_from_disk(tmp_path):
    cache = EmbeddingCache(tmp_path, memory_mb=1)
    kept = [cache.put(f"{n:02d}", maps(n)) for n in range(4)]  # 0.4 MB each
    assert sum(k.memory_bytes for k in kept) <= 2**20
    assert [float(k.top(0)[0, 0, 0]) for k in kept] == [0, 1, 2, 3]


def test_without_a_folder_the_caller_keeps_what_the_cache_forgets():
    cache = EmbeddingCache(None, memory_mb=1)
    kept = [cache.put(f"{n:02d}", maps(n)) for n in range(4)]
    assert cache.get("00") is None
    assert cache.get("03") is kept[3]
    assert float(kept[0].top(0)[0, 0, 0]) == 0


def test_the_folder_is_bounded_and_loses_what_was_not_used_for_longest(tmp_path):
    cache = EmbeddingCache(tmp_path, disk_gb=1.3 / 1024)
    for n in range(3):
        cache.put(f"{n:02d}", maps(n))
        os.utime(tmp_path / f"{n:02d}" / f"{n:02d}.safetensors", (1000 + n, 1000 + n))
    cache.get("00")
    cache.put("03", maps(3))
    assert sorted(p.stem for p in tmp_path.glob("*/*.safetensors")) == ["00", "02", "03"]


def test_values_beyond_float16_survive_the_cache():
    stored = EmbeddingCache(None).put("k", maps(1e6))
    assert float(stored.top(0)[0, 0, 0]) == pytest.approx(1e6, rel=1e-2)


def test_parts_of_a_volume_are_rounded_as_the_whole_would_be():
    small, large = torch.rand(2, 3), torch.tensor([[1.0, 2.0, 1e6]])
    joined = joined_halves([to_half(small), to_half(small + 1)])
    assert joined.dtype == torch.float16
    assert torch.equal(joined, to_half(torch.cat([small, small + 1])))
    wide = joined_halves([to_half(small), to_half(large)])
    assert wide.dtype == torch.bfloat16
    torch.testing.assert_close(wide.float(), torch.cat([small, large]), rtol=1e-2, atol=1e-3)
