"""Child processes: their logs, their failures, and their end with the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_sam2.errors import StageError
from nnunet_sam2.rounds.nnunet.failures import Cause, ProcessError, diagnose
from nnunet_sam2.rounds.nnunet.process import child_environment, run_logged, stream_logged
from nnunet_sam2.rounds.nnunet.retry import Remedy, once_more, prediction_remedy, training_remedy

PARENT = """
import os, sys
from pathlib import Path
from nnunet_sam2.rounds.nnunet.process import stream_logged
child = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(120)"]
for line in stream_logged(child, log=Path(sys.argv[1]), environment=os.environ, what="a long job"):
    print(line, flush=True)
"""


LEAVES_A_WORKER = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
print(worker.pid, flush=True)
worker.wait()
"""


def run_python(code: str, log: Path, **options: float) -> None:
    run_logged([sys.executable, "-c", code], log=log, environment=os.environ, what="the job", **options)


def test_a_failed_command_shows_the_end_of_its_log_and_where_it_lies(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "job.log"
    with pytest.raises(StageError, match="exit status 3") as caught:
        run_python("import sys; [print('line', i) for i in range(100)]; sys.exit(3)", log)
    message = str(caught.value)
    assert str(log) in message
    assert "line 99" in message
    assert "line 10\n" not in message
    assert "line 10\n" in log.read_text()


def test_a_command_ended_by_a_signal_is_named_so(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"SIGKILL\): killed, most likely out of memory"):
        run_python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path / "job.log")


def test_lines_come_while_the_command_runs_and_only_its_own(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_text("from an earlier run\n")
    code = "import time; print('first', flush=True); time.sleep(1.5); print('second', end='')"
    started, seen = time.monotonic(), []
    for line in stream_logged([sys.executable, "-c", code], log=log, environment=os.environ, what="the job"):
        seen.append((line, time.monotonic() - started))
    assert [line for line, _ in seen] == ["first", "second"]
    assert seen[1][1] - seen[0][1] > 0.7
    assert log.read_text().startswith("from an earlier run\n$ ")


def test_leaving_the_stream_ends_the_command(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(120)"
    lines = stream_logged(
        [sys.executable, "-c", code], log=tmp_path / "job.log", environment=os.environ, what="the job"
    )
    child = int(next(iter(lines)))
    lines.close()  # type: ignore[attr-defined]
    assert not is_alive(child)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a child with its killed parent")
def test_a_killed_parent_takes_its_child_along_and_frees_the_log(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(log)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    with pytest.raises(StageError, match="running already"):
        run_python("print(1)", log)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)
    run_python("print(1)", log)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a child with its killed parent")
def test_a_worker_that_outlives_its_killed_grandparent_is_ended_by_the_next_start(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    code = PARENT.replace('"import os, time; print(os.getpid(), flush=True); time.sleep(120)"', repr(LEAVES_A_WORKER))
    parent = subprocess.Popen([sys.executable, "-c", code, str(log)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    time.sleep(0.3)
    assert is_alive(worker)  # it holds the log, as nnU-Net's augmentation workers do
    run_python("print(1)", log)
    assert not is_alive(worker)


def test_ending_a_command_ends_what_it_started(tmp_path: Path) -> None:
    lines = stream_logged(
        [sys.executable, "-c", LEAVES_A_WORKER], log=tmp_path / "job.log", environment=os.environ, what="the job"
    )
    worker = int(next(iter(lines)))
    started = time.monotonic()
    lines.close()  # type: ignore[attr-defined]
    assert not is_alive(worker)
    assert time.monotonic() - started < 10


def test_a_command_without_sign_of_life_is_ended_and_named_so(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match=r"no sign of life for 0\.01 minutes.*--hang-minutes") as caught:
        run_python(
            "import time; print('last words', flush=True); time.sleep(60)", tmp_path / "job.log", hang_minutes=0.01
        )
    assert caught.value.cause is Cause.HUNG
    assert "last words" in str(caught.value)


def test_a_silent_command_that_computes_is_not_taken_for_hung(tmp_path: Path) -> None:
    code = "import time\nend = time.monotonic() + 3\nwhile time.monotonic() < end: sum(range(1000))"
    run_python(code, tmp_path / "job.log", hang_minutes=0.02)


@pytest.mark.parametrize(
    ("returncode", "said", "cause"),
    [
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", Cause.DEVICE_MEMORY),
        (-9, "Epoch 3", Cause.KILLED),
        (137, "", Cause.KILLED),
        (1, "RuntimeError: Some background worker is 6 feet under. Yuck.", Cause.WORKERS),
        (1, "One or more background workers are no longer alive. Exiting.", Cause.WORKERS),
        (1, "DataLoader worker is killed by signal: Bus error.", Cause.SHARED_MEMORY),
        (1, "OSError: [Errno 28] No space left on device", Cause.DISK_FULL),
        (1, "ValueError: something else", Cause.UNKNOWN),
    ],
)
def test_the_cause_of_a_failure_is_read_from_status_and_output(returncode: int, said: str, cause: Cause) -> None:
    assert diagnose(returncode, said) is cause


def test_a_cause_with_a_remedy_is_tried_once_more_and_noted_before() -> None:
    log: list[object] = []

    def attempt(remedy: Remedy | None) -> str:
        log.append(remedy and remedy.name)
        if remedy is None:
            raise ProcessError("training failed", cause=Cause.DEVICE_MEMORY)
        return "trained"

    noted = lambda cause, remedy: log.append((cause, remedy))  # noqa: E731
    assert once_more(attempt, lambda cause: training_remedy(cause, on_gpu=True), note=noted) == "trained"
    name = training_remedy(Cause.DEVICE_MEMORY, on_gpu=True).name  # type: ignore[union-attr]
    assert log == [None, (Cause.DEVICE_MEMORY.value, name), name]


def test_a_failure_is_never_tried_a_third_time_and_one_without_a_remedy_not_again() -> None:
    calls: list[Remedy | None] = []

    def attempt(remedy: Remedy | None) -> None:
        calls.append(remedy)
        raise ProcessError("it failed", cause=Cause.KILLED)

    with pytest.raises(ProcessError):
        once_more(attempt, prediction_remedy)
    assert len(calls) == 2
    calls.clear()
    with pytest.raises(ProcessError):
        once_more(attempt, lambda cause: None)
    assert calls == [None]


def test_training_on_a_gpu_goes_on_with_fewer_workers_and_never_with_another_batch() -> None:
    assert training_remedy(Cause.WORKERS, on_gpu=True).environment == {"nnUNet_n_proc_DA": "2"}  # type: ignore[union-attr]
    assert training_remedy(Cause.SHARED_MEMORY, on_gpu=True).environment == {"nnUNet_n_proc_DA": "0"}  # type: ignore[union-attr]
    assert training_remedy(Cause.KILLED, on_gpu=False).environment == {}  # type: ignore[union-attr]
    assert training_remedy(Cause.UNKNOWN, on_gpu=True) is None
    assert training_remedy(Cause.DISK_FULL, on_gpu=True) is None


def test_the_environment_names_the_trainer_and_bounds_processes_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_def_n_proc", "8")
    monkeypatch.setenv("nnUNet_extTrainer", "/a/folder")
    environment = child_environment(threads=2, augmentation_workers=0)
    assert environment["nnUNet_def_n_proc"] == "1"
    assert environment["nnUNet_n_proc_DA"] == "0"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["nnUNet_extTrainer"].split(os.pathsep)[0] == "/a/folder"
    assert len(environment["nnUNet_extTrainer"].split(os.pathsep)) == 2


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that ended but was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return not Path("/proc").is_dir()
    return state != "Z"
