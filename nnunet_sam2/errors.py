"""The errors that a user meets: one line with what, where and the way out."""

from __future__ import annotations


class NnunetSam2Error(Exception):
    """Base of all errors that the command line shows without a traceback."""

    exit_status = 1


class InputError(NnunetSam2Error, ValueError):
    """Refuse arguments, files or settings before anything has been written."""

    exit_status = 2


class StageError(NnunetSam2Error, RuntimeError):
    """Report that a stage of a run failed after it had started; what was finished before is kept."""

    exit_status = 1
