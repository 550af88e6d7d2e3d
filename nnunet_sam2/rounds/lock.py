"""One process at a time on a run's folder."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from nnunet_sam2.errors import InputError
from nnunet_sam2.storage import read_json, write_json

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK_FILE = "run.lock"
OWNER_FILE = "run.owner"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without locks answer."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Name the process that works on a run."""

    pid: int
    host: str
    started: float
    """Start of the process, so that another one with its number is not taken for it."""
    booted: float = field(default_factory=psutil.boot_time)
    """Start of the machine; both are moved, each time they are asked for, when the clock is set anew."""

    @classmethod
    def this(cls) -> Owner:
        """Return this process."""
        return cls(pid=os.getpid(), host=socket.gethostname(), started=psutil.Process().create_time())

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """Read who entered itself; None where nobody did or the entry is damaged."""
        try:
            value = read_json(path)
            return cls(
                pid=int(value["pid"]),
                host=str(value["host"]),
                started=float(value["started"]),
                booted=float(value.get("booted", psutil.boot_time())),
            )
        except (InputError, KeyError, TypeError, ValueError):
            return None

    @property
    def is_elsewhere(self) -> bool:
        """Return whether it runs on another machine."""
        return self.host != socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Return whether it runs on this machine."""
        try:
            process = psutil.Process(self.pid)
            after_boot = process.create_time() - psutil.boot_time()
            same = abs(after_boot - (self.started - self.booted)) < 1
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@contextmanager
def only_run(folder: Path) -> Iterator[Owner | None]:
    """Hold the folder's lock during the block; raise `InputError` naming the owner where another process has it.

    Gives the owner that ended in the middle, where there was one.

    The operating system frees the lock when its owner dies, so that a killed run never has to be unlocked by hand.
    Where a file system has no such locks, the owner's entry stands in: one of a dead process is passed over, one from
    another machine is explained.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    entry = folder / OWNER_FILE
    lock = FileLock(folder / LOCK_FILE)
    try:
        locked = acquired(lock, timeout=0)
    except Timeout:
        raise InputError(in_use(folder, Owner.read(entry))) from None
    owner = None if locked else Owner.read(entry)
    if owner is not None and (owner.is_elsewhere or owner.is_alive):
        raise InputError(in_use(folder, owner))
    try:
        left = Owner.read(entry)
        write_json(entry, vars(Owner.this()))
        yield left
    finally:
        entry.unlink(missing_ok=True)
        lock.release()


def acquired(lock: BaseFileLock, *, timeout: float = -1) -> bool:
    """Take a lock and return True; return False where the file system has none. Raises `filelock.Timeout`."""
    try:
        lock.acquire(timeout=timeout)
    except NotImplementedError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def in_use(folder: Path, owner: Owner | None) -> str:
    """Explain a lock that is held: by whom, whether that can be, and what to do."""
    if owner is None:
        return f"{folder} is in use by another process; wait for it or stop it"
    who = f"process {owner.pid} on {owner.host}"
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(owner.started))
    files = f"{folder / LOCK_FILE} and {OWNER_FILE}"
    if owner.is_elsewhere:
        return (
            f"{folder} is in use by {who}, another machine, since {since}; wait for it or stop it there. "
            f"If that machine is gone for good, remove {files}"
        )
    if owner.is_alive:
        return f"{folder} is in use by {who} since {since}; wait for it or stop it"
    return (
        f"{folder} is locked by {who}, which no longer runs: a stale lock, kept by the file system or by a process "
        f"that it started; end that one, or remove {files}"
    )
