"""Child processes with a log file, that end with their parent and are never there twice."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.progress import say
from nnunet_sam2.rounds.nnunet.failures import hang_error, process_error
from nnunet_sam2.rounds.nnunet.process_tree import Watch, end_orphans, end_tree, mark

SHOWN_LINES = 40
"""Lines of a failed command's log that its error shows."""

HANG_MINUTES = 60.0
"""Minutes without output and without computing after which a command counts as hung."""

_POLL_SECONDS = 0.1
_READ_BYTES = 64 * 1024
_PR_SET_PDEATHSIG = 1


def console_script(name: str) -> str:
    """Return the path of an installed command of this Python, such as ``nnUNetv2_train``."""
    folders = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    found = shutil.which(name, path=os.pathsep.join(folders)) or shutil.which(name)
    if found is None:
        raise InputError(f"command {name} is not installed beside {sys.executable}; install nnunetv2 there")
    return found


def child_environment(
    *, threads: int | None, processes: int = 1, augmentation_workers: int | None = None, gpu: bool = False
) -> dict[str, str]:
    """Return the environment of an nnU-Net process: its trainer can be found, its processes and threads are few."""
    from nnunet_sam2.trainers.discovery import environment

    variables = {**os.environ, **environment()}
    variables["PYTHONUNBUFFERED"] = "1"
    variables["MPLBACKEND"] = "Agg"
    variables["nnUNet_def_n_proc"] = str(processes)
    if augmentation_workers is not None:
        variables["nnUNet_n_proc_DA"] = str(augmentation_workers)
    if threads is not None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            variables[name] = str(threads)
    if not gpu:
        variables["nnUNet_compile"] = "f"
    return variables


def run_logged(
    argv: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    what: str,
    hang_minutes: float = HANG_MINUTES,
) -> None:
    """Run a command to its end, its output going to ``log``; raise `ProcessError` with the log's end where it fails."""
    for _ in stream_logged(argv, log=log, environment=environment, what=what, hang_minutes=hang_minutes):
        pass


def stream_logged(
    argv: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    what: str,
    hang_minutes: float = HANG_MINUTES,
) -> Iterator[str]:
    """Run a command and yield the lines that it appends to ``log``.

    The child writes to the file itself, so that it does not depend on this process reading. The file is locked as long
    as the child or a process that it started lives, even if this process is killed: a second child on the same log
    first ends what a killed process left there, and is refused where the other one is alive. A child that neither
    writes nor computes for ``hang_minutes`` is ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    hung = False
    with (
        log.open("a", encoding="utf-8", errors="replace") as output,
        log.open(encoding="utf-8", errors="replace") as tail,
    ):
        _lock(output, what, log)
        output.write(f"$ {shlex.join(argv)}\n")
        output.flush()
        start = tail.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, **mark(str(log))},
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
        try:
            watch = Watch(child, hang_minutes)
            for line in _lines_while(child, tail, watch):
                if line is not None:
                    yield line
                elif watch.is_hung():
                    hung = True
                    break
        finally:
            end_tree(child)
    said = _said(log, start)
    if hung:
        raise hang_error(what, hang_minutes, log=log, said=said, shown_lines=SHOWN_LINES)
    if child.returncode != 0:
        raise process_error(what, child.returncode, log=log, said=said, shown_lines=SHOWN_LINES)


def _lines_while(child: subprocess.Popen[bytes], tail: TextIO, watch: Watch) -> Iterator[str | None]:
    """Yield the child's lines as they come, and None whenever there was nothing new."""
    pending = ""
    while True:
        ended = child.poll() is not None
        new = tail.read()
        if new:
            watch.heard()
        pending += new
        *lines, pending = pending.split("\n")
        yield from lines
        if ended:
            if pending:
                yield pending
            return
        if not new:
            yield None
        time.sleep(_POLL_SECONDS)


def _said(log: Path, start: int) -> str:
    """Return the end of what the child itself wrote."""
    with log.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(start, size - _READ_BYTES))
        return handle.read().decode("utf-8", errors="replace")


def _lock(output: TextIO, what: str, log: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        pass
    except OSError:  # a file system without locks
        return
    ended = end_orphans(str(log))
    if ended:
        say(f"ended {ended} processes that a killed run had left at work on {log}")
    for _ in range(50 if ended else 10):  # what was killed a moment ago may still be ending
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_POLL_SECONDS)
    raise StageError(f"{what} is running already, in another process; wait for it or end it; log: {log}")


def _die_with_parent() -> Callable[[], None] | None:
    """Make the function by which Linux ends the child when this process ends, even by SIGKILL."""
    if not sys.platform.startswith("linux"):
        return None
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def arm() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return arm
