"""What people type that no one expected: a refusal in one line, soon, and never a traceback."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.labels import make_label_table, parse_labels, table_from_json
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.checks import readable
from nnunet_sam2.folders import MOST_LETTERS, new_dataset_folders
from nnunet_sam2.rounds.nnunet.failures import process_error


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "a\ud800", "<b>liver</b>", "liver & spleen", "\x1b[31mred", " "])
def test_a_class_name_that_cannot_be_shown_as_it_is_is_refused(name: str) -> None:
    with pytest.raises(InputError) as refused:
        make_label_table({name: 1})
    str(refused.value).encode()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["Leber", "肝臓", "left kidney (upper)", "tumour + oedema", "é"])
def test_a_class_name_of_any_language_is_taken(name: str) -> None:
    assert make_label_table({name: 1}).labels == {"background": 0, name: 1}


@pytest.mark.parametrize(
    "text",
    [
        "liver=" + "9" * 5000,
        "liver=²",
        "liver=٣",
        "liver=1+" + "9" * 5000,
        '{"liver": ' + "9" * 5000 + "}",
        '{"liver": "' + "9" * 5000 + '"}',
        '{"' + "9" * 5000 + '": "liver"}',
        '{"liver": ' + "[" * 3000 + "]" * 3000 + "}",
        '{"liver": ' + "[" * 300_000 + "}",
        '{"liver": true}',
        '{"liver": [1, true]}',
        '{"liver": 1.5}',
        '{"liver": NaN}',
        '{"liver": Infinity}',
    ],
)
def test_a_label_table_out_of_all_measure_is_refused_in_a_short_line(text: str) -> None:
    with pytest.raises(InputError) as refused:
        make_label_table(*parse_labels(text))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_booleans_are_no_label_values_whichever_way_they_come() -> None:
    with pytest.raises(InputError):
        table_from_json({"labels": {"background": False, "liver": True}}, "dataset.json")
    with pytest.raises(InputError):
        make_label_table({"liver": True})


def test_labels_from_a_pipe_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "labels.json")
    with pytest.raises(InputError, match="is no file"):
        parse_labels(str(tmp_path / "labels.json"))


def test_a_region_of_many_values_takes_no_longer_than_it_has_values() -> None:
    begun = time.process_time()
    make_label_table({"all": list(range(1, 60_001)), "one": 1}, [1, 2])
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("length", [MOST_LETTERS + 1, 250, 5000])
def test_a_dataset_name_that_no_file_can_bear_is_refused(length: int, fresh_roots: Path) -> None:
    with pytest.raises(InputError, match="letters"):
        new_dataset_folders(501, "n" * length)
    assert new_dataset_folders(501, "n" * MOST_LETTERS).dataset_id == 501


@pytest.mark.parametrize("links", [{"loop": "loop"}, {"loop": "other", "other": "loop"}, {"loop": "nowhere"}])
def test_a_source_that_links_to_itself_or_nowhere_is_refused(
    links: dict[str, str], fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, target in links.items():
        (fresh_roots / name).symlink_to(fresh_roots / target)
    assert main(["convert", str(fresh_roots / "loop"), "-d", "501", "-n", "Loop"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_may_not_be_read_is_refused_with_the_file_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"images cannot be read \(Permission denied\).*chmod"), readable(tmp_path):
        raise PermissionError(13, "Permission denied", str(tmp_path / "images"))


def test_a_refusal_in_a_child_process_comes_through_as_a_refusal(tmp_path: Path) -> None:
    said = (
        "Traceback (most recent call last):\n  File x\nnnunet_sam2.errors.InputError: no configuration 3d; choose 2d\n"
    )
    error = process_error("probe", 1, log=tmp_path / "log", said=said, shown_lines=40)
    assert isinstance(error, InputError)
    assert str(error) == "no configuration 3d; choose 2d"
    # one that was handled, and a crash after it, is a crash
    crashed = said + "During handling of the above exception, another exception occurred:\nRuntimeError: broken\n"
    assert error.exit_status == 2
    assert process_error("probe", 1, log=tmp_path / "log", said=crashed, shown_lines=40).exit_status == 1
