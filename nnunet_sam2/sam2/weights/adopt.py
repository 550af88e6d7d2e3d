"""A checkpoint file becomes named weights: checked, converted to safetensors, recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.sam2 import checkpoint as reading
from nnunet_sam2.sam2.config import ModelConfig, load_config
from nnunet_sam2.sam2.model import build_model, load_weights
from nnunet_sam2.sam2.weights.cache import (
    VARIABLE,
    WeightsRecord,
    all_names,
    cache_folder,
    check_name,
    kept_path,
    read_record,
    write_record,
)
from nnunet_sam2.sam2.weights.registry import ENTRIES, SEE_ORIGIN, WeightsEntry
from nnunet_sam2.storage import TEMPORARY_MARK, file_hash

_CHECK_SIZE = 64
"""Image size at which a model is built to hold weights against: shapes do not depend on it."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Hold where a file came from and what is said of it."""

    source: str
    origin: str
    licence: str
    etag: str | None = None
    commit: str | None = None


def add_weights(
    name: str, file: Path, *, origin: str | None = None, licence: str | None = None, accept_changed: bool = False
) -> WeightsRecord:
    """Adopt a user's checkpoint file under a name; the file itself is left alone.

    A name of the registry takes the file that the publisher serves, or the weights that were recorded before, in any
    format; every other name is the user's own. Raises `InputError` for what is no checkpoint, does not fit the name, or
    differs from what is on record.
    """
    check_name(name)
    entry = ENTRIES.get(name)
    if entry is not None and entry.bundled:
        raise InputError(f"{name} comes with the package and cannot be replaced; take another name")
    twin = next((other for other in all_names() if other != name and other.lower() == name.lower()), None)
    if twin is not None:
        raise InputError(f"{name} differs from {twin} in upper and lower case only; take another name")
    file = file.expanduser()
    reading.check_file_kind(file)
    given = Provenance(
        source=str(file.resolve()),
        origin=origin or (f"{entry.title}, {entry.publisher}" if entry is not None else f"{name}, from {file.name}"),
        licence=licence or (entry.licence if entry is not None else SEE_ORIGIN),
    )
    with weights_lock(name):
        return adopt(name, file, given, accept_changed=accept_changed)


def adopt(name: str, file: Path, given: Provenance, *, accept_changed: bool) -> WeightsRecord:
    """Check a file against all that is known of a name, keep its weights as safetensors, and record them.

    The record is written last: until then the earlier weights, if any, stay in use. Call it under `weights_lock`.
    """
    entry, before = ENTRIES.get(name), read_record(name)
    as_published = reading.check_file_kind(file) != "safetensors"
    size, sha256 = file.stat().st_size, file_hash(file)
    if before is None and not accept_changed:
        check_file_hash(name, sha256=sha256, size=size, where=str(file))
    stored = reading.read_tensors(file)
    tensors_sha256 = reading.digest(stored.state)
    # The same weights are welcome in any format, so a record is held against the tensors, not against the file.
    unchanged = before is not None and before.tensors_sha256 == tensors_sha256
    if before is not None and not unchanged and not accept_changed:
        raise InputError(_other_than(before, sha256=sha256, where=str(file)))
    config = _check_architecture(file, stored, entry)
    record = WeightsRecord(
        name=name,
        config=config.name,
        file=f"{name}-{tensors_sha256[:12]}.safetensors",
        size=0,
        sha256="",
        tensors_sha256=tensors_sha256,
        source=given.source,
        source_size=size,
        source_sha256=sha256,
        published_sha256=sha256 if as_published else before.published_sha256 if before and unchanged else None,
        etag=given.etag,
        commit=given.commit,
        origin=given.origin,
        licence=given.licence,
        native_size=entry.native_size if entry is not None else config.native_size,
        recorded=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        replaced=() if before is None else before.replaced if unchanged else (*before.replaced, before.source_sha256),
    )
    record = _keep(record, stored)
    if before is not None and before.file != record.file:
        kept_path(before).unlink(missing_ok=True)
    return record


def check_file_hash(name: str, *, sha256: str, size: int | None, where: str) -> None:
    """Raise `InputError` where a published file is not the recorded one, or not the one that the publisher names."""
    entry, before = ENTRIES.get(name), read_record(name)
    if before is not None:
        if before.published_sha256 not in (None, sha256):
            raise InputError(_other_than(before, sha256=sha256, where=where))
        return
    if entry is None or entry.sha256 in (None, sha256):
        return
    bytes_there = f"{size} bytes, " if size is not None else ""
    bytes_wanted = f"{entry.size} bytes, " if entry.size is not None else ""
    raise InputError(
        f"{name}: {where} ({bytes_there}sha256 {sha256}) is not the file that {entry.publisher} names "
        f"({bytes_wanted}sha256 {entry.sha256}); get that one from {entry.page}, or give this one a name of your own "
        f"(nnunet_sam2 weights add NAME FILE). If {entry.publisher} replaced the file: --accept-changed"
    )


@contextmanager
def weights_lock(name: str) -> Iterator[None]:
    """Let one process at a time change the weights of a name; raise `StageError` where another does so."""
    folder = cache_folder()
    leftover = re.compile(rf"{TEMPORARY_MARK}[0-9a-f]+_{re.escape(name)}(-[0-9a-f]{{12}}\.safetensors|\.json)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock", timeout=0):
            for path in folder.iterdir():
                if leftover.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            yield
    except Timeout:
        raise StageError(f"another process is fetching or adding {name} in {folder}; wait until it is done") from None
    except OSError as error:
        raise StageError(
            f"{error.filename or folder}: {error.strerror or error}; make room, or name another folder in the variable "
            f"{VARIABLE}"
        ) from None


def _keep(record: WeightsRecord, stored: reading.StoredTensors) -> WeightsRecord:
    path = kept_path(record)
    told = {key: str(getattr(record, key)) for key in ("name", "config", "origin", "licence", "source_sha256")}
    reading.write_safetensors(path, stored.state, told)
    record = replace(record, size=path.stat().st_size, sha256=file_hash(path))
    write_record(record)
    return record


def _other_than(before: WeightsRecord, *, sha256: str, where: str) -> str:
    stays = "; those stay in use" if kept_path(before).is_file() else ""
    return (
        f"{before.name}: {where} (sha256 {sha256}) holds other weights than were recorded on {before.recorded[:10]} "
        f"from {before.source} (sha256 {before.published_sha256 or before.source_sha256}){stays}. If the new ones are "
        f"wanted for good: --accept-changed"
    )


def _check_architecture(file: Path, stored: reading.StoredTensors, entry: WeightsEntry | None) -> ModelConfig:
    """Hold the name and shape of every tensor against the architecture, before anything relies on them."""
    config = reading.recognise(reading.Checkpoint(path=file, sha256="", state=stored.state, metadata=stored.metadata))
    if entry is not None and config.name != entry.config:
        raise InputError(
            f"{file} holds weights of {config.title}, but {entry.name} is {load_config(entry.config).title}; give the "
            f"file {entry.file} of {entry.page}"
        )
    has_memory = load_weights(build_model(config, _CHECK_SIZE), stored.state, where=str(file))
    if entry is not None and not has_memory:
        raise InputError(
            f"{file} holds the image parts alone, the published {entry.name} has the video memory as well; give it a "
            f"name of your own"
        )
    return config
