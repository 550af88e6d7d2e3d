"""The weights that come with the package, held against the hashes of its installation."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import metadata
from pathlib import Path

from nnunet_sam2.errors import InputError
from nnunet_sam2.sam2.weights.cache import CHANGED
from nnunet_sam2.sam2.weights.registry import WeightsEntry


def verify_bundled(entry: WeightsEntry) -> str:
    """Say what is found of weights that come with the package: OK, missing, or changed since the installation.

    An installed wheel lists the hash of each of its files. A source checkout has none; its file is read as a checkpoint
    instead.
    """
    path = entry.bundled_path
    if path is None:
        return "OK: it needs no file"
    if not path.is_file():
        return "missing; install nnunet_sam2 anew"
    expected = installed_sha256(path)
    if expected is None:
        return _readable(path)
    digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
    return "OK: as installed" if digest == expected else f"{CHANGED}: not as installed; install nnunet_sam2 anew"


def header_text(path: Path) -> dict[str, str]:
    """Return the text pairs in the header of a safetensors file, without reading its tensors."""
    with path.open("rb") as handle:
        header = handle.read(int.from_bytes(handle.read(8), "little"))
    try:
        return {str(key): str(value) for key, value in json.loads(header).get("__metadata__", {}).items()}
    except (ValueError, AttributeError):
        raise InputError(
            f"{path} is a damaged safetensors file (unreadable header); install nnunet_sam2 anew"
        ) from None


def installed_sha256(path: Path) -> str | None:
    """Return the hash that the installation lists for a file, in its own notation; None where it lists none."""
    try:
        files = metadata.files("nnunet_sam2") or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == path.name and file.hash is not None and Path(str(file.locate())).resolve() == path.resolve():
            return file.hash.value if file.hash.mode == "sha256" else None
    return None


def _readable(path: Path) -> str:
    from nnunet_sam2.sam2.checkpoint import read_checkpoint

    try:
        read_checkpoint(path)
    except InputError as error:
        return f"{CHANGED}: {error}"
    return "OK: reads as a whole checkpoint (no hash to compare with in a source checkout)"
