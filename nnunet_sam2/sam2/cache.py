"""Embeddings kept between uses: each slice is encoded once for all supports, classes, directions and rounds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nnunet_sam2.errors import StageError
from nnunet_sam2.storage import TEMPORARY_MARK, atomic_path

TENSORS = ("high_quarter", "high_eighth", "top")
"""Names of the stored feature maps: strides 4, 8 and 16."""

_FORMAT = 1


class StoredEmbeddings:
    """Hold the features of N frames in half precision, in memory or in a file that is read frame by frame."""

    def __init__(self, *, key: str, tensors: Mapping[str, torch.Tensor] | None, path: Path | None) -> None:
        if tensors is None and path is None:
            raise ValueError("embeddings need tensors or a file")
        self.key = key
        self._tensors = dict(tensors) if tensors is not None else None
        self._path = path
        self._file: Any = None
        if tensors is None:
            self._open()  # now, because an open file stays readable when another process prunes the folder

    def __len__(self) -> int:
        if self._tensors is not None:
            return int(self._tensors["top"].shape[0])
        return int(self._open().get_slice("top").get_shape()[0])

    def top(self, index: int) -> torch.Tensor:
        """Return frame ``index``'s coarsest features, (C, H, W) float32, on the CPU."""
        return self._frame("top", index)

    def high(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the decoder's skip features of one frame, (C/8, 4H, 4W) and (C/4, 2H, 2W) float32, on the CPU."""
        return self._frame("high_quarter", index), self._frame("high_eighth", index)

    @property
    def memory_bytes(self) -> int:
        """Return how much memory the features take; zero where they are read from a file."""
        return sum(t.numel() * t.element_size() for t in self._tensors.values()) if self._tensors is not None else 0

    def release(self) -> None:
        """Let go of the memory where a file holds the same."""
        if self._path is not None and self._path.is_file():
            self._open()
            self._tensors = None

    def _frame(self, name: str, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        stored = self._tensors[name] if self._tensors is not None else self._open().get_slice(name)
        frame: torch.Tensor = stored[index]
        return frame.float()

    def _open(self) -> Any:
        if self._file is None:
            from safetensors import safe_open

            self._file = safe_open(self._path, framework="pt", device="cpu")
        return self._file


class EmbeddingCache:
    """Keep embeddings by key, the latest in memory and all in a folder.

    ``memory_mb`` bounds what lies in memory, ``disk_gb`` what lies in the folder: the files that were not used for
    longest go first. Without a folder, embeddings last as long as memory or the caller keeps them. Files are whole or
    absent, and one whose content does not have the hash that it was written with is removed and counts as absent.
    """

    def __init__(self, folder: Path | None, *, memory_mb: int = 1024, disk_gb: float = 50.0) -> None:
        self.folder = folder
        self._memory_bytes = memory_mb * 2**20
        self._disk_bytes = int(disk_gb * 2**30)
        self._latest: OrderedDict[str, StoredEmbeddings] = OrderedDict()

    def get(self, key: str) -> StoredEmbeddings | None:
        """Return the embeddings kept under ``key``, or None."""
        found = self._latest.get(key)
        if found is None and self.folder is not None:
            path = self._path(key)
            if path.is_file():
                if _is_sound(path, key):
                    found = StoredEmbeddings(key=key, tensors=None, path=path)
                else:
                    path.unlink(missing_ok=True)
        if found is not None:
            with contextlib.suppress(OSError):  # the time of last use only decides what is pruned first
                if self.folder is not None:
                    os.utime(self._path(key))
            self._remember(key, found)
        return found

    def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> StoredEmbeddings:
        """Keep feature maps (N, C, H, W), named as in `TENSORS`, and return them as they will be read from now on.

        What is not in half precision yet is rounded to it.
        """
        halves = (torch.float16, torch.bfloat16)
        kept = {name: t if (t := tensors[name]).dtype in halves else to_half(t) for name in TENSORS}
        path = None
        if self.folder is not None:
            path = self._path(key)
            _write(path, key, kept)
            self._prune(keep=path)
        stored = StoredEmbeddings(key=key, tensors=kept, path=path)
        self._remember(key, stored)
        return stored

    def _path(self, key: str) -> Path:
        if self.folder is None:
            raise ValueError("the cache has no folder")
        return self.folder / key[:2] / f"{key}.safetensors"

    def _remember(self, key: str, stored: StoredEmbeddings) -> None:
        self._latest[key] = stored
        self._latest.move_to_end(key)
        while sum(item.memory_bytes for item in self._latest.values()) > self._memory_bytes and len(self._latest) > 1:
            _, oldest = self._latest.popitem(last=False)
            oldest.release()

    def _prune(self, keep: Path) -> None:
        if self.folder is None:
            return
        files = []
        for path in self.folder.glob("*/*.safetensors"):
            with contextlib.suppress(OSError):  # another process may prune the same folder
                if not path.name.startswith(TEMPORARY_MARK):
                    status = path.stat()
                    files.append((status.st_mtime, path, status.st_size))
        total = sum(size for _, _, size in files)
        for _, path, size in sorted(files):
            if total <= self._disk_bytes:
                break
            if path != keep:
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= size


def to_half(tensor: torch.Tensor) -> torch.Tensor:
    """Round to float16 on the CPU, or to bfloat16 where a value exceeds float16's range."""
    dtype = torch.float16 if float(tensor.abs().max()) < torch.finfo(torch.float16).max else torch.bfloat16
    return tensor.detach().to(dtype).cpu().contiguous()


def joined_halves(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join parts that `to_half` has rounded one by one; in bfloat16 where one of them needs its range."""
    wide = any(part.dtype == torch.bfloat16 for part in parts)
    return torch.cat([part.to(torch.bfloat16) for part in parts] if wide else list(parts))


def _write(path: Path, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # One entry holds everything, because safetensors does not keep several in a fixed order.
    record = {"format": _FORMAT, "key": key, "sha256": _digest(tensors)}
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata={"embeddings": json.dumps(record, sort_keys=True)})
        except SafetensorError as error:
            raise StageError(f"{path} could not be written ({error}); make room or name another folder") from None
        if not _is_sound(temporary, key):
            raise StageError(f"{path}: what was written reads back differently; check the disk")


def _is_sound(path: Path, key: str) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            record = json.loads((handle.metadata() or {}).get("embeddings", "{}"))
            if record.get("format") != _FORMAT or record.get("key") != key:
                return False
            return bool(record["sha256"] == _digest({name: handle.get_tensor(name) for name in TENSORS}))
    except (SafetensorError, OSError, ValueError, KeyError):
        return False


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in TENSORS:
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
