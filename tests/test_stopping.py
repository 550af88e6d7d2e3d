"""A process that is asked to end does so in time, in order, and says how to go on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from loop_command import heed_ctrl_c

from nnunet_sam2.stopping import Stopped, stoppable

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")

COMMAND = """
import sys, time
from nnunet_sam2.cli import main as cli
class Module:
    add_arguments = staticmethod(lambda parser: None)
    @staticmethod
    def run(args):
        try:
            {work}
        finally:
            print("tidied", flush=True)
cli.importlib.import_module = lambda name: Module
sys.exit(cli.main(["status"]))
"""

WAITS = 'print("ready", flush=True); time.sleep(60)'
# two signals' worth of work in one call, during which Python cannot run a handler
COMPUTES = """
            import hashlib, subprocess
            from nnunet_sam2 import stopping
            stopping.LONGEST_SECONDS = 0.5
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            print("ready", child.pid, flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 80_000_000)
"""


def _start(work: str) -> tuple[subprocess.Popen[str], str]:
    code = COMMAND.replace("{work}", work.strip())
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    assert process.stdout is not None
    return process, process.stdout.readline()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_command_in_order_with_the_status_that_shells_expect(
    number: signal.Signals, status: int
) -> None:
    process, ready = _start(WAITS)
    assert ready == "ready\n"
    started = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert out == "tidied\n"
    assert err == (
        f"nnunet_sam2 status: stopped by {number.name}; what is finished is kept, go on with: nnunet_sam2 status\n"
    )
    assert time.monotonic() - started < 5


def test_a_computation_that_cannot_be_interrupted_is_ended_all_the_same_with_its_children() -> None:
    process, ready = _start(COMPUTES)
    child = int(ready.split()[1])
    time.sleep(0.5)  # the computation has begun
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "go on with" in err
    assert out == ""
    assert time.monotonic() - started < 5
    assert not _is_alive(child)


def test_asking_again_and_again_does_not_put_off_the_end() -> None:
    process, _ = _start(COMPUTES)
    time.sleep(0.5)
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < 5:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    process.kill()
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert time.monotonic() - started < 5


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable(lambda stopped: None):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), stoppable(lambda stopped: None):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def _is_alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_an_event_loop_lets_the_signal_pass_while_it_serves_a_connection() -> None:
    from waitress import wasyncore

    class Connection:
        def handle_read_event(self) -> None:
            signal.raise_signal(signal.SIGTERM)  # SIGINT is ignored in a shell's background

        def handle_error(self) -> None:
            raise AssertionError("the event loop kept the signal to itself")

    with pytest.raises(Stopped), stoppable(lambda stopped: None):
        wasyncore.read(Connection())


LINGERS = """
            import atexit, threading
            atexit.register(time.sleep, 60)
            threading.Thread(target=time.sleep, args=(60,)).start()
            print("ready", flush=True); time.sleep(60)
"""


@pytest.mark.parametrize("reader_gone_to_sleep", [False, True])
def test_nothing_that_lingers_after_the_last_word_is_waited_for(reader_gone_to_sleep: bool) -> None:
    code = COMMAND.replace("{work}", LINGERS.strip()).replace(
        'cli.main(["status"])', '(sys.argv.__setitem__(slice(1, None), ["status"]), cli.main())[1]'
    )
    if reader_gone_to_sleep:  # the pipe of its last word is full
        fill = "import fcntl, os; os.set_blocking(2, False)\ntry:\n    while True: os.write(2, b'x')\n"
        code = f"{fill}except BlockingIOError: os.set_blocking(2, True)\n" + code
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(timeout=10) == 143
    finally:
        process.kill()
    assert time.monotonic() - started < 5
    assert ("go on with" in process.communicate()[1]) is not reader_gone_to_sleep
