"""What a run makes of damaged state, other options, full disks, odd clocks and plain locales."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import HIDDEN_LABELS, Cohort
from nnunet_sam2.cohort.splits import make_splits
from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.review.take_in import take_in
from nnunet_sam2.rounds import disk
from nnunet_sam2.rounds import lock as locks
from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.decisions.record import Decision, DecisionFile, decisions_path, read_decisions, standing
from nnunet_sam2.rounds.device_memory import on_cpu_if_full
from nnunet_sam2.rounds.ledger import BACKUP_FILE, HASH, LEDGER_FILE, PREVIOUS, Ledger, StageResult, read_events
from nnunet_sam2.rounds.lock import OWNER_FILE, Owner, in_use, only_run
from nnunet_sam2.rounds.nnunet.base import only_writer
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.room import Room
from nnunet_sam2.rounds.state import read_state
from nnunet_sam2.storage import write_json
from nnunet_sam2.support.library import load_query

RUN = ["run", "-d", "501", "--sam2", "untrained", "--image-size", "64", "--device", "cpu", "--profile", "cpu"]


def _line(ledger: Path, number: int, **changes: object) -> None:
    """Change fields of one event of a ledger by hand; None takes the field out."""
    lines = ledger.read_text().splitlines()
    events = [json.loads(line) for line in lines]
    events[number] = {name: value for name, value in {**events[number], **changes}.items() if value is not None}
    # as an earlier version wrote them, without hashes
    events = [{name: value for name, value in event.items() if name not in (HASH, PREVIOUS)} for event in events]
    ledger.write_text("".join(json.dumps(event) + "\n" for event in events))
    ledger.with_name(BACKUP_FILE).unlink(missing_ok=True)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    book = Ledger(tmp_path)
    book.append("run", options=RunOptions().to_json())
    book.run_stage("r01/train", {}, lambda: StageResult(info={"iterations": 1}), what="train")
    book.append("stopped", reason="converged", best_round=1)
    return book.path


@pytest.mark.parametrize(
    ("number", "changes", "named"),
    [
        (0, {"options": None}, "line 1, .run. lacks the field 'options'"),
        (2, {"files": None}, "line 3, .done. lacks the field 'files'"),
        (2, {"seconds": "long"}, "line 3, .done.: 'seconds' must be a number, not 'long'"),
        (3, {"best_round": "one"}, "line 4, .stopped.: 'best_round' must be a int"),
        (3, {"event": None}, "line 4, .no event. lacks the field 'event'"),
        (1, {"version": 2}, "line 2: version 2 is not this program's"),
    ],
)
def test_a_ledger_edited_by_hand_is_refused_with_line_and_field(
    ledger: Path, number: int, changes: dict[str, object], named: str
) -> None:
    _line(ledger, number, **changes)
    with pytest.raises(InputError, match=named):
        read_events(ledger)


def test_a_damaged_ledger_names_the_copy_of_the_last_start(ledger: Path) -> None:
    Ledger(ledger.parent)  # a start
    whole = ledger.read_text()
    ledger.write_text("{\n" + whole)
    with pytest.raises(InputError, match=rf"line 1.*put {BACKUP_FILE} in its place"):
        Ledger(ledger.parent)
    shutil.copyfile(ledger.with_name(BACKUP_FILE), ledger)
    assert len(Ledger(ledger.parent).events) == 4
    assert ledger.read_text() == whole


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": "7"}, r"option 'seed' is '7', not int"),
        ({"warp": 9}, r"option 'warp' is unknown to this version"),
        ({"fold": "x"}, r"give a fold number"),
        ({"skip_baseline": 1}, r"option 'skip_baseline' is 1, not bool"),
    ],
)
def test_options_in_a_ledger_that_do_not_fit_are_refused_by_name(changes: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=f"here: .*{named}|here: {named}"):
        RunOptions.from_json({**RunOptions().to_json(), **changes}, where="here")


def test_options_that_came_after_a_ledger_was_written_have_their_defaults() -> None:
    old = {name: value for name, value in RunOptions(seed=7).to_json().items() if name != "oscillation"}
    assert RunOptions.from_json(old, where="here") == RunOptions(seed=7)


def test_clocks_that_jump_back_change_nothing(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Ledger(ledger.parent).events
    for number, event in enumerate(before):
        _line(ledger, number, time=event["time"] - 1000.0 * number)
    book = Ledger(ledger.parent)
    calls: list[int] = []
    book.run_stage("r01/train", {}, lambda: calls.append(1) or StageResult(), what="train")  # type: ignore[func-returns-value]
    assert not calls
    assert all(event["seconds"] >= 0 for event in book.events if event["event"] == "done")


def test_a_stage_that_the_disk_has_no_room_for_does_not_start(
    fresh_dataset: DatasetFolders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: disk.RESERVE + 1000)
    assert main(RUN) == 1
    message = capsys.readouterr().err
    assert "stage setup/plan writes up to" in message
    assert "67.1 MB" in message
    assert str(fresh_dataset.preprocessed) in message
    assert message.count("\n") == 1
    assert not list(fresh_dataset.preprocessed.rglob("*.b2nd"))
    state = read_state(fresh_dataset)
    assert state.running_stage is None


@pytest.fixture
def planned_run(fresh_dataset: DatasetFolders) -> RunContext:
    """A run that planned, by its ledger; nothing of it is on the disk."""
    options = RunOptions(sam2="untrained", image_size=64, device="cpu", profile="cpu")
    folder = fresh_dataset.results / "nnunet_sam2" / options.run_name
    ledger, cohort = Ledger(folder), Cohort.load(fresh_dataset.raw)
    ledger.run_stage("setup/plan", {}, lambda: StageResult(info={"folds": make_splits(cohort)}), what="plan")
    return RunContext(folders=fresh_dataset, cohort=cohort, options=options, ledger=ledger, folder=folder)


def test_features_that_the_disk_has_no_room_for_are_not_kept_and_labelling_goes_on(
    planned_run: RunContext, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cohort = planned_run, planned_run.cohort
    monkeypatch.setattr(disk, "free_bytes", lambda folder: disk.RESERVE + 1000)
    for backend in (run.backend, run.cpu_backend(like=run.backend)):
        frames = load_query(cohort, cohort.unlabelled[0], backend, slice_axis=0).embeddings
        assert len(frames) == cohort.unlabelled[0].geometry.shape_zyx[0]
    assert capsys.readouterr().out.count("features are not kept on disk") == 2
    assert not list(run.folders.results.rglob("*.safetensors"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_fills_up_in_a_stage_ends_it_in_one_line_and_keeps_what_was_there(
    tmp_path: Path, number: int
) -> None:
    ledger, good = Ledger(tmp_path), tmp_path / "labels.txt"

    def write() -> StageResult:
        good.write_text("whole")
        return StageResult(files=(good,))

    def fill() -> StageResult:
        raise OSError(number, os.strerror(number), str(tmp_path / "more.txt"))

    ledger.run_stage("r01/fuse", {}, write, what="labels")
    with pytest.raises(StageError, match=r"stage r02/fuse failed: .*more.txt.*same command again"):
        ledger.run_stage("r02/fuse", {}, fill, what="labels")
    again = Ledger(tmp_path)
    assert again.done("r01/fuse", again.events[0]["key"])
    assert [event["stage"] for event in again.events if event["event"] == "done"] == ["r01/fuse"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_no_writer_takes_a_full_disk_for_a_written_file(small_disk: Path, cohort: Cohort) -> None:
    import torch

    from nnunet_sam2.rounds.nnunet.cases import save_array
    from nnunet_sam2.support.library import write_probabilities
    from nnunet_sam2.trainers.checkpoints import write_checkpoint
    from nnunet_sam2.trainers.dataset import write_distrust
    from nnunet_sam2.volumes import write_label, write_map

    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (64, 64, 100), dtype=np.uint8)
    geometry = type(cohort.cases[0].geometry)(shape_zyx=noise.shape)
    writers = {
        "label.nii.gz": lambda path: write_label(path, noise, geometry),
        "map.nii.gz": lambda path: write_map(path, noise / 255.0, geometry),
        "case.npz": lambda path: write_probabilities(path, noise[None] / 255.0),
        "case.b2nd": lambda path: save_array(path, noise[None].astype(np.float32), (64, 64, 64)),
        "checkpoint.pth": lambda path: write_checkpoint({"w": torch.from_numpy(noise)}, path),
        "record.json": lambda path: write_json(path, noise.ravel().tolist()),
    }
    for name, write in writers.items():
        path = small_disk / name
        path.write_text("what was there before")
        with pytest.raises((OSError, RuntimeError, ValueError)):
            write(path)
        assert path.read_text() == "what was there before", name
        path.unlink()
        assert not list(small_disk.iterdir()), name
    with pytest.raises((OSError, RuntimeError, ValueError)):
        write_distrust(small_disk, "case", noise[None], (64, 64, 64))
    assert not list(small_disk.iterdir())
    book = Ledger(small_disk)
    book.append("run", options={})
    with pytest.raises(StageError, match="the disk is full"):
        book.append("note", text="x" * 300_000)
    assert [event["event"] for event in Ledger(small_disk).events] == ["run"]


def test_the_lock_of_a_process_on_another_machine_says_which_and_what_to_remove(tmp_path: Path) -> None:
    owner = Owner(pid=7, host="cluster-node-3", started=1_700_000_000.0)
    message = in_use(tmp_path, owner)
    assert "process 7 on cluster-node-3, another machine" in message
    assert str(tmp_path / "run.lock") in message


def test_the_lock_of_a_dead_process_is_called_stale(tmp_path: Path) -> None:
    message = in_use(tmp_path, Owner(pid=2**22 + 5, host=Owner.this().host, started=1_700_000_000.0))
    assert "which no longer runs: a stale lock" in message


def test_a_number_that_was_given_to_another_process_is_not_taken_for_the_owner() -> None:
    this = Owner.this()
    assert this.is_alive
    assert not Owner(pid=this.pid, host=this.host, started=this.started - 100).is_alive


@pytest.mark.skipif(sys.platform != "linux", reason="where the clock is set anew, psutil tells other times on Linux")
def test_a_clock_that_is_set_anew_does_not_make_the_owner_look_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    this, booted = Owner.this(), psutil.boot_time()
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: booted + 3600)
    assert Owner.this().started == pytest.approx(this.started + 3600)
    assert this.is_alive


def test_a_killed_owner_is_named_and_passed_over(tmp_path: Path) -> None:
    write_json(tmp_path / OWNER_FILE, {"pid": 2**22 + 5, "host": "here", "started": 1.0})
    with only_run(tmp_path) as left:
        assert Owner.read(tmp_path / OWNER_FILE) == Owner.this()
    assert left is not None
    assert (left.pid, left.host) == (4194309, "here")
    assert not (tmp_path / OWNER_FILE).exists()


@pytest.fixture(params=[NotImplementedError("flock is not supported"), OSError(errno.ENOLCK, "No locks available")])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks, as both kinds of it say so."""
    import filelock

    def no_locks(self: object, timeout: float) -> None:
        raise request.param

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)


@pytest.mark.usefixtures("without_locks")
def test_on_a_file_system_without_locks_the_owners_entry_stands_in(tmp_path: Path) -> None:
    with only_run(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()}"), only_run(tmp_path):
        pass
    write_json(tmp_path / OWNER_FILE, vars(Owner(pid=2**22 + 5, host=Owner.this().host, started=1.0)))
    with only_run(tmp_path):
        pass
    write_json(tmp_path / OWNER_FILE, vars(Owner(pid=1, host="elsewhere", started=1.0)))
    with pytest.raises(InputError, match="another machine"), locks.only_run(tmp_path):
        pass


@pytest.mark.usefixtures("without_locks")
def test_preprocessed_data_that_cannot_be_locked_are_written_and_the_danger_is_said(
    fresh_dataset: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    with only_writer(fresh_dataset):
        assert "let no other run of Dataset501_Tiny begin" in capsys.readouterr().out


@pytest.mark.usefixtures("without_locks")
def test_labels_are_taken_in_and_decisions_made_where_there_are_no_locks(
    fresh_dataset: DatasetFolders, generated_folder: Path, tmp_path: Path
) -> None:
    case_id = Cohort.load(fresh_dataset.raw).unlabelled[0].case_id
    ((taken, _),) = take_in(fresh_dataset.raw, [generated_folder / HIDDEN_LABELS / f"{case_id}.nii.gz"])
    assert taken == case_id
    with DecisionFile(tmp_path) as decisions:
        decisions.append(Decision.TAKE_OUT, case_id=case_id)
    assert standing(read_decisions(decisions_path(tmp_path)))[case_id].taken_out


def test_a_run_whose_preprocessed_data_were_removed_makes_them_again(planned_run: RunContext) -> None:
    assert not planned_run.folders.preprocessed.exists()
    Room(planned_run).require("setup/plan")


@pytest.mark.parametrize(
    ("stage", "left"),
    [
        ("setup/plan", "preprocessed/nnUNetPlans_3d_fullres_un/subject_004/image.b2nd"),
        ("r00/train", "results/nnUNetTrainerSAM2__nnUNetPlans__3d_fullres_r00/fold_0/checkpoint_latest.pth"),
        ("r00/predict", "results/nnunet_sam2/3d_fullres_fold0/r00/student/probabilities/subject_004.npz"),
    ],
)
def test_room_for_what_a_killed_stage_left_is_not_asked_for_again(
    planned_run: RunContext, monkeypatch: pytest.MonkeyPatch, stage: str, left: str
) -> None:
    info = {"configuration": planned_run.configuration_name(0, final=False)}
    planned_run.ledger.run_stage("r00/data", {}, lambda: StageResult(info=info), what="data")
    monkeypatch.setattr(disk, "free_bytes", lambda folder: disk.RESERVE)
    with pytest.raises(StageError, match=stage):
        Room(planned_run).require(stage)
    root, name = left.split("/", 1)
    path = getattr(planned_run.folders, root) / name
    path.parent.mkdir(parents=True)
    path.touch()
    os.truncate(path, disk.stage_bytes(stage, Room(planned_run).size))  # takes no room
    Room(planned_run).require(stage)


def test_a_full_gpu_leaves_the_rest_of_a_stage_to_the_cpu_and_the_ledger_knows(tmp_path: Path) -> None:
    class Run:
        backend = "gpu"
        ledger = Ledger(tmp_path)

        def cpu_backend(self, like: object) -> str:
            return f"cpu like {like}"

    used: list[object] = []

    def work(backend: object) -> str:
        used.append(backend)
        if backend == "gpu":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return "labels"

    run = Run()
    run.ledger.append("started", stage="setup/sam2", key="", inputs={})
    assert on_cpu_if_full(run, work) == "labels"  # type: ignore[arg-type]
    assert used == ["gpu", "cpu like gpu"]
    noted = run.ledger.events[-1]
    assert (noted["event"], noted["stage"]) == ("retried", "setup/sam2")
    assert "GPU ran out of memory" in noted["cause"]
    with pytest.raises(RuntimeError, match="shape"):
        on_cpu_if_full(run, lambda backend: (_ for _ in ()).throw(RuntimeError("shape mismatch")))  # type: ignore[arg-type]


def test_a_plain_locale_converts_and_shows_what_it_has_no_letters_for(generated_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "Ärzte und Öfen"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("LC_") and name != "LANG"},
        **{f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")},
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }

    def command(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        argv = [sys.executable, "-m", "nnunet_sam2.cli.main", *arguments]
        return subprocess.run(argv, env=environment, capture_output=True, timeout=120)

    done = command("convert", str(generated_folder), "-d", "501", "-n", "Plain")
    assert done.returncode == 0, done.stderr
    results = root / "results" / "Dataset501_Plain" / "nnunet_sam2" / "3d_fullres_fold0"
    Ledger(results).append("run", options={**RunOptions().to_json(), "sam2": "größe.pt"})
    shown = command("status", "-d", "501")
    assert shown.returncode == 0, shown.stderr
    as_json = command("status", "-d", "501", "--json")
    assert as_json.returncode == 0, as_json.stderr
    assert json.loads(as_json.stdout)["options"]["sam2"] == "größe.pt"
    refused = command("status", "-d", "501", "--run", "größe")
    assert refused.returncode == 2, refused.stderr
    assert b"has no run" in refused.stderr


def test_events_are_written_in_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    Ledger(tmp_path).append("note", text="größer")
    assert "größer" in (tmp_path / LEDGER_FILE).read_bytes().decode("utf-8")
