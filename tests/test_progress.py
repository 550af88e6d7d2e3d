"""A bar in a log file is lines; on a terminal it stays one."""

from __future__ import annotations

import time

import pytest
from tqdm import tqdm

from nnunet_sam2.progress import bar_options, say


def test_a_bar_in_a_log_file_leaves_lines_and_what_follows_begins_one(capsys: pytest.CaptureFixture[str]) -> None:
    options = {**bar_options(), "mininterval": 0.0, "miniters": 1, "delay": 0.01}
    for _ in tqdm(range(3), desc="labelling", **options):
        time.sleep(0.02)
    told = capsys.readouterr().err
    assert "\r" not in told
    assert told.endswith("\n")
    lines = [line for line in told.splitlines() if line]
    assert len(lines) >= 3
    assert all(line.startswith("labelling: ") for line in lines)
    say("next")
    assert capsys.readouterr().out == "next\n"
