"""Fixtures that several test files share; what is made for the whole session must not be written into."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from nnunet_data import NnunetRoots, make_tiny_nnunet

from nnunet_sam2.cohort.cohort import HIDDEN_LABELS, Cohort
from nnunet_sam2.cohort.convert import ConvertOptions, convert
from nnunet_sam2.cohort.generated import write_generated_cohort
from nnunet_sam2.folders import VARIABLES, DatasetFolders, new_dataset_folders

pytest_plugins = ["anisotropic_data", "finished_run", "review_client", "small_source"]

PROJECT = Path(__file__).resolve().parent.parent
TINY_SHAPE_ZYX = (12, 40, 40)
TINY_ID, TINY_NAME = 501, "Tiny"


@pytest.fixture(scope="session")
def generated_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated cohort in the ``folder`` layout: 3 labelled, 2 unlabelled, 1 test, 12 x 40 x 40 voxels. Read only."""
    folder = tmp_path_factory.mktemp("source") / "generated"
    return write_generated_cohort(folder, seed=7, n_labelled=3, n_unlabelled=2, n_test=1, shape_zyx=TINY_SHAPE_ZYX)


@pytest.fixture(scope="session")
def nnunet_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nnU-Net's three folders for the whole session; the environment says where they are."""
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            (root / name).mkdir()
            patch.setenv(name, str(root / name))
        yield root


@pytest.fixture(scope="session")
def tiny_dataset(generated_folder: Path, nnunet_environment: Path) -> DatasetFolders:
    """The generated cohort as raw dataset 501, converted once. Its raw folder is read only."""
    folders = new_dataset_folders(TINY_ID, TINY_NAME)
    convert(generated_folder, folders, ConvertOptions())
    return folders


@pytest.fixture(scope="session")
def cohort(tiny_dataset: DatasetFolders) -> Cohort:
    """The cohort of ``tiny_dataset``."""
    return Cohort.load(tiny_dataset.raw)


@pytest.fixture(scope="session")
def values(cohort: Cohort) -> tuple[int, ...]:
    """The class values of ``tiny_dataset``."""
    return cohort.class_values


@pytest.fixture(scope="session")
def tiny_nnunet(
    generated_folder: Path, tiny_dataset: DatasetFolders, tmp_path_factory: pytest.TempPathFactory
) -> NnunetRoots:
    """``tiny_dataset`` planned and preprocessed by nnU-Net, in roots of its own (`NnunetRoots.copy_to` to write)."""
    return make_tiny_nnunet(tmp_path_factory.mktemp("planned"), tiny_dataset, generated_folder / HIDDEN_LABELS)


@pytest.fixture
def fresh_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty nnU-Net folders for one test."""
    for name in VARIABLES:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


@pytest.fixture
def fresh_dataset(tiny_dataset: DatasetFolders, fresh_roots: Path) -> DatasetFolders:
    """A copy of ``tiny_dataset``'s raw folder in roots of its own, for tests that write."""
    folders = new_dataset_folders(TINY_ID, TINY_NAME)
    shutil.copytree(tiny_dataset.raw, folders.raw)
    return folders


def _shared(variable: str, default: Path, what: str) -> Path:
    folder = Path(os.environ.get(variable, default)).expanduser()
    if not folder.is_dir():
        pytest.skip(f"{what} are not at {folder}; set {variable} to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real labelled images (``NNUNET_SAM2_DATA``), or a skip."""
    return _shared("NNUNET_SAM2_DATA", PROJECT.parent / "shared" / "data", "real images")


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    """Real weights (``NNUNET_SAM2_WEIGHTS``), or a skip."""
    return _shared("NNUNET_SAM2_WEIGHTS", PROJECT.parent / "shared" / "weights", "weights")
