"""The errors that a user meets: one line with what, where and the way out."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence


class NnunetSam2Error(Exception):
    """Base of all errors that the command line shows without a traceback."""

    exit_status = 1


class InputError(NnunetSam2Error, ValueError):
    """Refuse arguments, files or settings before anything has been written."""

    exit_status = 2


class StageError(NnunetSam2Error, RuntimeError):
    """Report that a stage of a run failed after it had started; what was finished before is kept."""

    exit_status = 1


def refuse_all(refusals: Sequence[str], *, of: int, what: str, tell: Callable[[str], object]) -> None:
    """Raise `InputError` where anything was refused: one refusal as it is, of several each told in a line before."""
    if len(refusals) > 1:
        for number, text in enumerate(refusals, start=1):
            tell(f"refused {number}: {text}")
        raise InputError(
            f"{len(refusals)} of {of} {what} cannot be used, each is named above with the way out; the first: "
            f"{refusals[0]}"
        )
    if refusals:
        raise InputError(refusals[0])


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
DISK_REFUSALS = (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EMFILE, errno.EIO)
"""Errors of the operating system that are nobody's programming mistake: shown in one line."""


def describe_os_error(error: OSError) -> str:
    """Say in one line what the operating system refused, where, and the way out."""
    where = f"{error.filename}: " if error.filename else ""
    what = error.strerror or str(error) or type(error).__name__
    ways_out = {
        errno.ENOSPC: "the disk is full; make room",
        errno.EDQUOT: "your disk quota is used up; make room",
        errno.EROFS: "the folder is read-only; make it writable or use another",
        errno.EFBIG: "the disk takes no file of this size; use another",
        errno.EACCES: "the right to do so is missing; give it, or use another folder",
        errno.EPERM: "the right to do so is missing; give it, or use another folder",
        errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
        errno.EIO: "the disk failed; look at the system's log",
    }
    way_out = ways_out.get(error.errno or 0, "mend it")
    return f"{where}{what}: {way_out} and give the same command again; what was finished is kept"
