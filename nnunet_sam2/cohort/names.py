"""Names that may become files: case ids from an allow-list, paths that stay within their root."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from nnunet_sam2.errors import InputError

CASE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
MOST_LETTERS = 120
_RESERVED = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)), *(f"lpt{i}" for i in range(1, 10))}


def is_case_id(text: str) -> bool:
    """Say whether every file system and nnU-Net can hold a file of this name."""
    return bool(
        CASE_ID.fullmatch(text)
        and len(text) <= MOST_LETTERS
        and text.split(".")[0].lower() not in _RESERVED
        and not text.endswith(".")
    )


def checked_case_id(value: Any, *, where: object = None) -> str:
    """Return a case id; raise `InputError` for anything that some file system or nnU-Net would stumble over."""
    if not isinstance(value, str) or not is_case_id(value):
        prefix = f"{where}: " if where is not None else ""
        raise InputError(
            f"{prefix}{value!r} cannot be a case id (letters, digits, '_', '-', '.', not at the start; at most "
            f"{MOST_LETTERS}; no reserved name); rename the file"
        )
    return value


def within_root(value: Any) -> str:
    """Return a relative path as it is written in a file of ours; raise `InputError` where it could lead elsewhere."""
    path = PurePosixPath(value) if isinstance(value, str) else None
    if (
        path is None
        or not value
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in value
        or any(ord(letter) < 32 for letter in value)
        or re.match(r"[A-Za-z]:", value)
    ):
        raise InputError(f"{value!r} is no path within the dataset's folder")
    return str(value)
