"""Why a child process failed, read from how it ended and from what it said last."""

from __future__ import annotations

import re
import signal
from enum import Enum
from pathlib import Path

from nnunet_sam2.errors import InputError, StageError


class Cause(str, Enum):
    """Name why a child process failed, as far as that can be told."""

    DEVICE_MEMORY = "the GPU ran out of memory"
    KILLED = "killed, most likely out of memory"
    WORKERS = "a worker process died, most likely out of memory"
    SHARED_MEMORY = "shared memory ran out"
    HUNG = "no sign of life"
    DISK_FULL = "the disk is full"
    CHECKPOINT = "the latest checkpoint was damaged"
    UNKNOWN = "failed"


_SAYS = (
    (
        Cause.DEVICE_MEMORY,
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|_ALLOC_FAILED|MPS backend out",
    ),
    (Cause.SHARED_MEMORY, r"/dev/shm|shared memory \(shm\)|[Bb]us error"),
    (Cause.DISK_FULL, r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed|wrote only \d+ of"),
    (Cause.WORKERS, r"6 feet under|background workers? (is|are) no longer alive|[Ss]omeone died|worker .* killed by"),
)
"""What the log's end says, by cause; the first that fits."""

_WAYS_OUT = {
    Cause.DEVICE_MEMORY: "free the GPU's memory, or run with --device cpu",
    Cause.KILLED: "close other programs, or use a machine with more memory",
    Cause.WORKERS: "close other programs, or export nnUNet_n_proc_DA=1",
    Cause.SHARED_MEMORY: "give the container more (docker run --shm-size=8g), or export nnUNet_n_proc_DA=0",
    Cause.DISK_FULL: "make room",
    Cause.HUNG: "look at the log; --hang-minutes sets how long to wait",
}


class ProcessError(StageError):
    """Report that a child process failed, with the cause that a retry goes by."""

    def __init__(self, message: str, *, cause: Cause) -> None:
        super().__init__(message)
        self.cause = cause


def process_error(what: str, returncode: int, *, log: Path, said: str, shown_lines: int) -> ProcessError | InputError:
    """Build the error of a failed child: the cause, the way out, its log and the last lines of what it ``said``.

    A refusal of ours that ended the child is given as the refusal that it is.
    """
    if returncode > 0 and (refused := _refusal(said)):
        return InputError(refused)
    cause = diagnose(returncode, said)
    return _error(f"{what} failed ({how_it_ended(returncode)})", cause, log, said, shown_lines)


def _refusal(said: str) -> str | None:
    """Return the text of the `InputError` that was the last exception in a log, None where it was another."""
    raised = re.findall(r"^([A-Za-z_][\w.]*(?:Error|Exception|Interrupt)): (.*)$", said, re.MULTILINE)
    name, text = raised[-1] if raised else ("", "")
    return text if name == f"{InputError.__module__}.{InputError.__name__}" else None


def hang_error(what: str, minutes: float, *, log: Path, said: str, shown_lines: int) -> ProcessError:
    """Build the error of a child that was ended because it neither spoke nor computed for so many minutes."""
    text = f"{what} showed no sign of life for {minutes:g} minutes, neither output nor computing, and was ended"
    return _error(text, Cause.HUNG, log, said, shown_lines)


def diagnose(returncode: int, said: str) -> Cause:
    """Tell why a process failed by its exit status and the end of its output."""
    for cause, pattern in _SAYS:
        if re.search(pattern, said):
            return cause
    # 137 is how shells and containers pass a SIGKILL on
    return Cause.KILLED if returncode in (-signal.SIGKILL, 137) else Cause.UNKNOWN


def how_it_ended(returncode: int) -> str:
    """Write an exit status for people; a negative one is a signal."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"ended by signal {-returncode}"


def _error(text: str, cause: Cause, log: Path, said: str, shown_lines: int) -> ProcessError:
    named = "" if cause in (Cause.UNKNOWN, Cause.HUNG) else f": {cause.value}"
    way_out = f"; {_WAYS_OUT[cause]} and give the same command again" if cause in _WAYS_OUT else ""
    last = "\n".join(said.splitlines()[-shown_lines:])
    return ProcessError(f"{text}{named}{way_out}; log: {log}; its last lines:\n{last}", cause=cause)
