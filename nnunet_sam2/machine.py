"""What this machine has: memory that a process may take, cores, shared memory, file systems. No torch."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Hold bytes of main memory."""

    total: int
    available: int
    """Free now, or freed as soon as asked for."""
    limit: int | None
    """What a container or job may take, where that is less than the machine has."""

    @property
    def usable(self) -> int:
        """Return the most that a process may ever hold."""
        return self.total if self.limit is None else min(self.total, self.limit)


def read_memory() -> Memory:
    """Ask the system for its memory."""
    import psutil

    found = psutil.virtual_memory()
    return Memory(
        total=int(found.total), available=int(found.available), limit=memory_limit(limit_files(), int(found.total))
    )


def limit_files(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> tuple[Path, ...]:
    """Return the files in which Linux says what this process's container or job may take, and those around it.

    ``groups`` names the process's control groups, a line each: ``0::/slurm/job_1`` of version 2, ``9:memory:/slurm``
    of version 1. A scheduler's limit may stand at any level of the path.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    places = [(root, "memory.max", "/"), (root / "memory", "memory.limit_in_bytes", "/")]
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            places.append((root, "memory.max", path))
        elif "memory" in controllers.split(","):
            places.append((root / "memory", "memory.limit_in_bytes", path))
    files: dict[Path, None] = {}
    for base, name, path in places:
        parts = [part for part in path.split("/") if part not in ("", "..")]
        files |= {base.joinpath(*parts[:depth], name): None for depth in range(len(parts) + 1)}
    return tuple(files)


def memory_limit(files: tuple[Path, ...], total: int) -> int | None:
    """Return the smallest limit that the files name, None where it is no limit at all."""
    limits = []
    for path in files:
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal() and int(text) < total:
            limits.append(int(text))
    return min(limits, default=None)


def usable_cores() -> int:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def nearest_existing(path: Path) -> Path:
    """Return the path or the nearest of its parents that exists."""
    # Not by `Path.exists`, which raises where the right to look is missing.
    return next((p for p in (path, *path.parents) if os.path.exists(p)), Path(path.anchor or "."))


def file_system(path: Path) -> int:
    """Return the number of the file system that ``path`` will lie on."""
    return nearest_existing(path).stat().st_dev


def shared_memory_bytes(folder: Path = SHARED_MEMORY) -> int | None:
    """Return the size of the shared memory, None where the system has no such folder."""
    return shutil.disk_usage(folder).total if folder.is_dir() else None
