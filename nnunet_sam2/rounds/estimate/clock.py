"""Wall and processor seconds of a piece of work, and the highest memory of this process."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any


class StopWatch:
    """Count wall seconds and this process's processor seconds (children that ended included) from its making on."""

    def __init__(self, *, since: float | None = None, cpu_since: float | None = None) -> None:
        """Start now, or at the wall time ``since`` (as `time.time` gives it) and processor second ``cpu_since``."""
        self._since = time.time() if since is None else since
        self._cpu_since = _processor_seconds() if cpu_since is None else cpu_since

    def read(self) -> dict[str, float]:
        """Return what has passed."""
        return {
            "seconds": max(0.0, time.time() - self._since),
            "cpu_seconds": max(0.0, _processor_seconds() - self._cpu_since),
        }


class Clock:
    """Time a block and put the result into ``answer[name]``."""

    def __init__(self, answer: dict[str, Any], name: str) -> None:
        self._answer = answer
        self._name = name

    def __enter__(self) -> None:
        self._watch = StopWatch()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._answer[self._name] = self._watch.read()


def peak_memory() -> int:
    """Return the most memory that this process has held so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def peak_gpu_memory(device: str) -> int:
    """Return the most accelerator memory that this process has reserved so far, in bytes; 0 on the processor."""
    if device != "cuda":
        return 0
    import torch

    return int(torch.cuda.max_memory_reserved())


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
