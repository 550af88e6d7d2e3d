"""A child process with all that it started: whether it is at work, how it is ended, what a killed parent left of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil

from nnunet_sam2.rounds.lock import Owner

GRACE_SECONDS = 4.0
"""Time that processes get to end by themselves before they are killed."""

BUSY_SHARE = 0.02
"""Share of a core above which a process counts as computing; one that only waits and looks takes less."""

MOST_SILENCE = 24
"""A process that computes may be silent for so many times as long as one that does not."""

PARENT, LOG = "NNUNET_SAM2_PARENT", "NNUNET_SAM2_LOG"
"""Environment variables that mark a child and all that it starts: the process it works for, and its log."""


def mark(log: str) -> dict[str, str]:
    """Return the environment variables that mark a child of this process."""
    return {PARENT: json.dumps(vars(Owner.this())), LOG: log}


def end_tree(child: subprocess.Popen[bytes]) -> None:
    """End a child and everything that it has started; return when it is gone."""
    members = _descendants(child.pid) if child.poll() is None else []
    _signal_group(child, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_SECONDS)
    _signal_group(child, getattr(signal, "SIGKILL", signal.SIGTERM))
    for process in members:
        with contextlib.suppress(psutil.Error):
            process.kill()
    child.wait()
    psutil.wait_procs(members, timeout=GRACE_SECONDS)


def end_orphans(log: str) -> int:
    """Kill what works for a parent that is dead and was started on ``log``; return how many processes that were."""
    ended = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            variables = process.environ()
            if variables.get(LOG) == log and PARENT in variables and not _is_alive(variables[PARENT]):
                process.kill()
                ended += 1
    return ended


class Watch:
    """Tell when a child has been neither heard nor seen computing for too long."""

    def __init__(self, child: subprocess.Popen[bytes], minutes: float) -> None:
        self._child = child
        self._limit_s = 60.0 * minutes
        self._step_s = min(30.0, self._limit_s / 10)
        self._heard = self._alive = self._looked = time.monotonic()
        self._used = 0.0

    def heard(self) -> None:
        """Note that the child has said something."""
        self._heard = self._alive = time.monotonic()

    def is_hung(self) -> bool:
        """Say whether the child shows no sign of life, or none but heat for much longer than that."""
        now = time.monotonic()
        if now - self._looked >= self._step_s:
            used, processes = _processor_seconds(self._child.pid)
            # workers that ended take their seconds with them, so less than before is a sign of life as well
            if abs(used - self._used) > BUSY_SHARE * processes * (now - self._looked):
                self._alive = now
            self._used, self._looked = used, now
        return now - self._alive > self._limit_s or now - self._heard > MOST_SILENCE * self._limit_s


def _processor_seconds(pid: int) -> tuple[float, int]:
    used, processes = 0.0, 0
    for process in _tree(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            used, processes = used + times.user + times.system, processes + 1
    return used, processes


def _tree(pid: int) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        yield psutil.Process(pid)
        yield from _descendants(pid)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return []


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    if sys.platform == "win32":
        if child.poll() is None:
            child.terminate()
        return
    # the child leads a group of its own, which lives on as long as one of its workers does
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _is_alive(parent: str) -> bool:
    try:
        return Owner(**json.loads(parent)).is_alive
    except (TypeError, ValueError):
        return False
