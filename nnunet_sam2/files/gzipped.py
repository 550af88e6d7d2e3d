"""Files that may be gzipped, told by their first bytes and not by their names."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def is_gzipped(path: Path) -> bool:
    """Say whether a file begins as gzip does."""
    with path.open("rb") as handle:
        return handle.read(2) == b"\x1f\x8b"


@contextmanager
def open_stream(path: Path) -> Iterator[IO[bytes]]:
    """Open a file's bytes, inflated where it is gzipped: a `gzip.GzipFile` then."""
    with gzip.open(path) if is_gzipped(path) else path.open("rb") as stream:
        yield stream  # type: ignore[misc]
