"""The report of a run whose ledger, records and label files lie on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import HIDDEN_LABELS, TEST_LABELS, Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.report import write
from nnunet_sam2.report.gather import gather
from nnunet_sam2.report.pictures import unpack
from nnunet_sam2.report.run_files import RunFiles
from nnunet_sam2.report.words import Said
from nnunet_sam2.report.write import REPORT_FILE, pictures_of, try_to_report, write_report
from nnunet_sam2.review.take_in import take_in
from nnunet_sam2.rounds.decisions.holds import CaseHold, holds_of, holds_to_json
from nnunet_sam2.rounds.decisions.record import Decision, DecisionFile, decisions_path, read_decisions
from nnunet_sam2.rounds.ledger import Ledger, StageResult
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.state import run_folder
from nnunet_sam2.storage import file_hash
from nnunet_sam2.volumes import write_label

Stage = Callable[..., None]


def test_the_account_says_what_ledger_and_records_hold(run: tuple[DatasetFolders, Path]) -> None:
    folders, folder = run
    account = gather(RunFiles.open(folders, folder))
    assert account.gain == pytest.approx(0.08)
    assert account.best is not None
    assert account.best.number == 2
    assert (account.stop_reason, account.validation_cases, account.calibration_cases) == ("round limit", 1, 2)
    assert [r.confident for r in account.rounds] == [None, 0.4, 0.4]
    sizes = [np.prod(c.geometry.spacing_xyz_mm) / 1000 for c in Cohort.load(folders.raw).unlabelled]
    assert account.rounds[2].volumes[1] == pytest.approx((720 * sizes[0] + 700 * sizes[1]) / 2)
    assert 0 < account.human_volumes[2] < account.human_volumes[1]
    used, left_out = account.unlabelled
    assert left_out.left_out == "its estimated Dice is below 0.3"
    assert left_out.missing == (2,)
    assert [q.estimate for q in used.classes] == [0.82, 0.25]
    assert [q.distrusted for q in used.classes] == [False, True]
    assert [(q.lower, q.change) for q in used.classes] == [(0.7, 0.02), (0.5, 0.04)]
    assert {cost.name for cost in account.costs} >= {"nnU-Net training", "fusing labels", "planning, preprocessing"}


def test_held_out_cases_have_the_students_dice_and_the_others_that_of_sam_2(run: tuple[DatasetFolders, Path]) -> None:
    account = gather(RunFiles.open(*run))
    held_out, other = [case for case in account.cases if case not in account.unlabelled][:2]
    assert held_out.held_out
    assert held_out.classes[0].measured == pytest.approx(0.88)
    assert not other.held_out
    assert [q.measured for q in other.classes] == [0.81, 0.62]


def test_versions_hashes_and_what_else_happened_are_kept(run: tuple[DatasetFolders, Path]) -> None:
    provenance = gather(RunFiles.open(*run)).provenance
    assert provenance.machines == ({"packages": {"nnunetv2": "2.8.1"}, "cores": 2},)
    assert provenance.sam2["checkpoint_hash"] == "cd" * 32
    assert "retried: stage r02/train, cause out of memory" in provenance.notes[0]
    assert {row[4] for row in provenance.inputs} == {"", "ff" * 32}
    assert provenance.report_machine["packages"]["nnunetv2"] != "not installed"


def test_the_report_needs_neither_hidden_nor_test_labels(run: tuple[DatasetFolders, Path]) -> None:
    folders, folder = run
    for name in (HIDDEN_LABELS, TEST_LABELS):
        for path in (folders.raw / name).glob("*"):
            path.unlink()
    path = write_report(folders, folder)
    assert path == folder / REPORT_FILE
    text = path.read_text(encoding="utf-8")
    assert text.count('<script type="text/plain" id="px') == 5
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_label_files_have_their_hashes_where_the_path_of_the_results_has_dots(run: tuple[DatasetFolders, Path]) -> None:
    folders, folder = run
    files = RunFiles.open(folders, folder / ".." / folder.name)
    shown = files.label_files(files.cohort.unlabelled[0])["last"]
    assert files.hashes[shown] == file_hash(shown)


def test_pictures_show_first_last_and_human_labels_and_the_story(run: tuple[DatasetFolders, Path]) -> None:
    files = RunFiles.open(*run)
    pictures = pictures_of(files, gather(files), None)
    unlabelled = files.cohort.unlabelled[0].case_id
    header, parts = unpack(pictures.blocks[unlabelled])
    assert header["planes"] == ["first", "last", "confidence"]
    maps = np.frombuffer(parts["maps"], np.uint8).reshape(3, -1)
    assert (maps[0] != maps[1]).any()
    story = parts["story"].decode()
    assert "supports: one, two" in story
    assert "changed by 0.020" in story
    held_out, other = (unpack(pictures.blocks[c.case_id])[0]["planes"] for c in files.cohort.labelled[:2])
    assert held_out == ["first", "last", "human", "confidence"]
    assert other == ["first", "human", "confidence"]


def test_a_labelled_case_is_shown_with_the_label_of_sam_2_that_its_dice_belongs_to(
    run: tuple[DatasetFolders, Path],
) -> None:
    folders, folder = run
    shutil.copytree(folder / "sam2", folder / "r03" / "sam2")
    ledger = Ledger(folder)
    again = ledger.run_stage("r03/sam2", {"drawn": 1}, lambda: StageResult(), what="SAM 2 labels anew")
    info = RunFiles.open(folders, folder).done["r02/fuse"]["info"]
    ledger.run_stage("r03/fuse", {"supports": again["digest"]}, lambda: StageResult(info=info), what="labels")
    files = RunFiles.open(folders, folder)
    labelled, unlabelled = files.cohort.labelled[0], files.cohort.unlabelled[0]
    for case, place in ((labelled, folder / "r03" / "sam2" / "labelled"), (unlabelled, folder / "sam2" / "unlabelled")):
        assert files.label_files(case)["first"].parent == place
    assert files.record_file(labelled) == folder / "r03" / "sam2" / "labelled" / "members" / f"{labelled.case_id}.json"


def test_between_rounds_the_cases_to_look_at_first_alone_have_pictures(run: tuple[DatasetFolders, Path]) -> None:
    files = RunFiles.open(*run)
    pictures = pictures_of(files, gather(files), 1)
    first, labelled = pictures.blocks
    assert first == files.cohort.unlabelled[1].case_id
    assert labelled == files.cohort.labelled[0].case_id
    assert "2 of 5 cases have pictures" in pictures.note


def test_a_case_whose_file_is_damaged_is_shown_without_pictures_and_with_the_reason(
    run: tuple[DatasetFolders, Path],
) -> None:
    folders, folder = run
    case = Cohort.load(folders.raw).unlabelled[0].case_id
    path = folder / "r02" / "labels" / f"{case}.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    text = write_report(folders, folder).read_text(encoding="utf-8")
    assert text.count('<script type="text/plain" id="px') == 4
    assert path.name in text


def test_a_case_whose_file_may_not_be_read_is_no_end_of_the_report(
    run: tuple[DatasetFolders, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(write, "read_label", refuse)
    assert "Permission denied" in write_report(*run).read_text(encoding="utf-8")


def test_options_of_a_later_version_are_named(run: tuple[DatasetFolders, Path]) -> None:
    Ledger(run[1]).append("run", options={**RunOptions().to_json(), "later": 1})
    with pytest.raises(InputError, match="option 'later' is unknown to this version"):
        write_report(*run)


def test_a_report_that_fails_says_so_in_one_line_and_stops_nothing(
    run: tuple[DatasetFolders, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folders, folder = run
    (folder / "r01" / "labels" / "round.json").write_text("{")
    assert try_to_report(folders, folder) is None
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 1
    assert "round.json" in said[0]
    assert not (folder / REPORT_FILE).exists()


def test_the_report_tells_peoples_word_apart_from_estimates(run: tuple[DatasetFolders, Path]) -> None:
    folders, folder = run
    first, second = (case.case_id for case in Cohort.load(folders.raw).unlabelled)
    holds = {first: CaseHold(accepted={1: "ab"}, rejected=(2,)), second: CaseHold(taken_out=True)}
    told = [{"time": 0, "decision": "accept", "case": first, "classes": [1]}]
    Ledger(folder).append("review", round=3, holds=holds_to_json(holds), decisions=told, lines=1)
    account = gather(RunFiles.open(folders, folder))
    used, left_out = account.unlabelled
    assert (used.word, left_out.word) == ("accepted: large_organ; rejected: small_organ", "")
    assert not any(q.distrusted for q in used.classes)
    (note,) = [note for note in account.provenance.notes if "people's word" in note]
    assert note.endswith(f"from round 3 on people's word on 2 cases holds: accept {first} large_organ")
    assert "accepted: large_organ; rejected: small_organ" in write_report(folders, folder).read_text(encoding="utf-8")


def _draw(folders: DatasetFolders, case_id: str, work: Path, *, classes: list[str] | None = None) -> None:
    geometry = Cohort.load(folders.raw).case(case_id).geometry
    mine = np.zeros(geometry.shape_zyx, np.uint8)
    mine[3:8, 8:20, 8 : 16 + int(case_id[-1])] = 1  # nobody draws two cases alike
    mine[4:7, 24:32, 24:32] = 2
    write_label(work / f"{case_id}.nii.gz", mine, geometry)
    take_in(folders.raw, [work / f"{case_id}.nii.gz"], classes=classes)


def test_what_people_drew_or_decided_is_known_at_once_and_leaves_the_cases_to_look_at_first(
    run: tuple[DatasetFolders, Path], tmp_path: Path
) -> None:
    folders, folder = run
    first, second = (case.case_id for case in Cohort.load(folders.raw).unlabelled)

    def look_first() -> list[str]:
        return [case.case_id for case in gather(RunFiles.open(folders, folder)).look_first(5)]

    files = RunFiles.open(folders, folder)
    shown = files.newest_label(files.cohort.case(first))
    assert shown is not None
    assert look_first() == [second, first]
    with DecisionFile(folder) as decisions:
        decisions.append(Decision.ACCEPT, case_id=first, classes=(1,), label=shown[1])
        assert look_first() == [second, first]
        decisions.append(Decision.REJECT, case_id=first, classes=(2,), label="ab" * 32)  # of an older label
        assert look_first() == [second, first]
        decisions.append(Decision.REJECT, case_id=first, classes=(2,), label=shown[1])
        assert look_first() == [second]
        decisions.append(Decision.CLEAR, case_id=first, classes=(2,))
    _draw(folders, second, tmp_path)
    _draw(folders, first, tmp_path, classes=["small_organ"])
    account = gather(RunFiles.open(folders, folder))
    assert account.look_first(5) == []
    assert [case.said for case in account.unlabelled] == [Said.ACCEPTED, Said.DRAWN]
    assert account.waiting == 2
    page = write_report(folders, folder).read_text(encoding="utf-8")
    assert "1 drawn by hand, 1 accepted, word on 2 waits for the next round" in page
    assert page.count('<script type="text/plain" id="px') == 5
    with DecisionFile(folder) as decisions:
        decisions.append(Decision.TAKE_OUT, case_id=second)
    files = RunFiles.open(folders, folder)
    holds = holds_of(files.cohort, read_decisions(decisions_path(folder)), held_out_patients=files.held_out_patients)
    Ledger(folder).append("review", round=3, holds=holds_to_json(holds), decisions=[], lines=5)
    assert "1 accepted, 1 taken out</span>" in write_report(folders, folder).read_text(encoding="utf-8")


def test_a_human_label_of_a_patient_who_is_validated_on_settles_nothing(
    run: tuple[DatasetFolders, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, folder = run
    second = Cohort.load(folders.raw).unlabelled[1]
    _draw(folders, second.case_id, tmp_path)
    assert second.case_id not in [case.case_id for case in gather(RunFiles.open(folders, folder)).look_first(5)]
    monkeypatch.setattr(RunFiles, "held_out_patients", frozenset({second.patient}))
    account = gather(RunFiles.open(folders, folder))
    assert account.look_first(5)[0].case_id == second.case_id
    assert account.unlabelled[1].said is None


def test_a_run_that_has_only_begun_has_a_report(fresh_dataset: DatasetFolders) -> None:
    options = RunOptions(fold="all")
    folder = run_folder(fresh_dataset, options.run_name)
    Ledger(folder).append("run", options=options.to_json())
    assert "Not finished yet" in write_report(fresh_dataset, folder).read_text(encoding="utf-8")


def test_the_command_writes_where_it_is_told_and_refuses_where_there_is_no_run(
    run: tuple[DatasetFolders, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out" / "mine.html"
    assert main(["report", "-d", "501", "--output", str(target), "--pictures", "0"]) == 0
    assert str(target) in capsys.readouterr().out
    assert 'id="px' not in target.read_text(encoding="utf-8")
    assert main(["report", "-d", "501", "--run", "none"]) == 2
    assert "has no run none" in capsys.readouterr().err


def test_the_report_imports_no_torch() -> None:
    script = "import sys, json, nnunet_sam2.report.write; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "nnunetv2", "sam2"} & set(json.loads(done.stdout))
