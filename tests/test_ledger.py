"""The ledger: done stages are skipped, changed ones run again, cut lines are dropped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunet_sam2.errors import InputError
from nnunet_sam2.rounds.ledger import LEDGER_FILE, Ledger, StageResult, read_events


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
