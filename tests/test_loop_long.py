"""The whole loop, killed at every stage boundary and thirty times at random: the same labels, byte for byte.

Minutes each: ``bash scripts/test_long.sh`` runs them and writes the result to docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from loop_command import COMMAND, LONGEST_S, RUN, command, copy_of, environment, human_hashes, label_hashes, run_folder
from loop_command import start as start_command

from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds.ledger import LEDGER_FILE, read_events
from nnunet_sam2.storage import TEMPORARY_MARK

pytestmark = pytest.mark.long

KILLS = 30
SEED = int(os.environ.get("NNUNET_SAM2_KILL_SEED", "1"))
Note = Callable[[str, object], None]

DIES_AT_A_BOUNDARY = """
import os, signal, sys
from nnunet_sam2.rounds import ledger
stage, moment = sys.argv[1:3]
append = ledger.Ledger.append
def append_and_die(self, event, **values):
    if event == "done" and values["stage"] == stage and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    entry = append(self, event, **values)
    if event == "done" and values["stage"] == stage and moment == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return entry
ledger.Ledger.append = append_and_die
from nnunet_sam2.cli.main import main
sys.exit(main(sys.argv[3:]))
"""


class Straight:
    """Hold a run that was never killed."""

    def __init__(self, root: Path, began: float, ended: float) -> None:
        self.root, self.seconds = root, ended - began
        self.labels, self.raw = label_hashes(root), human_hashes(root)
        events = read_events(run_folder(root) / LEDGER_FILE)
        self.stages = {e["stage"]: float(e["seconds"]) for e in events if e["event"] == "done"}
        self.start_up = max(0.0, events[0]["time"] - began)
        """Seconds before the first entry of the ledger."""

    def require_same(self, root: Path) -> None:
        """Fail where a run ended with other labels, touched raw data, or left temporary files behind ``clean``."""
        assert label_hashes(root) == self.labels
        cleaned = command(root, "clean", "-d", "501")
        assert cleaned.returncode == 0, cleaned.stderr
        assert not list(root.rglob(f"*{TEMPORARY_MARK}*"))
        assert human_hashes(root) == self.raw
        assert label_hashes(root) == self.labels


@pytest.fixture(scope="module")
def straight(tiny_dataset: DatasetFolders, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    root = copy_of(tiny_dataset, tmp_path_factory.mktemp("straight"))
    began = time.time()
    done = command(root, *RUN)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return Straight(root, began, time.time())


def test_a_loop_killed_thirty_times_at_random_ends_with_the_same_bytes(
    straight: Straight, tiny_dataset: DatasetFolders, tmp_path: Path, record_property: Note
) -> None:
    rng, kills, loops, hit = random.Random(SEED), 0, 0, dict[str, int]()
    while kills < KILLS:
        root = copy_of(tiny_dataset, tmp_path / f"killed{loops}")
        while kills < KILLS:
            process = start_command(root, *RUN)
            try:
                _wait_at_random(process, root, straight, rng)
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
                stage = _stage_at_work(root)
                hit[stage] = hit.get(stage, 0) + 1
            _, err = process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -9, err[-4000:]
        ended = command(root, *RUN)
        assert ended.returncode == 0, ended.stderr[-4000:] + ended.stdout[-2000:]
        straight.require_same(root)
        loops += 1
        shutil.rmtree(root)
    record_property(
        "figures", f"{kills} kills (seed {SEED}), in {len(hit)} of {len(straight.stages)} stages, {loops} loops"
    )
    assert len(hit) >= 5


def test_a_loop_killed_at_every_stage_boundary_ends_with_the_same_bytes(
    straight: Straight, tiny_dataset: DatasetFolders, tmp_path: Path, record_property: Note
) -> None:
    """By turns when a stage's work is done and the ledger does not know yet, and when it has just been told."""
    root = copy_of(tiny_dataset, tmp_path / "killed")
    for number, stage in enumerate(straight.stages):
        argv = [sys.executable, "-c", DIES_AT_A_BOUNDARY, stage, ("before", "after")[number % 2]]
        process = start_command(root, *RUN, argv=argv)
        _, err = process.communicate(timeout=LONGEST_S)
        assert process.returncode == -9, (stage, err[-4000:])
    ended = command(root, *RUN)
    assert ended.returncode == 0, ended.stderr[-4000:] + ended.stdout[-2000:]
    straight.require_same(root)
    record_property("figures", f"{len(straight.stages)} kills, one at each stage")


def test_a_training_that_is_killed_under_the_loop_goes_on_once_and_is_named(
    straight: Straight, tiny_dataset: DatasetFolders, tmp_path: Path, record_property: Note
) -> None:
    root = copy_of(tiny_dataset, tmp_path / "child")
    process = start_command(root, *RUN)
    killed = False
    while process.poll() is None and not killed:
        time.sleep(0.05)
        for child in _children(process.pid):
            with contextlib.suppress(psutil.Error):  # it has just ended
                if child.name().startswith("nnUNetv2_train") or "nnUNetv2_train" in " ".join(child.cmdline()):
                    time.sleep(3.0)
                    child.kill()
                    killed = True
    _, err = process.communicate(timeout=LONGEST_S)
    assert killed
    assert process.returncode == 0, err[-4000:]
    straight.require_same(root)
    retried = [e for e in read_events(run_folder(root) / LEDGER_FILE) if e["event"] == "retried"]
    assert [(e["stage"], e["cause"]) for e in retried] == [("r00/train", "killed, most likely out of memory")]
    assert "tried once more: r00/train" in command(root, "status", "-d", "501").stdout
    record_property("figures", "one SIGKILL of nnUNetv2_train, one retry")


def test_a_branch_beside_a_run_touches_neither_it_nor_a_human_label(straight: Straight, record_property: Note) -> None:
    done = command(straight.root, *RUN, "--branch", "other", "--seed", "7", "--rounds", "1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert human_hashes(straight.root) == straight.raw
    assert label_hashes(straight.root) == straight.labels
    deleted = command(straight.root, "clean", "-d", "501", "--run", "3d_fullres_fold0_other", "--yes")
    assert deleted.returncode == 0, deleted.stderr
    straight.require_same(straight.root)
    again = command(straight.root, *RUN)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "/train]" not in again.stdout
    record_property("figures", "a second run of one round, deleted again")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="no right to mount")
def test_sixty_four_kilobytes_of_shared_memory_are_enough_on_the_cpu(
    straight: Straight, tiny_dataset: DatasetFolders, tmp_path: Path, record_property: Note
) -> None:
    root = copy_of(tiny_dataset, tmp_path / "shm")
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    argv = ["unshare", "--mount", "sh", "-c", script, "sh", *COMMAND, *RUN]
    done = subprocess.run(argv, env=environment(root), capture_output=True, text=True, timeout=LONGEST_S)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no right to mount")
    assert done.returncode == 0, done.stderr[-4000:]
    straight.require_same(root)
    record_property("figures", "/dev/shm of 64 kB")


def _wait_at_random(process: subprocess.Popen[str], root: Path, straight: Straight, rng: random.Random) -> None:
    """Let up to two stages end, then wait for a random part of the next; raise `TimeoutExpired` while there is work.

    By the clock alone, a stage that starts anew after a kill might never come to its end.
    """
    more, known = rng.randrange(3), len(_stages(root, "done"))
    while process.poll() is None and len(_stages(root, "done")) < known + more:
        time.sleep(0.05)
    done = _stages(root, "done")
    following = next((seconds for stage, seconds in straight.stages.items() if stage not in done), 0.0)
    process.wait(rng.uniform(0.0, following + (straight.start_up if more == 0 else 0.0)))


def _stage_at_work(root: Path) -> str:
    return next(reversed(_stages(root, "started")), "start")


def _stages(root: Path, event: str) -> dict[str, None]:
    """Name the stages that have an event of this kind, the one with the latest last."""
    found: dict[str, None] = {}
    for path in (root / "nnUNet_results").glob(f"*/nnunet_sam2/3d_fullres_fold0/{LEDGER_FILE}"):
        for entry in read_events(path):
            if entry["event"] == event:
                found.pop(entry["stage"], None)
                found[entry["stage"]] = None
    return found


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.Error:
        return []
