"""The ledger: done stages are skipped, changed ones run again, cut lines are dropped."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nnunet_sam2.errors import InputError
from nnunet_sam2.rounds.ledger import BACKUP_FILE, HASH, LEDGER_FILE, PREVIOUS, Ledger, StageResult, read_events


def _stage(ledger: Ledger, calls: list[str], *, inputs: dict[str, int], text: str = "label") -> dict:
    path = ledger.folder / "out.txt"

    def work() -> StageResult:
        calls.append("work")
        path.write_text(text)
        return StageResult(files=(path,), info={"n": 1})

    return ledger.run_stage("r01/label", inputs, work, what="labels")


def test_a_done_stage_is_not_run_again_by_a_new_process(tmp_path: Path) -> None:
    calls: list[str] = []
    first = _stage(Ledger(tmp_path), calls, inputs={"seed": 1})
    again = _stage(Ledger(tmp_path), calls, inputs={"seed": 1})
    assert calls == ["work"]
    assert again == first
    assert again["info"] == {"n": 1}


def test_other_inputs_run_the_stage_again(tmp_path: Path) -> None:
    calls: list[str] = []
    first = _stage(Ledger(tmp_path), calls, inputs={"seed": 1})
    second = _stage(Ledger(tmp_path), calls, inputs={"seed": 2})
    assert calls == ["work", "work"]
    assert first["digest"] != second["digest"]


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_stage_whose_file_changed_or_vanished_runs_again(tmp_path: Path, damage: str) -> None:
    calls: list[str] = []
    _stage(Ledger(tmp_path), calls, inputs={})
    if damage == "changed":
        (tmp_path / "out.txt").write_text("lavel")
    else:
        (tmp_path / "out.txt").unlink()
    _stage(Ledger(tmp_path), calls, inputs={})
    assert calls == ["work", "work"]
    assert (tmp_path / "out.txt").read_text() == "label"


def test_a_file_outside_of_a_folder_that_a_link_leads_to_is_found_again(tmp_path: Path) -> None:
    (tmp_path / "other" / "disk" / "results").mkdir(parents=True)
    (tmp_path / "results").symlink_to(tmp_path / "other" / "disk" / "results")
    outside, calls = tmp_path / "preprocessed.json", []
    outside.write_text("plans")

    def work() -> StageResult:
        calls.append("work")
        return StageResult(files=(outside,))

    for _ in range(2):
        Ledger(tmp_path / "results" / "run").run_stage("setup/plan", {}, work, what="plan")
    assert calls == ["work"]


def test_a_stage_that_was_started_but_not_ended_runs_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)

    def killed() -> StageResult:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.run_stage("r01/label", {}, killed, what="labels")
    calls: list[str] = []
    _stage(Ledger(tmp_path), calls, inputs={})
    assert calls == ["work"]


def test_the_digest_of_a_stage_depends_on_the_bytes_it_wrote(tmp_path: Path) -> None:
    one = _stage(Ledger(tmp_path / "a"), [], inputs={}, text="one") if (tmp_path / "a").mkdir() is None else {}
    two = _stage(Ledger(tmp_path / "b"), [], inputs={}, text="two") if (tmp_path / "b").mkdir() is None else {}
    assert one["key"] == two["key"]
    assert one["digest"] != two["digest"]


def test_a_line_cut_short_by_a_kill_is_dropped_and_the_ledger_goes_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append("run", options={"a": 1})
    with (tmp_path / LEDGER_FILE).open("a") as handle:
        handle.write('{"version": 1, "event": "don')
    Ledger(tmp_path).append("stopped", reason="converged", best_round=1)
    events = read_events(tmp_path / LEDGER_FILE)
    assert [event["event"] for event in events] == ["run", "stopped"]


def test_a_broken_line_in_the_middle_is_refused_with_its_number(tmp_path: Path) -> None:
    Ledger(tmp_path).append("run", options={})
    path = tmp_path / LEDGER_FILE
    path.write_text("{oops\n" + path.read_text())
    with pytest.raises(InputError, match="line 1"):
        Ledger(tmp_path)


def test_a_ledger_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).write_text(json.dumps({"version": 99, "event": "run"}) + "\n")
    with pytest.raises(InputError, match="version"):
        Ledger(tmp_path)


def _finished_round(folder: Path) -> Path:
    ledger = Ledger(folder)
    ledger.append("run", options={"größe": [1.5, None]})
    (folder / "r01").mkdir()
    _stage(ledger, [], inputs={})
    ledger.append("stopped", reason="converged", best_round=1)
    return folder / LEDGER_FILE


def test_a_flipped_bit_in_any_line_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = _finished_round(tmp_path)
    whole, events = path.read_bytes(), read_events(path)
    for bit in np.random.default_rng(0).choice(8 * len(whole), 1000, replace=False).tolist():
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with contextlib.suppress(InputError):
            assert read_events(path) == events, f"bit {bit}"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_line_that_was_taken_out_is_missed(tmp_path: Path, number: int) -> None:
    path = _finished_round(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:number] + lines[number + 1 :]))
    with pytest.raises(InputError, match=f"line {number + 1}, .* does not follow on"):
        read_events(path)


def test_a_ledger_of_a_version_without_hashes_goes_on_and_is_held_from_there(tmp_path: Path) -> None:
    path = _finished_round(tmp_path)
    old = [{k: v for k, v in event.items() if k not in (HASH, PREVIOUS)} for event in read_events(path)]
    path.write_text("".join(json.dumps(event) + "\n" for event in old))
    Ledger(tmp_path).append("note", text="of this version")
    assert len(Ledger(tmp_path).events) == len(old) + 1
    path.write_text(path.read_text().replace("converged", "collapsed"))
    with pytest.raises(InputError, match=r"line 5, .note. does not follow on"):
        Ledger(tmp_path)


@pytest.mark.parametrize("lose", [Path.unlink, lambda path: path.write_text("")])
@pytest.mark.parametrize("with_backup", [True, False])
def test_a_lost_ledger_beside_finished_rounds_stops_and_its_backup_stays(
    tmp_path: Path, lose: Callable[[Path], object], with_backup: bool
) -> None:
    path, backup = _finished_round(tmp_path), tmp_path / BACKUP_FILE
    if with_backup:
        Ledger(tmp_path)  # a start
    whole = path.read_text()
    lose(path)
    with pytest.raises(InputError, match=f"cp .*{BACKUP_FILE}.*--branch" if with_backup else "r01 .*--branch"):
        Ledger(tmp_path)
    if with_backup:
        assert backup.read_text() == whole
        shutil.copyfile(backup, path)
        assert len(Ledger(tmp_path).events) == 4


def test_a_ledger_that_lost_its_end_does_not_replace_the_longer_backup(tmp_path: Path) -> None:
    path = _finished_round(tmp_path)
    Ledger(tmp_path)
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:2]))
    with pytest.raises(InputError, match=r"has 2 entries, and ledger\.backup\.jsonl has 4"):
        Ledger(tmp_path)
    assert (tmp_path / BACKUP_FILE).read_text() == whole
