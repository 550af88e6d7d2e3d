"""The folder in which named weights are kept, one file and one record each, and the way from a name to its file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nnunet_sam2.errors import InputError
from nnunet_sam2.sam2.config import UNTRAINED
from nnunet_sam2.sam2.weights.registry import ENTRIES, WeightsEntry, resembling
from nnunet_sam2.storage import file_hash, read_json, write_json

VARIABLE = "NNUNET_SAM2_WEIGHTS_CACHE"
RECORD_FORMAT = 1
PARTIAL_FOLDER = "partial"
"""Where downloads that are not finished lie."""
CHANGED = "changed"
"""How the verdict on a file begins that is not as it should be."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_ENDINGS = (".pt", ".pth", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class WeightsRecord:
    """Hold what was found out about weights when they came; from then on, nothing else is taken for them."""

    name: str
    config: str
    file: str
    """The kept safetensors file, beside the record."""
    size: int
    sha256: str
    tensors_sha256: str
    """Hash of the weights themselves, the same for a .pt and for a safetensors file of it; identifies them in runs."""
    source: str
    """Where the file came from: an address, or a path."""
    source_size: int
    source_sha256: str
    published_sha256: str | None
    """Hash of the file as the publisher serves it; None where it never was seen (a converted file was added)."""
    etag: str | None
    commit: str | None
    origin: str
    licence: str
    native_size: int
    recorded: str
    """Time, ISO 8601, UTC."""
    replaced: tuple[str, ...] = ()
    """`source_sha256` of the weights that were given up for these with --accept-changed, oldest first."""


@dataclass(frozen=True, kw_only=True)
class FoundWeights:
    """Hold what a name or a file leads to."""

    name: str
    path: Path | None
    """None for the model that needs no file."""
    entry: WeightsEntry | None = None
    record: WeightsRecord | None = None


def cache_folder() -> Path:
    """Return the folder of the kept weights; it need not exist.

    ``$NNUNET_SAM2_WEIGHTS_CACHE``, else ``nnunet_sam2/weights`` in the hub's folder for what libraries keep, which
    follows ``HF_HOME``, ``HF_ASSETS_CACHE`` and ``XDG_CACHE_HOME``.
    """
    own = os.environ.get(VARIABLE, "")
    if own:
        return Path(own).expanduser()
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "nnunet_sam2" / "weights"


def record_path(name: str) -> Path:
    """Return where the record of a name lies or would lie."""
    return cache_folder() / f"{name}.json"


def kept_path(record: WeightsRecord) -> Path:
    """Return where the file of a record lies or should lie."""
    return cache_folder() / record.file


def read_record(name: str) -> WeightsRecord | None:
    """Read the record of a name; None where there is none. Raises `InputError` for a damaged one."""
    path = record_path(name)
    if not path.is_file():
        return None
    value = read_json(path)
    known = {item.name for item in fields(WeightsRecord)}
    if not isinstance(value, Mapping) or value.get("format") != RECORD_FORMAT:
        raise InputError(f"{path} is no record of weights that this version reads; remove it and fetch {name} again")
    odd = sorted(known.symmetric_difference(value.keys() - {"format"}))
    if odd or value["name"] != name or Path(str(value["file"])).name != value["file"]:
        what = f"fields {', '.join(odd)}" if odd else "its name or file"
        raise InputError(f"{path} is a damaged record of weights ({what}); remove it and fetch {name} again")
    arguments: dict[str, Any] = {key: value[key] for key in known}
    return WeightsRecord(**{**arguments, "replaced": tuple(value["replaced"])})


def write_record(record: WeightsRecord) -> None:
    """Write a record, atomically: from here on its file is the one that is used."""
    write_json(record_path(record.name), {"format": RECORD_FORMAT, **asdict(record)})


def recorded_names() -> list[str]:
    """Return the names that have a record, sorted."""
    return sorted(path.stem for path in cache_folder().glob("*.json") if _NAME.fullmatch(path.stem))


def all_names() -> list[str]:
    """Return every name that can be asked for: those of the registry in its order, then the user's own."""
    return [*ENTRIES, *(name for name in recorded_names() if name not in ENTRIES)]


def check_name(name: str) -> None:
    """Raise `InputError` for what cannot name weights."""
    if not _NAME.fullmatch(name) or name.lower().endswith(_ENDINGS):
        raise InputError(
            f"{name!r} cannot name weights: take letters, digits, '.', '_' and '-', at most 80, without a file's ending"
        )


def known_entry(name: str) -> WeightsEntry:
    """Return what is known of a name, the user's own ones included; raise `InputError` for others."""
    if name in ENTRIES:
        return ENTRIES[name]
    record = read_record(name) if name in recorded_names() else None
    if record is None:
        meant = resembling(name, all_names())
        hint = f"did you mean {meant}? " if meant else ""
        raise InputError(f"no weights are called {name}; {hint}There are: {', '.join(all_names())}")
    return WeightsEntry(
        name=name,
        title=record.origin,
        config=record.config,
        publisher="",
        licence=record.licence,
        native_size=record.native_size,
        note="a name of your own",
    )


def state_of(entry: WeightsEntry) -> str:
    """Say whether the weights are there: with the package, there, missing, not fetched, or part of them."""
    if entry.bundled:
        there = entry.bundled_path is None or entry.bundled_path.is_file()
        return "with the package" if there else "missing"
    record = read_record(entry.name)
    if record is not None and kept_path(record).is_file():
        return "there"
    begun = sum(path.stat().st_size for path in partial_files(entry.name))
    if begun:
        return f"{begun // 1_000_000} MB so far"
    return "not fetched" if record is None else "missing"


def partial_files(name: str) -> list[Path]:
    """Return the unfinished downloads of a name."""
    pattern = re.compile(rf"{re.escape(name)}-[A-Za-z0-9]+\.part")
    return sorted(path for path in (cache_folder() / PARTIAL_FOLDER).glob("*.part") if pattern.fullmatch(path.name))


def find_weights(name_or_file: str) -> FoundWeights:
    """Find what a name or a path leads to; raise `InputError` with the way out where that is not there.

    A name goes before a file that is called the same; that file is reached by ``./NAME``.
    """
    entry = ENTRIES.get(name_or_file)
    if name_or_file == UNTRAINED:
        return FoundWeights(name=UNTRAINED, path=None, entry=entry)
    if entry is not None and entry.bundled_path is not None:
        if not entry.bundled_path.is_file():
            raise InputError(
                f"the weights of {name_or_file!r} are missing in this installation ({entry.bundled_path}); install "
                "nnunet_sam2 anew, or name other weights: nnunet_sam2 weights list"
            )
        return FoundWeights(name=name_or_file, path=entry.bundled_path, entry=entry)
    record = read_record(name_or_file) if _NAME.fullmatch(name_or_file) else None
    if record is not None and kept_path(record).is_file():
        return FoundWeights(name=name_or_file, path=kept_path(record), entry=entry, record=record)
    if entry is not None:
        raise InputError(
            f"the weights of {name_or_file} are not here ({cache_folder()}); get them with: nnunet_sam2 weights fetch "
            f"{name_or_file} (without internet: fetch on another machine and copy that folder, or nnunet_sam2 weights "
            f"add {name_or_file} FILE)"
        )
    if record is not None:
        raise InputError(
            f"{kept_path(record)}, the file of {name_or_file}, is missing; give it again: nnunet_sam2 weights add "
            f"{name_or_file} FILE (it came from {record.source})"
        )
    path = Path(name_or_file).expanduser()
    if path.is_file():
        return FoundWeights(name=path.stem, path=path)
    meant = resembling(name_or_file, all_names())
    hint = f"did you mean {meant}? " if meant else ""
    what = f"{path} is a folder, not a checkpoint" if path.is_dir() else f"no SAM 2 checkpoint at {path}"
    raise InputError(
        f"{what}, and no weights of that name; {hint}Give a file (.safetensors, .pt) or one of the names "
        f"{', '.join(all_names())}"
    )


def verify_weights(record: WeightsRecord) -> str:
    """Hash the kept file again and say what is found: OK, missing, or changed and how."""
    path = kept_path(record)
    if not path.is_file():
        return "missing"
    if path.stat().st_size != record.size:
        return f"{CHANGED}: {path.stat().st_size} bytes, {record.size} were recorded"
    return "OK" if file_hash(path) == record.sha256 else f"{CHANGED}: other content than was recorded"


def require_unchanged(record: WeightsRecord) -> None:
    """Raise `InputError` where the kept file is not as it was recorded."""
    verdict = verify_weights(record)
    if verdict != "OK":
        again = f"fetch {record.name}" if record.name in ENTRIES else f"add {record.name} FILE"
        raise InputError(
            f"{kept_path(record)}, the file of {record.name}, is not used: {verdict} on {record.recorded[:10]}; get it "
            f"anew: nnunet_sam2 weights {again}"
        )


def weights_identity(name_or_file: str) -> str:
    """Return what identifies weights in a run: the hash of a file, that of the tensors of a name, or the name."""
    found = find_weights(name_or_file)
    if found.path is None:
        return found.name
    return found.record.tensors_sha256 if found.record is not None else file_hash(found.path)
