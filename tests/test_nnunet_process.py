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
from nnunet_sam2.rounds.nnunet.process import child_environment, run_logged, stream_logged

PARENT = """
import os, sys
from pathlib import Path
from nnunet_sam2.rounds.nnunet.process import stream_logged
child = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(120)"]
for line in stream_logged(child, log=Path(sys.argv[1]), environment=os.environ, what="a long job"):
    print(line, flush=True)
"""


def run_python(code: str, log: Path) -> None:
    run_logged([sys.executable, "-c", code], log=log, environment=os.environ, what="the job")


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
    with pytest.raises(StageError, match="SIGKILL, often the sign of too little memory"):
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
