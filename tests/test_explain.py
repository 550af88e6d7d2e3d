"""``nnunet_sam2 label --explain CASE``: what a label's record says, in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.explain.members import explain_member, ranges, slices
from nnunet_sam2.labelling.records import record_path
from nnunet_sam2.rounds.ending.convergence import Change
from nnunet_sam2.rounds.pseudo_labels import Fused
from nnunet_sam2.storage import read_json, write_json

LABEL = ["label", "-d", "501", "--sam2", "untrained", "--image-size", "64", "--device", "cpu", "--threads", "1"]
INSERT = ["supports=1", "insertions=2", "prompted_slices=2", "both_directions=no", "components=largest"]
EXPLAIN = ["label", "-d", "501", "--explain"]


def _label(out: Path, cache: Path, case_id: str, strategy: str, *settings: str) -> None:
    options = [text for setting in settings for text in ("--set", setting)]
    arguments = ["--strategy", strategy, "--cases", case_id, "-o", str(out), "--cache-dir", str(cache), *options]
    assert main([*LABEL, *arguments]) == 0


@pytest.fixture(scope="module")
def labels(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of the first labelled case by several strategies, a folder each. Read only."""
    root = tmp_path_factory.mktemp("explained")
    case_id = cohort.labelled[0].case_id
    _label(root / "insert", root / "cache", case_id, "insert", *INSERT)
    _label(root / "match", root / "cache", case_id, "match", "augmentations=1", "shortlist=1", "metric=ssim")
    _label(root / "guided", root / "cache", case_id, "guided", "second_pass=off")
    _label(root / "transfer", root / "cache", case_id, "transfer", "decoder=off")
    return root


def _explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*EXPLAIN, *arguments]) == 0
    return capsys.readouterr().out


def test_insert_names_supports_prompts_places_and_what_was_left_out(
    cohort: Cohort, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case_id = cohort.labelled[0].case_id
    text = _explained(capsys, case_id, "-o", str(labels / "insert"))
    record = read_json(record_path(labels / "insert", case_id))
    assert record["fusion"]["components"] == "largest"
    assert len(record["members"]) == 2
    for member in record["members"]:
        for entry in member["classes"].values():
            assert f"inserted before query slice {entry['place']['before_query_slice']};" in text
            assert f"{entry['support']}, {slices(entry['prompted_slices'])} with masks" in text
            assert f"{slices(entry['slices_beyond_limit'])}, which are more than prompted_slices allows" in text
    used = record["members"][0]["support"]
    (unused,) = {case.case_id for case in cohort.labelled[1:]} - {used}
    assert f"left out: support {unused}: less similar than those that supports=1 allows" in text
    for name, value in cohort.labels.items():
        if value:
            assert f"class {value} ({name}): {record['voxels'][str(value)]} voxels" in text
    assert "Dice with the human label" in text


def test_match_says_which_slices_were_carried_to_which(
    cohort: Cohort, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case_id = cohort.labelled[0].case_id
    text = _explained(capsys, case_id, "-o", str(labels / "match"))
    (member,) = read_json(record_path(labels / "match", case_id))["members"]
    (pool,) = member["pools"]
    for value in pool["classes"]:
        carried = [n for n, found in enumerate(pool["slices"]) if str(value) in found["classes"]]
        rest = [n for n in range(len(pool["slices"])) if n not in carried]
        assert f"match:0: carried to query {slices(carried)} from " in text
        assert f"query {slices(rest)}: the most similar support slice does not show it" in text
    assert "; ssim 0." in text
    assert "2 candidates a slice" in text


def test_other_strategies_are_explained_too(cohort: Cohort, labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case_id, others = cohort.labelled[0].case_id, ", ".join(c.case_id for c in cohort.labelled[1:])
    assert f"transfer: nearest locations of {others}; the decoder does not redraw it" in _explained(
        capsys, case_id, "-o", str(labels / "transfer")
    )
    text = _explained(capsys, case_id, "-o", str(labels / "guided"))
    assert "too few of the similar support slices show it" in text
    assert "second_pass=off" in text


def test_json_is_the_record_itself(cohort: Cohort, labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case_id = cohort.labelled[0].case_id
    value = json.loads(_explained(capsys, case_id, "-o", str(labels / "insert"), "--json"))
    path = record_path(labels / "insert", case_id)
    assert value == {"case": case_id, "records": [{"file": str(path), "record": read_json(path)}], "rounds": []}


def test_a_runs_folder_tells_what_its_rounds_made_of_the_label(
    cohort: Cohort, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case_id = cohort.labelled[0].case_id
    record = read_json(record_path(labels / "insert", case_id))
    write_json(record_path(tmp_path / "run" / "sam2" / "unlabelled", case_id), record)
    fused = Fused(
        folder=tmp_path,
        used_cases=(),
        left_out={case_id: "its label is empty"},
        change=Change(by_case={case_id: {1: 0.125}}, mean=0.1, worst_tenth=0.2),
        quality={"sam2": {1: 0.8}, "student": {1: 0.9}},
        voxels={case_id: {1: 34}},
        confidence={case_id: 0.75},
        temperatures={"sam2": 0.65, "student": 1.27},
        right={1: 0.4},
        held_out=2,
    )
    write_json(tmp_path / "run" / "r02" / "labels" / "round.json", fused.to_json())
    for folder in (tmp_path, tmp_path / "run"):
        text = _explained(capsys, case_id, "-o", str(folder))
        assert "sam2/unlabelled/members" in text
        assert "34 voxels from sam2 with estimated Dice 0.80, student with estimated Dice 0.90" in text
        assert "sam2 right in 0.40 of where they differ" in text
        assert "sam2 0.65, student 1.27; the student measured on 2 held out" in text
        assert "changed by 0.125 since the round before" in text
        assert "left out: not trained on, because its label is empty" in text


@pytest.mark.parametrize(
    ("word", "said", "unsaid"),
    [
        (
            {"drawn": [1, 2]},
            ("labels/round.json): drawn by hand", "34 voxels, drawn by hand; changed by", "12 voxels, drawn by hand"),
            ("from sam2", "student", "fused", "where in doubt"),
        ),
        (
            {"human_cases": True},  # as records were once
            ("labels/round.json): drawn by hand", "34 voxels, drawn by hand; changed by", "12 voxels, drawn by hand"),
            ("from sam2", "student", "fused", "where in doubt"),
        ),
        (
            {"accepted": [1]},
            ("34 voxels, accepted by a person; changed by", "12 voxels from sam2", "fused to: 0.50", "where in doubt"),
            ("fused to: 0.85", "drawn by hand"),
        ),
        (
            {"accepted": [2], "drawn": [1]},
            ("34 voxels, drawn by hand", "12 voxels, accepted by a person", "where in doubt"),
            ("from sam2", "fused to:"),
        ),
    ],
)
def test_what_people_drew_or_accepted_is_told_in_place_of_the_sources(
    cohort: Cohort,
    labels: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    word: dict[str, Any],
    said: tuple[str, ...],
    unsaid: tuple[str, ...],
) -> None:
    case_id = cohort.labelled[0].case_id
    record = read_json(record_path(labels / "insert", case_id))
    write_json(record_path(tmp_path / "run" / "sam2" / "unlabelled", case_id), record)
    fused = Fused(
        folder=tmp_path,
        used_cases=(case_id,),
        left_out={},
        change=Change(by_case={case_id: {1: 0.125}}, mean=0.1, worst_tenth=0.2),
        quality={"sam2": {1: 0.8, 2: 0.8}, "student": {1: 0.9, 2: 0.9}},
        voxels={case_id: {1: 34, 2: 12}},
        confidence={case_id: 0.75},
        estimates={case_id: {1: 0.85, 2: 0.5}},
    ).to_json()
    if "human_cases" in word:
        del fused["drawn"], fused["accepted"]
        fused["human_cases"] = [case_id]
    else:
        fused |= {key: {case_id: values} for key, values in word.items()}
    write_json(tmp_path / "run" / "r02" / "labels" / "round.json", fused)
    told = _explained(capsys, case_id, "-o", str(tmp_path)).split("r02/")[1]
    assert not [text for text in said if text not in told]
    assert not [text for text in unsaid if text in told]


def test_without_a_folder_all_labels_of_the_dataset_are_explained(
    cohort: Cohort, labels: Path, tiny_dataset: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    case_id = cohort.labelled[0].case_id
    home = tiny_dataset.results / "nnunet_sam2"
    paths = [record_path(home / f"labels_{name}", case_id) for name in ("insert", "match")]
    for path in paths:
        write_json(path, read_json(record_path(labels / path.parts[-3].removeprefix("labels_"), case_id)))
    try:
        text = _explained(capsys, case_id)
    finally:
        for path in paths:
            path.unlink()
    assert "strategy insert (labels_insert/members/" in text
    assert "strategy match (labels_match/members/" in text


def test_a_case_without_a_record_is_refused_by_name(
    cohort: Cohort, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled, other = cohort.labelled[0].case_id, cohort.unlabelled[0].case_id
    broken = tmp_path / "broken"
    write_json(record_path(broken, labelled), {"case": labelled})
    for arguments, message in (
        (["nobody"], "no case nobody in"),
        ([other, "-o", str(labels / "insert")], f"holds no record of {other} (there are records of {labelled})"),
        ([other, "-o", str(labels / "insert")], f"label it with: nnunet_sam2 label -d 501 --cases {other}"),
        ([other, "-o", str(tmp_path / "none")], f"{tmp_path / 'none'} does not exist"),
        ([labelled, "-o", str(broken)], "is no record of a label"),
    ):
        assert main([*EXPLAIN, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_explaining_imports_no_torch(cohort: Cohort, labels: Path) -> None:
    arguments = [*EXPLAIN, cohort.labelled[0].case_id, "-o", str(labels)]
    code = (
        f"import sys\nfrom nnunet_sam2.cli.main import main\nstatus = main({arguments!r})\n"
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert "strategy guided" in done.stdout


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ({"after_support_slice": 4}, "the query inserted after support slice 4"),
        (
            {"support_slices": [3, 5], "query_slices": [7, 7]},
            "support slices 3-5 exchanged for query slice 7",
        ),
        (
            {"chunks": [{"query_slices": [0, 2], "before_support_slice": 6, "instead_of_support_slices": [5]}]},
            "query slices 0-2 before support slice 6",
        ),
    ],
)
def test_every_mode_of_insert_has_its_words(place: dict[str, object], text: str) -> None:
    entry = {"support": "a", "prompted_slices": [1, 2, 4], "place": place, "slices_found": 2, "estimated_iou": None}
    member = {"name": "insert:b:0", "support": "b", "classes": {"1": entry, "2": {"absent_in_all_supports": True}}}
    (made,) = explain_member("insert", member, "1").made
    start = "insert:b:0: a (for b, which does not show the class), slices 1-2, 4 with masks, "
    assert made == f"{start}{text}; found on 2 query slices"
    assert explain_member("insert", member, "2").left_out == ["no support shows it at model size"]


def test_runs_of_numbers_are_drawn_together() -> None:
    assert ranges([3, 1, 2, 7, 9, 10]) == "1-3, 7, 9-10"
    assert slices([5]) == "slice 5"
