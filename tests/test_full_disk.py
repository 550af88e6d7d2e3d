"""A full disk: every writer fails loudly, and what was there before is there still."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_sam2 import storage
from nnunet_sam2.cohort.generated import write_generated_cohort
from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.rounds.nnunet.cases import save_array
from nnunet_sam2.sam2.cache import TENSORS, EmbeddingCache
from nnunet_sam2.sam2.checkpoint import write_safetensors
from nnunet_sam2.stopping import Stopped
from nnunet_sam2.storage import TEMPORARY_MARK, atomic_folder, read_json, write_json, write_stream
from nnunet_sam2.support.library import write_probabilities
from nnunet_sam2.trainers.checkpoints import read_checkpoint, write_checkpoint
from nnunet_sam2.trainers.dataset import write_distrust
from nnunet_sam2.volumes import write_image, write_label

ROOM = 1 << 20
SHAPE = (64, 128, 128)
GRID = Geometry(shape_zyx=SHAPE)
NOISE = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)


@pytest.fixture(scope="module")
def small_disk() -> Iterator[Path]:
    """A file system of one megabyte."""
    with tempfile.TemporaryDirectory() as name:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", name], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("a small file system cannot be mounted here (it needs root)")
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


def _embeddings() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(NOISE.view(np.int8).copy()).half().reshape(4, 16, 128, 128) for name in TENSORS}


WRITERS: dict[str, tuple[str, Callable[[Path, bool], object]]] = {
    # what is written: (file name, how; False writes something small first)
    "label": ("a.nii.gz", lambda p, big: write_label(p, NOISE if big else NOISE * 0, GRID)),
    "uncompressed label": ("a.nii", lambda p, big: write_label(p, NOISE[: 64 if big else 1], _slab(64 if big else 1))),
    "image": ("a.nii.gz", lambda p, big: write_image(p, (NOISE if big else NOISE * 0)[None], GRID)),
    "picture": ("a.png", lambda p, big: write_label(p, NOISE.reshape(1, 1024, 1024) * big, Geometry(shape_zyx=_FLAT))),
    "JSON": ("a.json", lambda p, big: write_json(p, ["x" * (2 * ROOM if big else 10)])),
    "checkpoint": ("a.pth", lambda p, big: write_checkpoint(_checkpoint(big), p)),
    "probabilities": ("a.npz", lambda p, big: write_probabilities(p, (NOISE if big else NOISE * 0)[None] / 255)),
    "preprocessed array": ("a.b2nd", lambda p, big: save_array(p, (NOISE if big else NOISE * 0)[None], (64, 64, 64))),
    "distrust": ("a.b2nd", lambda p, big: write_distrust(p.parent, "a", NOISE * big, (64, 64, 64))),
    "weights": ("a.safetensors", lambda p, big: write_safetensors(p, {"w": torch.zeros(ROOM if big else 9)}, {})),
}
_FLAT = (1, 1024, 1024)


def _slab(slices: int) -> Geometry:
    return Geometry(shape_zyx=(slices, *SHAPE[1:]))


def _checkpoint(big: bool) -> dict[str, object]:
    return {"network_weights": {"w": torch.from_numpy(NOISE.ravel()[: None if big else 9])}}


@pytest.mark.parametrize("what", WRITERS)
def test_a_writer_on_a_full_disk_says_so_and_keeps_the_old_file(what: str, small_disk: Path) -> None:
    name, write = WRITERS[what]
    folder = small_disk / what.replace(" ", "_")
    folder.mkdir()
    try:
        write(folder / name, False)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert list(before) == [name]
        with pytest.raises(StageError) as caught:
            write(folder / name, True)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_an_embedding_that_finds_no_room_is_told_and_leaves_nothing(small_disk: Path) -> None:
    cache = EmbeddingCache(small_disk / "cache")
    with pytest.raises(StageError, match="could not be written"):
        cache.put("k" * 64, _embeddings())
    assert [path for path in (small_disk / "cache").rglob("*") if path.is_file()] == []


def test_a_folder_that_finds_no_room_leaves_nothing(small_disk: Path) -> None:
    with pytest.raises(StageError):
        write_generated_cohort(small_disk / "cohort", shape_zyx=(32, 96, 96))
    assert not [path for path in small_disk.iterdir() if path.name.startswith((TEMPORARY_MARK, "cohort"))]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), Stopped(signal.SIGTERM)])
def test_a_folder_that_cannot_take_its_name_leaves_the_one_before_it(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "old").write_bytes(b"1")
    replace = os.replace

    def refuse_new(source: Path, target: Path) -> None:
        if (Path(source) / "new").exists():
            raise error
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", refuse_new)
    with pytest.raises(type(error)), atomic_folder(tmp_path / "a") as folder:
        (folder / "new").write_bytes(b"2")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["a", "a/old"]


def test_a_byte_that_the_disk_loses_is_found_before_the_file_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stream(tmp_path / "a", lambda stream: stream.write(b"good"))
    flush = storage._flush

    def lose(path: Path) -> None:
        flush(path)
        if path.is_file():
            path.write_bytes(path.read_bytes().replace(b"new", b"nev"))

    monkeypatch.setattr(storage, "_flush", lose)
    with pytest.raises(StageError, match="reads back differently"):
        write_stream(tmp_path / "a", lambda stream: stream.write(b"new!"))
    assert (tmp_path / "a").read_bytes() == b"good"
    assert os.listdir(tmp_path) == ["a"]


def test_a_read_only_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(storage.os, "replace", refuse)
    with pytest.raises(StageError, match="Read-only file system; make room or choose another disk"):
        write_json(tmp_path / "a.json", {})
    assert os.listdir(tmp_path) == []


def test_json_that_no_reader_takes_is_refused_and_an_editors_mark_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "a.json") == [1]
    for odd in (b"{", b"\xff", b"1" * 5000, b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(odd)
        with pytest.raises(InputError, match=r"a\.json is not valid JSON"):
            read_json(tmp_path / "a.json")


def test_the_same_checkpoint_has_the_same_bytes_and_comes_back(tmp_path: Path) -> None:
    checkpoint = {
        "network_weights": {"w": torch.arange(5.0)},
        "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "lrs": [np.int64(3)]},
        "random": np.random.RandomState(0).get_state(),
        "flags": np.array([True, False]),
    }
    for name in ("a.pth", "b.pth"):
        write_checkpoint(checkpoint, tmp_path / name)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    back = read_checkpoint(tmp_path / "a.pth")
    assert back["logging"] == checkpoint["logging"]
    assert np.array_equal(back["random"][1], checkpoint["random"][1])
    assert np.array_equal(back["flags"], checkpoint["flags"])
