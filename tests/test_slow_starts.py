"""What a command imports before it does anything: seconds of processor time that every call pays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nnunet_sam2.geometry import Geometry
from nnunet_sam2.volumes import write_label

HEAVY = ("torch", "monai", "nnunetv2", "sam2", "matplotlib", "pandas", "lpips", "peft", "faiss")
_CODE = """
import json, resource, sys
from nnunet_sam2.cli.main import main
status = main(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([status, [m for m in sys.argv[1].split(",") if m in sys.modules], used.ru_utime + used.ru_stime]))
"""


def _started(*argv: str) -> tuple[int, list[str], float]:
    """Run a command in a process of its own; return its status, what it imported of the heavy ones, CPU seconds."""
    done = subprocess.run(
        [sys.executable, "-c", _CODE, ",".join(HEAVY), *argv], capture_output=True, text=True, check=True
    )
    status, imported, seconds = json.loads(done.stdout.splitlines()[-1])
    return status, imported, seconds


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A reference and a prediction of 16 x 48 x 48 voxels."""
    folder = tmp_path_factory.mktemp("maps")
    geometry = Geometry(shape_zyx=(16, 48, 48), spacing_xyz_mm=(1.0, 1.0, 2.0))
    label = np.zeros(geometry.shape_zyx, np.uint8)
    label[4:9, 10:20, 10:30] = 1
    for name, drawn in (("truth", label), ("guess", np.roll(label, 1, axis=1))):
        write_label(folder / name / "a.nii.gz", drawn, geometry)
    return folder / "truth", folder / "guess"


def test_evaluating_a_case_imports_nothing_heavy_and_takes_two_seconds_at_most(maps: tuple[Path, Path]) -> None:
    status, imported, seconds = _started("evaluate", "-g", str(maps[0]), "-p", str(maps[1]))
    assert (status, imported) == (0, [])
    assert seconds < 2.0


def test_doctor_imports_torch_alone_and_takes_little_more_than_that() -> None:
    code = (
        "import resource, torch; used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    _, imported, seconds = _started("doctor")
    assert imported == ["torch"]
    assert seconds < 5.0 or seconds < 2.0 * float(done.stdout)
