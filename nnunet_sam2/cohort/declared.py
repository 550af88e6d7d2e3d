"""The ``dataset.json`` that people put beside their images: read where it is one, refused where it is anything else."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from nnunet_sam2.errors import InputError
from nnunet_sam2.storage import read_json

DATASET_FILE = "dataset.json"


def is_declared(path: Path) -> bool:
    """Say whether something lies at a path that is taken for a ``dataset.json``; refuse what cannot be read as a file.

    A link to nowhere, a pipe or a device would be passed over or waited for, and classes made up in its place.
    """
    if not os.path.lexists(path):
        return False
    try:
        mode = path.stat().st_mode
    except OSError:
        raise InputError(f"{path} is a link to nothing that can be reached; mend or remove it") from None
    if not stat.S_ISREG(mode):
        kind = "is a folder" if stat.S_ISDIR(mode) else "is no file"
        raise InputError(f"{path} {kind}; put the JSON file there, or remove it")
    return True


def read_declared(path: Path) -> dict[str, Any] | None:
    """Read a ``dataset.json``; None where there is none. Raises `InputError` where it holds anything but an object."""
    if not is_declared(path):
        return None
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f'{path} holds no JSON object like {{"labels": {{"liver": 1}}}}; correct or remove it')
    return value
