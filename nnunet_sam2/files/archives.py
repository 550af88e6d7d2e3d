"""Unpacking a zip or tar file that somebody sent: everything is checked first, and nothing is left of a refused one."""

from __future__ import annotations

import gzip
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nnunet_sam2.errors import InputError, NnunetSam2Error, StageError
from nnunet_sam2.files.gzipped import open_stream
from nnunet_sam2.storage import atomic_folder

ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
_NESTED = (*ARCHIVE_ENDINGS, ".7z", ".rar", ".tar.bz2", ".tar.xz")
_CHUNK = 1 << 20
_ENCRYPTED = 0x1
_ZIP_MARKS = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")
"""How a zip begins, also an empty one; its first two letters alone may be those of a tar's first name."""
_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bound what an archive may unpack to."""

    files: int = 100_000
    bytes: int | None = None
    """Most bytes in all; None takes what is free on the target's disk, less a tenth."""
    ratio: int = 200
    """Most bytes in all for each byte of the archive: images shrink by 10 at most, sparse label maps by some 100."""
    ratio_from_bytes: int = 64 << 20
    """Below this size the ratio does not matter."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: str
    parts: tuple[str, ...]
    size: int
    folder: bool
    open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
    """Say whether a path is named like an archive that can be unpacked."""
    return path.name.lower().endswith(ARCHIVE_ENDINGS)


def unpack(archive: Path, target: Path, *, limits: Limits | None = None, keep_hidden: bool = False) -> int:
    """Unpack an archive into the new folder ``target``, whole or not at all, and return how many files there are.

    Files that macOS puts beside the real ones (``__MACOSX``, ``._x``, ``.DS_Store``) are left out unless
    ``keep_hidden``. Raises `InputError` for links, devices, names that lead out of the folder or that some file system
    could not tell apart, encrypted or damaged entries, archives in the archive, and more files or bytes than ``limits``
    allow; ``target`` does not exist then.
    """
    limits = limits or Limits()
    if target.exists():
        raise InputError(f"{target} exists; name a new folder to unpack {archive} into")
    if not archive.is_file():
        raise InputError(f"{archive} is no file; name the archive itself")
    with _entries(archive, limits) as entries:
        wanted = [entry for entry in entries if keep_hidden or not _is_hidden(entry.parts)]
        _check_names(archive, wanted)
        _check_sizes(archive, target, wanted, limits)
        with atomic_folder(target) as folder:
            for entry in wanted:
                place = folder.joinpath(*entry.parts)
                if entry.folder:
                    place.mkdir(parents=True, exist_ok=True)
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                _write_entry(archive, entry, place)
    return sum(not entry.folder for entry in wanted)


def only_folder(folder: Path) -> Path:
    """Return the folder that everything lies in, where there is one: archives mostly hold a single folder."""
    while True:
        inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
        if len(inside) != 1 or not inside[0].is_dir():
            return folder
        folder = inside[0]


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part == "__MACOSX" or part.startswith("._") or part == ".DS_Store" for part in parts)


@contextmanager
def _entries(archive: Path, limits: Limits) -> Iterator[list[_Entry]]:
    """Open an archive and list what is in it, each entry checked by itself."""
    with archive.open("rb") as handle:
        zipped = handle.read(4) in _ZIP_MARKS
    try:
        if zipped:
            with zipfile.ZipFile(archive) as opened:
                yield list(_zip_entries(archive, opened, limits))
        else:
            with open_stream(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as opened:
                entries = list(_tar_entries(archive, opened, limits))
                _check_tar_end(archive, opened, stream)
                yield entries
    except NnunetSam2Error:
        raise
    except (NotImplementedError, RuntimeError) as error:  # zipfile, for what it knows but cannot do
        raise InputError(f"{archive} cannot be unpacked here ({error}); unpack it yourself") from None
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        EOFError,
        zlib.error,
        gzip.BadGzipFile,
        ValueError,
        struct.error,
    ) as e:
        raise InputError(f"{archive} is damaged or no archive ({e}); copy or download it again") from None
    except OSError as error:
        raise StageError(f"{archive} could not be unpacked ({error}); nothing was left behind") from None


def _zip_entries(archive: Path, opened: zipfile.ZipFile, limits: Limits) -> Iterator[_Entry]:
    listed = opened.infolist()
    _check_count(archive, len(listed), limits)
    for info in listed:
        # What follows a zero byte is cut off by the library, but not by who looks at the list.
        name = info.orig_filename
        if info.flag_bits & _ENCRYPTED:
            raise InputError(f"{archive}: {name!r} is encrypted; unpack it yourself")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise InputError(f"{archive}: {name!r} is a link or device, not a file; pack the files themselves")
        yield _Entry(
            name=name,
            parts=_parts(archive, name),
            size=info.file_size,
            folder=info.is_dir(),
            open=lambda info=info: opened.open(info),  # type: ignore[misc]
        )


def _tar_entries(archive: Path, opened: tarfile.TarFile, limits: Limits) -> Iterator[_Entry]:
    for count, info in enumerate(opened, start=1):
        _check_count(archive, count, limits)
        if not (info.isreg() or info.isdir()) or info.issparse():
            raise InputError(f"{archive}: {info.name!r} is a link or device, not a file; pack the files themselves")
        if info.isdir() and not info.name.strip("./"):
            continue
        yield _Entry(
            name=info.name,
            parts=_parts(archive, info.name),
            size=info.size,
            folder=info.isdir(),
            open=lambda info=info: opened.extractfile(info) or _nothing(info),  # type: ignore[misc]
        )


def _nothing(info: tarfile.TarInfo) -> IO[bytes]:
    raise tarfile.TarError(f"{info.name} cannot be read")


def _check_tar_end(archive: Path, opened: tarfile.TarFile, stream: IO[bytes]) -> None:
    """Refuse an archive without its end mark, and read the compressed stream to its checksum.

    The library takes a damaged header for the end as well, and says nothing of the entries behind it.
    """
    stream.seek(opened.offset)
    end = stream.read(_BLOCK)
    if len(end) < _BLOCK or any(end):
        raise InputError(f"{archive} is {'cut off' if len(end) < _BLOCK else 'damaged'}; copy or download it again")
    while stream.read(_CHUNK):
        pass


def _check_count(archive: Path, count: int, limits: Limits) -> None:
    if count > limits.files:
        raise InputError(f"{archive} holds more than {limits.files} entries; unpack it yourself if that is meant")


def _parts(archive: Path, name: str) -> tuple[str, ...]:
    """Split an entry's name; refuse one that could lead out of a folder or that a file system cannot hold."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if (
        not parts
        or name.startswith("/")
        or ".." in parts
        or "\\" in name
        or ":" in name
        or any(ord(letter) < 32 for letter in name)
        or any(len(part.encode()) > 255 or part != part.rstrip(" .") for part in parts)
    ):
        raise InputError(f"{archive}: {name!r} does not name a file within the archive's folder; it is not unpacked")
    if parts[-1].lower().endswith(_NESTED):
        raise InputError(f"{archive}: {name!r} is an archive itself; unpack it yourself and name the folder")
    return parts


def _check_names(archive: Path, entries: Sequence[_Entry]) -> None:
    """Refuse names that are the same, or that are where upper and lower case or accents are not told apart."""
    files: dict[tuple[str, ...], str] = {}
    folders: dict[tuple[str, ...], tuple[str, ...]] = {}
    for entry in entries:
        folded = tuple(unicodedata.normalize("NFC", part).casefold() for part in entry.parts)
        for depth in range(1, len(folded) + entry.folder):
            spelled = folders.setdefault(folded[:depth], entry.parts[:depth])
            if spelled != entry.parts[:depth] or folded[:depth] in files:
                raise InputError(f"{archive}: {entry.name!r} and {'/'.join(spelled)!r} are one name twice; rename one")
        if entry.folder:
            continue
        if folded in files or folded in folders:
            twin = files.get(folded) or "/".join(folders[folded])
            raise InputError(f"{archive}: {entry.name!r} and {twin!r} are one name twice; rename one")
        files[folded] = entry.name


def _check_sizes(archive: Path, target: Path, entries: Sequence[_Entry], limits: Limits) -> None:
    total = sum(entry.size for entry in entries)
    most = limits.bytes
    if most is None:
        there = next(folder for folder in (target, *target.resolve().parents) if folder.is_dir())
        most = shutil.disk_usage(there).free * 9 // 10
    if total > most:
        raise InputError(
            f"{archive} unpacks to {total / 1e6:.0f} MB, there is room for {most / 1e6:.0f} MB at {target.parent}"
        )
    if total > limits.ratio_from_bytes and total > limits.ratio * archive.stat().st_size:
        raise InputError(
            f"{archive} unpacks to more than {limits.ratio} times its size, which no images do; unpack it yourself if "
            "it is meant"
        )


def _write_entry(archive: Path, entry: _Entry, place: Path) -> None:
    """Write one file, no longer than it was announced; the archive's checksum is checked at its end."""
    written = 0
    with entry.open() as source, place.open("xb") as handle:
        while chunk := source.read(_CHUNK):
            written += len(chunk)
            if written > entry.size:
                break
            handle.write(chunk)
    if written != entry.size:
        raise InputError(
            f"{archive}: {entry.name!r} holds other than the {entry.size} bytes that were announced; get it again"
        )
