"""A small source folder for `convert`: cases of random voxels on one grid, the first two with labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nnunet_sam2.geometry import Geometry
from nnunet_sam2.volumes import write_image, write_label

SHAPE = (4, 10, 12)
GRID = Geometry(shape_zyx=SHAPE, spacing_xyz_mm=(1.25, 1.25, 5.0))


def random_image(seed: int) -> np.ndarray:
    """Return int16 voxels from 0 to 199, (1, Z, Y, X)."""
    return np.random.default_rng(seed).integers(0, 200, (1, *SHAPE)).astype(np.int16)


def write_source(folder: Path, *, cases: int) -> Path:
    """Write this many images, two of them with labels."""
    for i in range(cases):
        write_image(folder / "images" / f"case{i}.nii.gz", random_image(i), GRID)
        if i < 2:
            write_label(folder / "labels" / f"case{i}.nii.gz", (random_image(9 + i)[0] % 3).astype(np.uint8), GRID)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two labelled cases and an unlabelled one."""
    return write_source(tmp_path / "source", cases=3)
