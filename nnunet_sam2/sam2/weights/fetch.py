"""Named weights from the Hugging Face hub: asked for, downloaded with resumption, held against what is known."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nnunet_sam2.errors import InputError, NnunetSam2Error, StageError
from nnunet_sam2.progress import bar_options
from nnunet_sam2.sam2 import checkpoint as reading
from nnunet_sam2.sam2.weights.adopt import Provenance, adopt, check_file_hash, weights_lock
from nnunet_sam2.sam2.weights.cache import (
    PARTIAL_FOLDER,
    VARIABLE,
    WeightsRecord,
    cache_folder,
    known_entry,
    partial_files,
    read_record,
    verify_weights,
)
from nnunet_sam2.sam2.weights.registry import WeightsEntry
from nnunet_sam2.storage import file_hash

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TRUE = {"1", "ON", "YES", "TRUE"}
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRIES = 2
"""How often a download is begun again without one more byte having come."""
_WAIT_SECONDS = 1.0
_RANGE_REFUSED = 416
_NO_ACCESS = (401, 403)


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Hold the weights and what was done for them: fetched, taken from the hub's cache, or there already."""

    record: WeightsRecord
    done: str


@dataclass(frozen=True, kw_only=True)
class _Announced:
    """Hold what the origin says of the file before it is downloaded."""

    endpoint: str
    url: str
    commit: str
    etag: str
    size: int | None

    @property
    def sha256(self) -> str | None:
        """Return the hash of the file where the hub stores it by its hash, as it does large files."""
        return self.etag if _SHA256.fullmatch(self.etag) else None


def fetch_weights(name: str, *, accept_changed: bool = False) -> Fetched:
    """Download named weights, or continue to, check them and keep them as safetensors.

    Where they are there, the origin is asked whether it serves the same file still. Raises `InputError` for a name
    without origin, for a file that is not what was recorded or published (unless ``accept_changed``), and for one that
    is no checkpoint of this architecture; `StageError` where the origin cannot be reached or breaks off: what has come
    is kept, and the same call goes on from there.
    """
    entry = _fetchable(name)
    with weights_lock(name):
        record = read_record(name)
        there = record if record is not None and verify_weights(record) == "OK" else None
        if is_offline():
            return _offline(entry, there, accept_changed=accept_changed)
        try:
            announced = _ask(entry)
        except StageError as error:
            if there is None or accept_changed:
                raise
            return Fetched(record=there, done=f"is there; whether it changed at its origin is not known: {error}")
        if there is not None and announced.etag in (there.etag, there.published_sha256):
            return Fetched(record=there, done="is there and unchanged at its origin")
        if announced.sha256 is not None and not accept_changed:
            check_file_hash(name, sha256=announced.sha256, size=announced.size, where=announced.url)
        return _get(entry, announced, accept_changed=accept_changed)


def is_offline() -> bool:
    """Tell whether the user's environment forbids the hub's library the network."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or any(os.environ.get(name, "").upper() in _TRUE for name in _OFFLINE_VARIABLES)


def _fetchable(name: str) -> WeightsEntry:
    entry = known_entry(name)
    if entry.bundled:
        raise InputError(f"{name} needs no fetching: it comes with the package")
    if entry.repo is None:
        raise InputError(f"{name} is a name of your own; its weights come from: nnunet_sam2 weights add {name} FILE")
    return entry


def _offline(entry: WeightsEntry, there: WeightsRecord | None, *, accept_changed: bool) -> Fetched:
    from huggingface_hub import try_to_load_from_cache

    if there is not None:
        return Fetched(record=there, done="is there; its origin was not asked, for the environment says offline")
    found = try_to_load_from_cache(str(entry.repo), str(entry.file))
    if isinstance(found, str):
        return _from_hub_cache(entry, Path(found), announced=None, accept_changed=accept_changed)
    named = next((v for v in _OFFLINE_VARIABLES if os.environ.get(v, "").upper() in _TRUE), _OFFLINE_VARIABLES[0])
    raise InputError(
        f"{entry.name} is not here, and {named} forbids to download it; unset the variable, or fetch on another "
        f"machine and copy the folder {cache_folder()}, or download {entry.file} from {entry.page} and: "
        f"nnunet_sam2 weights add {entry.name} FILE"
    )


def _from_hub_cache(entry: WeightsEntry, file: Path, *, announced: _Announced | None, accept_changed: bool) -> Fetched:
    given = Provenance(
        source=f"the hub's cache, {file}",
        origin=_origin(entry, file.parent.name),
        licence=entry.licence,
        etag=announced.etag if announced is not None else None,
        commit=file.parent.name,
    )
    return Fetched(record=adopt(entry.name, file, given, accept_changed=accept_changed), done="was in the hub's cache")


def _origin(entry: WeightsEntry, commit: str) -> str:
    return f"{entry.title} by {entry.publisher}, {entry.repo} at {commit[:8]}"


def _ask(entry: WeightsEntry) -> _Announced:
    """Ask the origin for the file's present hash and size."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT
    repo, file = str(entry.repo), str(entry.file)
    with _told(entry, endpoint):
        metadata = get_hf_file_metadata(
            hf_hub_url(repo, file, endpoint=endpoint), timeout=constants.HF_HUB_ETAG_TIMEOUT, endpoint=endpoint
        )
    if metadata.commit_hash is None or metadata.etag is None:
        raise StageError(
            f"{endpoint} answers, but not as the Hugging Face hub does: a proxy or a login page may stand between, or "
            f"HF_ENDPOINT is wrong; {_other_ways(entry)}"
        )
    return _Announced(
        endpoint=endpoint,
        # The commit's own address: what was announced is what is downloaded, even if a new file comes in between.
        url=hf_hub_url(repo, file, revision=metadata.commit_hash, endpoint=endpoint),
        commit=metadata.commit_hash,
        etag=metadata.etag,
        size=metadata.size,
    )


def _get(entry: WeightsEntry, announced: _Announced, *, accept_changed: bool) -> Fetched:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(entry.repo), str(entry.file), revision=announced.commit)
    if isinstance(found, str) and announced.sha256 in (None, file_hash(Path(found))):
        return _from_hub_cache(entry, Path(found), announced=announced, accept_changed=accept_changed)
    mark = re.sub(r"[^A-Za-z0-9]", "", announced.etag)[:16]
    part = cache_folder() / PARTIAL_FOLDER / f"{entry.name}-{mark}.part"
    for other in partial_files(entry.name):
        if other != part:
            other.unlink()
    _download(entry, announced, part)
    given = Provenance(
        source=announced.url,
        origin=_origin(entry, announced.commit),
        licence=entry.licence,
        etag=announced.etag,
        commit=announced.commit,
    )
    try:
        _check_download(announced, part)
        record = adopt(entry.name, part, given, accept_changed=accept_changed)
    except NnunetSam2Error as error:
        # In the user's words: what was downloaded, not the temporary name that it went by.
        raise type(error)(str(error).replace(str(part), announced.url)) from None
    finally:
        part.unlink(missing_ok=True)
    return Fetched(record=record, done="fetched")


def _download(entry: WeightsEntry, announced: _Announced, part: Path) -> None:
    """Download into ``part``, from where an earlier download broke off."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.is_file() else 0
    if announced.size is not None:
        if have > announced.size:
            part.unlink()
            have = 0
        # The download and, beside it, its conversion.
        needed, free = 2 * announced.size - have, shutil.disk_usage(part.parent).free
        if free < needed:
            raise StageError(
                f"{part.parent} has room for {free // 1_000_000} MB, {needed // 1_000_000} MB are needed for "
                f"{entry.name}; make room, or name another folder in the variable {VARIABLE}"
            )
    with _told(entry, announced.endpoint, part=part, size=announced.size):
        tries = _TRIES
        while True:
            have = part.stat().st_size if part.is_file() else 0
            try:
                with part.open("ab") as handle:
                    http_get(
                        announced.url,
                        handle,
                        resume_size=have,
                        headers=build_hf_headers(),
                        expected_size=announced.size,
                        displayed_filename=entry.file,
                        tqdm_class=_bar(),
                    )
                return
            except OSError:  # an answer that no repetition changes, or the disk
                raise
            except Exception:  # the library itself repeats after some kinds of broken connections, not after all
                came = part.stat().st_size > have
                tries = _TRIES if came else tries - 1
                if tries == 0:
                    raise
                time.sleep(_WAIT_SECONDS)


def _bar() -> Any:
    """Return the progress bar of this project for the hub's library, silent where its variable says so."""
    from huggingface_hub import constants
    from tqdm import tqdm

    return partial(tqdm, disable=bool(constants.HF_HUB_DISABLE_PROGRESS_BARS), **bar_options())


def _check_download(announced: _Announced, part: Path) -> None:
    """Hold what has come against what was announced; first its kind, for that says most."""
    reading.check_file_kind(part)
    if announced.sha256 is not None:
        sha256 = file_hash(part)
        if sha256 != announced.sha256:
            raise StageError(
                f"{part} was damaged on its way: sha256 {sha256} instead of the announced {announced.sha256}; it was "
                f"thrown away, fetch again"
            )


@contextmanager
def _told(entry: WeightsEntry, endpoint: str, *, part: Path | None = None, size: int | None = None) -> Iterator[None]:
    """Turn what the hub's library raises into one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except NnunetSam2Error:
        raise
    except errors.GatedRepoError:
        raise StageError(
            f"{entry.repo} is gated: accept its terms at {entry.page}, then run 'hf auth login' or set HF_TOKEN, and "
            f"fetch again"
        ) from None
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError):
        raise StageError(
            f"{entry.repo} at {endpoint} has no file {entry.file} (any more); {_other_ways(entry)}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise StageError(
            f"{endpoint} has no repository {entry.repo}, or shows it to its members only; with an account: run "
            f"'hf auth login' or set HF_TOKEN; {_other_ways(entry)}"
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", "an error")
        if status == _RANGE_REFUSED and part is not None:
            part.unlink(missing_ok=True)
        if status in _NO_ACCESS:
            advice = f"no access with this account or token: 'hf auth login', or set HF_TOKEN; {_other_ways(entry)}"
        else:
            advice = f"fetch again later{_kept(part, size)}"
        raise StageError(f"{endpoint} answered {status} for {entry.repo}; {advice}") from None
    except Exception as error:  # the HTTP library's own types differ between versions of the hub's
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the network
        if part is not None and part.is_file():
            _throw_away_garbage(entry, endpoint, part, size)
        what = f"{endpoint} could not be read ({_shown(error)})"
        if isinstance(error, OSError) and part is not None and part.is_file():  # the library's own check of the length
            what = f"{endpoint} sent {part.stat().st_size} bytes of {entry.file}, announced were {size}"
        raise StageError(f"{what}{_kept(part, size)}; {_other_ways(entry)}") from None


def _throw_away_garbage(entry: WeightsEntry, endpoint: str, part: Path, size: int | None) -> None:
    """Remove what came but is not the beginning of a checkpoint, such as a web page, and say what it is."""
    there = part.stat().st_size
    if there and (is_no_checkpoint := reading.foreign_kind(part)):
        part.unlink()
        raise StageError(
            f"{endpoint} did not send {entry.file} but {is_no_checkpoint}; open {entry.page} in a browser to see why"
        )
    if size is not None and there > size:
        part.unlink()


def _kept(part: Path | None, size: int | None) -> str:
    if part is None or not part.is_file() or part.stat().st_size == 0:
        return ""
    of = f" of {size / 1e6:.1f}" if size is not None else ""
    return f"; {part.stat().st_size / 1e6:.1f}{of} MB are kept, the same command goes on from there"


def _other_ways(entry: WeightsEntry) -> str:
    return (
        f"another way: download {entry.file} from {entry.page} by other means, then nnunet_sam2 weights add "
        f"{entry.name} FILE"
    )


def _shown(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
