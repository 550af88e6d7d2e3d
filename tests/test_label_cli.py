"""``nnunet_sam2 label`` from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.folders import DatasetFolders

COMMON = ["label", "-d", "501", "--sam2", "untrained", "--image-size", "64", "--device", "cpu", "--threads", "1"]


def test_label_writes_all_unlabelled_cases_and_checks_the_supports(
    tiny_dataset: DatasetFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    extra = ["-o", str(out), "--cache-dir", str(tmp_path / "cache"), "--check", "--set", "check_slices=6"]
    assert main([*COMMON, *extra, "--set", "decoder=off"]) == 0
    cohort = Cohort.load(tiny_dataset.raw)
    for case in (*cohort.unlabelled, *cohort.labelled):
        assert (out / f"{case.case_id}{cohort.file_ending}").is_file()
        record = json.loads((out / "members" / f"{case.case_id}.json").read_text())
        assert record["options"]["check_slices"] == 6
    printed = capsys.readouterr().out
    assert "Dice with human labels" in printed
    assert "calibrated on 3 labelled cases" in printed
    assert str(out) in printed


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set", "neighbors=9"], "no option 'neighbors'"),
        (["--set", "check_slices=many"], "check_slices=many is not of kind int"),
        (["--set", "check_slices=-1"], "at least 0"),
        (["--set", "check_slices"], "NAME=VALUE"),
        (["--supports", "99"], "labelled cases"),
        (["--supports", "nobody"], "no case nobody"),
        (["--strategy", "prompted"], "needs the student"),
        (["--cases", "nobody"], "no case nobody"),
        (["--strategy", "insert", "--set", "insertions=99"], "has 12 slices, and insertions=99"),
        (["--strategy", "match", "--set", "metric=lpips", "--set", "lpips_weights=/no/file"], "does not exist"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tiny_dataset: DatasetFolders,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    assert main([*COMMON, "-o", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache"), *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom nnunet_sam2.cli.main import main\n"
        "try:\n    main(['label', '--help'])\nexcept SystemExit:\n    pass\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--strategy" in done.stdout
