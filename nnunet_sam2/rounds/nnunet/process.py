"""Child processes with a log file, that end with their parent and are never there twice."""

from __future__ import annotations

import ctypes
import os
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

SHOWN_LINES = 40
"""Lines of a failed command's log that its error shows."""

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
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


def run_logged(argv: Sequence[str], *, log: Path, environment: Mapping[str, str], what: str) -> None:
    """Run a command to its end, its output going to ``log``; raise `StageError` with the log's end where it fails."""
    for _ in stream_logged(argv, log=log, environment=environment, what=what):
        pass


def stream_logged(argv: Sequence[str], *, log: Path, environment: Mapping[str, str], what: str) -> Iterator[str]:
    """Run a command and yield the lines that it appends to ``log``.

    The child writes to the file itself, so that it does not depend on this process reading. The file is locked as long
    as the child lives, even if this process is killed: a second child on the same log is refused.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a", encoding="utf-8", errors="replace") as output,
        log.open(encoding="utf-8", errors="replace") as tail,
    ):
        _lock(output, what, log)
        output.write(f"$ {' '.join(argv)}\n")
        output.flush()
        tail.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            preexec_fn=_die_with_parent(),
        )
        try:
            yield from _lines_while(child, tail)
        finally:
            _end(child)
    if child.returncode != 0:
        raise StageError(f"{what} failed ({_how(child.returncode)}); log: {log}; its last lines:\n{_last_lines(log)}")


def _lines_while(child: subprocess.Popen[bytes], tail: TextIO) -> Iterator[str]:
    pending = ""
    while True:
        ended = child.poll() is not None
        pending += tail.read()
        *lines, pending = pending.split("\n")
        yield from lines
        if ended:
            if pending:
                yield pending
            return
        time.sleep(_POLL_SECONDS)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _how(returncode: int) -> str:
    if returncode >= 0:
        return f"exit status {returncode}"
    name = signal.Signals(-returncode).name
    hint = ", often the sign of too little memory" if name == "SIGKILL" else ""
    return f"ended by {name}{hint}"


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:])


def _lock(output: TextIO, what: str, log: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StageError(f"{what} is running already, in another process; wait for it or end it; log: {log}") from None
    except OSError:  # a file system without locks
        return


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
