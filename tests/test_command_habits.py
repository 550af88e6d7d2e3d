"""What hands type: near misses, both spellings, a help that can be read."""

from __future__ import annotations

import pytest

from nnunet_sam2.cli.main import main


@pytest.mark.parametrize(
    ("typed", "meant", "command"),
    [
        (["predct", "-d", "1"], "did you mean predict?", ""),
        (["convret"], "did you mean convert?", ""),
        (["run", "-d", "1", "--epoch", "3"], "did you mean --epochs?", " run"),
        (["evaluate", "-g", "a", "-p", "b", "--nsd-tolerence=2"], "did you mean --nsd-tolerance?", " evaluate"),
    ],
)
def test_a_near_miss_is_answered_with_what_was_meant_and_the_usage_of_that_command(
    typed: list[str], meant: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(typed)
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert meant in shown
    assert f"usage: nnunet_sam2{command} [" in shown


@pytest.mark.parametrize("command", ["predict", "label"])
@pytest.mark.parametrize("spelling", ["--save_probabilities", "--save-probabilities"])
def test_probabilities_are_saved_in_either_spelling(
    command: str, spelling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ["-i", "nowhere", "-o", "nowhere"] if command == "predict" else []
    assert main([command, "-d", "999", *folders, spelling]) == 2
    assert "unrecognized" not in capsys.readouterr().err


def test_the_help_of_run_is_sorted_into_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "-h"])
    shown = capsys.readouterr().out
    groups = ["every day:", "what SAM 2 labels with:", "schedule:", "when it stops:", "machine:"]
    assert [group for group in groups if group not in shown] == []
    assert shown.index("every day:") < shown.index("  --dry-run") < shown.index("what SAM 2 labels with:")
