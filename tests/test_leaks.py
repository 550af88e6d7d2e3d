"""What is tested must not be learned from: not under another name, not re-saved, not slipped in after converting."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from small_source import GRID, SHAPE, random_image

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.cohort.integrity import check_unchanged
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.volumes import write_image
from nnunet_sam2.voxel_hashes import placed_voxel_hash


def _other_compression(image: Path, target: Path) -> None:
    target.with_suffix("").with_suffix(".nii.gz").write_bytes(gzip.compress(gzip.decompress(image.read_bytes()), 1))


def _canonical(image: Path, target: Path) -> None:
    """What nibabel's `as_closest_canonical` saves: other axes and an affine to match."""
    nibabel.save(nibabel.as_closest_canonical(nibabel.load(image)), target.with_suffix(".nii.gz"))


def _turned(image: Path, target: Path) -> None:
    saved = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(image)), "PIR")
    SimpleITK.WriteImage(saved, str(target.with_suffix(".nrrd")))


def _as_type(dtype: type, ending: str) -> Callable[[Path, Path], None]:
    def save(image: Path, target: Path) -> None:
        values = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(image)))
        write_image(target.with_suffix(ending), values[None].astype(dtype), GRID)

    return save


RESAVED = {
    "another name": lambda image, target: shutil.copy(image, target.with_suffix(".nii.gz")),
    "another compression": _other_compression,
    "uncompressed": _as_type(np.int16, ".nii"),
    "MetaImage": _as_type(np.int16, ".mha"),
    "float": _as_type(np.float32, ".nii.gz"),
    "double NRRD": _as_type(np.float64, ".nrrd"),
    "canonical axes": _canonical,
    "turned axes": _turned,
}


@pytest.mark.parametrize("way", RESAVED)
@pytest.mark.parametrize("role", ["test", "unlabelled"])
def test_one_image_in_two_roles_is_refused_however_it_was_saved_again(
    way: str, role: str, source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = source / ("test" if role == "test" else "images")
    folder.mkdir(exist_ok=True)
    RESAVED[way](source / "images/case1.nii.gz", folder / "innocent")
    assert main(["convert", str(source), "-d", "7", "-n", "T"]) == 2
    told = capsys.readouterr().err
    assert "hold the same voxels" in told
    assert "case1.nii.gz (labelled)" in told
    assert f"({role})" in told
    assert not list((fresh_roots / "nnUNet_raw").iterdir())


def test_the_placed_hash_tells_a_mirrored_image_from_a_mirrored_storage() -> None:
    values = random_image(0)
    plain = placed_voxel_hash(values, GRID)
    x_mm = GRID.origin_xyz_mm[0] + (SHAPE[2] - 1) * GRID.spacing_xyz_mm[0]
    stored_backwards = Geometry(
        shape_zyx=SHAPE,
        spacing_xyz_mm=GRID.spacing_xyz_mm,
        origin_xyz_mm=(x_mm, *GRID.origin_xyz_mm[1:]),
        direction=(-1, 0, 0, 0, 1, 0, 0, 0, 1),
    )
    assert placed_voxel_hash(values[..., ::-1], stored_backwards) == plain
    assert placed_voxel_hash(values[..., ::-1], GRID) != plain


def _swap_in_test_image(root: Path, cohort: Cohort) -> str:
    shutil.copy(root / cohort.test[0].images[0], root / cohort.labelled[0].images[0])
    return f"holds the test case {cohort.test[0].case_id} now"


def _add_test_image(root: Path, cohort: Cohort) -> str:
    shutil.copy(root / cohort.test[0].images[0], root / "imagesTr" / "innocent_0000.nii.gz")
    return rf"innocent_0000\.nii\.gz is not in .* and holds the test case {cohort.test[0].case_id}, but nnU-Net"


def _change_a_label(root: Path, cohort: Cohort) -> str:
    path = root / str(cohort.labelled[0].label)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    return "was changed since the dataset was made"


def _lose_a_label(root: Path, cohort: Cohort) -> str:
    (root / str(cohort.labelled[0].label)).unlink()
    return "is missing; put the files back"


def _add_a_label(root: Path, cohort: Cohort) -> str:
    shutil.copy(root / str(cohort.labelled[0].label), root / "labelsTr" / "more.nii.gz")
    return r"more\.nii\.gz is not in"


def _swap_labels_in_dataset_json(root: Path, cohort: Cohort) -> str:
    value = json.loads((root / "dataset.json").read_text())
    one, two = (name for name in value["labels"] if name != "background")
    value["labels"][one], value["labels"][two] = value["labels"][two], value["labels"][one]
    (root / "dataset.json").write_text(json.dumps(value))
    return r"dataset\.json: labels is .*, cohort\.json says"


def _make_it_ct(root: Path, cohort: Cohort) -> str:
    value = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**value, "channel_names": {"0": "CT"}}))
    return r"dataset\.json: channel_names is .*CT.*, cohort\.json says .*MR"


def _have_another_reader(root: Path, cohort: Cohort) -> str:
    value = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**value, "overwrite_image_reader_writer": "NibabelIO"}))
    return r"dataset\.json: overwrite_image_reader_writer is .*NibabelIO"


def _add_a_field(root: Path, cohort: Cohort) -> str:
    value = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**value, "later": 1}))
    return r"dataset\.json was changed since the dataset was made"


def _lose_dataset_json(root: Path, cohort: Cohort) -> str:
    (root / "dataset.json").unlink()
    return r"dataset\.json is missing"


@pytest.mark.parametrize(
    "change",
    [
        _swap_in_test_image,
        _add_test_image,
        _change_a_label,
        _lose_a_label,
        _add_a_label,
        _swap_labels_in_dataset_json,
        _make_it_ct,
        _have_another_reader,
        _add_a_field,
        _lose_dataset_json,
    ],
)
def test_a_dataset_that_was_changed_after_converting_is_refused(
    change: Callable[[Path, Cohort], str], fresh_dataset: DatasetFolders
) -> None:
    cohort = Cohort.load(fresh_dataset.raw)
    check_unchanged(cohort)
    with pytest.raises(InputError, match=change(fresh_dataset.raw, cohort)):
        check_unchanged(cohort)


def test_run_refuses_such_a_dataset_before_anything_is_planned(
    fresh_dataset: DatasetFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    _add_test_image(fresh_dataset.raw, Cohort.load(fresh_dataset.raw))
    assert main(["run", "-d", "501", "--device", "cpu", "--sam2", "untrained"]) == 2
    assert "but nnU-Net would learn from it" in capsys.readouterr().err
    assert not fresh_dataset.preprocessed.exists()
    assert not fresh_dataset.results.exists()
