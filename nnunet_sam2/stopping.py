"""Ending in time when asked to: by Ctrl-C, by SIGTERM (a queue, a shutdown), by SIGHUP (a closed terminal)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

LONGEST_SECONDS = 5.0
"""Time to end in an orderly way; after it the process ends as it stands. What is on disk is whole at any moment.

Half of the ten seconds that are promised: on a busy machine, and at low priority, what comes after waits for its turn.
"""

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Stopped(KeyboardInterrupt):
    """Raised in the main thread when the process is asked to end.

    An interrupt by kind, whichever signal asked: event loops keep every other exception to themselves (waitress's is
    one) and go on, while they let an interrupt pass.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = signal.Signals(number).name
        super().__init__(self.name)

    @property
    def exit_status(self) -> int:
        """Return the status that shells expect: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


@contextlib.contextmanager
def stoppable(say_last: Callable[[Stopped], None]) -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP during the block into `Stopped`, and bound the time that ending takes.

    A signal reaches Python only between two steps of the main thread, which may be minutes into a computation. So a
    thread of its own hears of it at once, and where the block has not ended after `LONGEST_SECONDS` it calls
    ``say_last`` and ends the process with the same exit status. What was set to be ignored (``nohup``) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise Stopped(number)

    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    heard, wake = socket.socketpair()
    wake.setblocking(False)
    wakeup_before = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_end_in_time, args=(heard, say_last), daemon=True, name="stopping")
    watcher.start()
    try:
        for number in numbers:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, on_signal)
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number in numbers:
            signal.signal(number, before[number])
        wake.close()  # the watcher reads the end of the stream and ends
        watcher.join(timeout=1.0)
        heard.close()


def _end_in_time(heard: socket.socket, say_last: Callable[[Stopped], None]) -> None:
    numbers = {getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)}
    number = 0
    while number not in numbers or signal.getsignal(number) is signal.SIG_IGN:
        received = heard.recv(1)
        if not received:
            return
        number = received[0]
    until = time.monotonic() + LONGEST_SECONDS
    import psutil  # noqa: F401  (needed at the end, when a busy machine should not have to load it)

    with contextlib.suppress(TimeoutError):
        while (left := until - time.monotonic()) > 0:
            heard.settimeout(left)
            if not heard.recv(1):
                return
            # asked again; the answer is the same
    stopped = Stopped(number)
    last_word(say_last, stopped)
    end_now(stopped.exit_status)


def last_word(say_last: Callable[[Stopped], None], stopped: Stopped) -> None:
    """Say the last word, and wait a second at most for a reader that has stopped reading or a stream that is held."""

    def speak() -> None:
        with contextlib.suppress(OSError, ValueError):
            say_last(stopped)
            sys.stderr.flush()
            sys.stdout.flush()

    speaker = threading.Thread(target=speak, daemon=True, name="last word")
    speaker.start()
    speaker.join(timeout=1.0)


def end_now(status: int) -> NoReturn:
    """End the process with its children and wait for nothing: neither for threads nor for libraries that tidy up."""
    _kill_children()
    os._exit(status)


def _kill_children() -> None:
    import psutil

    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
