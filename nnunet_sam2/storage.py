"""Files that are there whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import UnsupportedOperation
from pathlib import Path
from typing import Any, BinaryIO

from nnunet_sam2.errors import DISK_FULL, InputError, StageError

_CHUNK_BYTES = 1 << 20
TEMPORARY_MARK = ".nnunet_sam2_tmp_"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name when the block ends without an error.

    The temporary name keeps the file's ending, because writers choose a format by it. It is flushed to disk before
    the rename, so that a file that is visible under its own name is whole. Raises `StageError` for a full or read-only
    disk; the earlier file is there still.
    """
    with _told_of_a_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMPORARY_MARK}{uuid.uuid4().hex[:12]}_{path.name}")
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that replaces it when the block ends without an error."""
    with _told_of_a_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, aside = (path.with_name(f"{TEMPORARY_MARK}{uuid.uuid4().hex[:12]}_{path.name}") for _ in range(2))
        temporary.mkdir()
        try:
            yield temporary
            for written in sorted(temporary.rglob("*")):
                _flush(written)
            if path.exists():
                # Out of the way in one step: to remove a large folder first would leave neither for long.
                os.replace(path, aside)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            # Whatever came between, a signal as well.
            if aside.exists() and not path.exists():
                os.replace(aside, path)
            for left in (aside, temporary):
                shutil.rmtree(left, ignore_errors=True)


def write_stream(path: Path, write: Callable[[Any], object]) -> None:
    """Let ``write`` fill a stream that becomes ``path`` atomically, once the disk's content was read and compared.

    The stream takes bytes and cannot be read or wound back. Raises `StageError` where other bytes come back.
    """
    with atomic_path(path) as temporary:
        with temporary.open("wb") as handle:
            stream = _HashedStream(handle)
            try:
                write(stream)
                stream.flush()
            except Exception:
                if stream.failure is not None:
                    raise stream.failure from None  # torch raises something else on the way out
                raise
        _flush(temporary)
        if file_hash(temporary) != stream.digest.hexdigest():
            raise StageError(f"{path}: what was written reads back differently; check the disk. Nothing was replaced")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8, and read back before it takes its name."""
    write_stream(path, lambda stream: stream.write(text.encode()))


class _HashedStream:
    """Pass bytes on to a file and hash them on the way."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self.digest = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``."""
        self.digest.update(data)
        try:
            self._handle.write(data)
        except OSError as error:
            self.failure = error
            raise
        return memoryview(data).nbytes

    def read(self, *_: object) -> bytes:
        """Refuse: numpy asks only whether there is such a method."""
        raise UnsupportedOperation("this stream is for writing")

    def flush(self) -> None:
        """Pass on what is held back."""
        self._handle.flush()


@contextmanager
def _told_of_a_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise StageError(
            f"{path} could not be written: {error.strerror}; make room or choose another disk. What was there before "
            "is there still, and the same command continues"
        ) from None


def _flush(path: Path) -> None:
    """Have the disk hold a file or a folder's list of names."""
    if path.is_dir() and os.name == "nt":
        return  # Windows flushes no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON, atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read the JSON file ``path``; raise `InputError` naming it where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a mark before the text
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, not a JSON file; name the file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); restore or remove it") from None


def file_hash(path: Path) -> str:
    """Compute the sha256 of a file's bytes, as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def value_hash(value: Any) -> str:
    """Compute the sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def remove_temporary_files(folder: Path) -> list[Path]:
    """Remove what killed writers left under ``folder`` and return the removed paths."""
    removed = []
    for path in sorted(folder.rglob(f"{TEMPORARY_MARK}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        removed.append(path)
    return removed
