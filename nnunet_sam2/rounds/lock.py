"""One process at a time on a run's folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunet_sam2.errors import InputError

LOCK_FILE = "run.lock"
OWNER_FILE = "run.owner"


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the folder's lock during the block; raise `InputError` naming the owner where another process has it.

    The operating system frees the lock when its owner dies, so that a killed run never has to be unlocked by hand.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / OWNER_FILE
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text(encoding="utf-8").strip() if owner.is_file() else "another process"
        raise InputError(f"{folder} is in use by {who}; wait for it or stop it") from None
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
