from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import tifffile
from PIL import Image

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Cohort, Role
from nnunet_sam2.cohort.convert import ConvertOptions, convert
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders, new_dataset_folders
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.storage import file_hash
from nnunet_sam2.volumes import read_label, read_volume, write_image, write_label

SHAPE = (4, 10, 12)
GEOMETRY = Geometry(shape_zyx=SHAPE, spacing_xyz_mm=(1.25, 1.25, 5.0), origin_xyz_mm=(-3.0, 4.0, 5.5))


def _image(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.int16)


def _label(seed: int, classes: int = 2, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(100 + seed).integers(0, classes + 1, shape).astype(np.uint8)


def _source(folder: Path, *, labelled: int = 3, unlabelled: int = 2, patients: bool = False) -> Path:
    for i in range(labelled + unlabelled):
        name = f"p{i // 2}_frame{i % 2}" if patients else f"case{i}"
        write_image(folder / "images" / f"{name}.nii.gz", _image(i)[None], GEOMETRY)
        if i < labelled:
            write_label(folder / "labels" / f"{name}.nii.gz", _label(i), GEOMETRY)
    return folder


def _convert(source: Path, *options: str, name: str = "T", dataset_id: int = 7) -> Cohort:
    assert main(["convert", str(source), "-d", str(dataset_id), "-n", name, *options]) == 0
    return Cohort.load(new_dataset_folders(dataset_id, name).raw)


def _roles(cohort: Cohort) -> dict[str, str]:
    return {case.case_id: case.role.value for case in cohort.cases}


def _stock_check(cohort: Cohort) -> None:
    """Run the parts of nnU-Net's integrity check on the dataset, without its pool of processes."""
    from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases, verify_labels
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    dataset = json.loads((cohort.root / "dataset.json").read_text())
    reader = determine_reader_writer_from_dataset_json(dataset, verbose=False)
    manager = LabelManager(dataset["labels"], dataset.get("regions_class_order"))
    expected = manager.all_labels + ([manager.ignore_label] if manager.has_ignore_label else [])
    files = get_filenames_of_train_images_and_targets(str(cohort.root), dataset)
    assert len(files) == dataset["numTraining"] == len(cohort.labelled)
    for entry in files.values():
        assert verify_labels(entry["label"], reader, expected)
        assert check_cases(entry["images"], entry["label"], len(dataset["channel_names"]), reader)


@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_a_source_names_its_channels_in_dataset_json_by_the_new_key_or_the_old(
    key: str, tmp_path: Path, fresh_roots: Path
) -> None:
    source = _source(tmp_path / "source")
    (source / "dataset.json").write_text(json.dumps({key: {"0": "CT"}}))
    cohort = _convert(source)
    assert cohort.channels == ("CT",)
    assert json.loads((cohort.root / "dataset.json").read_text())["channel_names"] == {"0": "CT"}


def test_images_without_label_become_unlabelled_and_human_files_keep_their_bytes(
    tmp_path: Path, fresh_roots: Path
) -> None:
    source = _source(tmp_path / "source")
    cohort = _convert(source)
    assert _roles(cohort) == {
        **{f"case{i}": "labelled" for i in range(3)},
        **{f"case{i}": "unlabelled" for i in (3, 4)},
    }
    for case in cohort.cases:
        assert file_hash(cohort.image_paths(case)[0]) == file_hash(source / "images" / f"{case.case_id}.nii.gz")
    for case in cohort.labelled:
        assert file_hash(cohort.label_path(case)) == file_hash(source / "labels" / f"{case.case_id}.nii.gz")
    dataset = json.loads((cohort.root / "dataset.json").read_text())
    assert dataset["numTraining"] == 3
    assert dataset["labels"] == {"background": 0, "class_1": 1, "class_2": 2}
    assert sorted(p.name for p in (cohort.root / "imagesTr").iterdir()) == [f"case{i}_0000.nii.gz" for i in range(3)]


def test_nnunet_accepts_the_dataset(tmp_path: Path, fresh_roots: Path) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    verify_dataset_integrity(str(_convert(_source(tmp_path / "source")).root), num_processes=1)


def test_the_same_source_and_options_give_the_same_dataset(tmp_path: Path, fresh_roots: Path) -> None:
    source = _source(tmp_path / "source", labelled=6, unlabelled=0)
    hashes = []
    for _ in range(2):
        cohort = _convert(source, "--labelled", "2", "--test-cases", "2", "--overwrite")
        hashes.append({str(p.relative_to(cohort.root)): file_hash(p) for p in cohort.root.rglob("*") if p.is_file()})
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 6 + 6 + 2


def test_hidden_labels_are_kept_for_evaluation_alone(tmp_path: Path, fresh_roots: Path) -> None:
    cohort = _convert(_source(tmp_path / "source", labelled=6, unlabelled=0), "--labelled", "2")
    assert (len(cohort.labelled), len(cohort.unlabelled)) == (2, 4)
    for case in cohort.unlabelled:
        assert case.label is None
        assert case.hidden_label == f"labelsHidden/{case.case_id}.nii.gz"
        assert (cohort.root / str(case.hidden_label)).is_file()
    assert len(list((cohort.root / "labelsTr").iterdir())) == 2


def test_the_test_cases_stay_when_the_number_of_labels_changes_and_the_seed_moves_them(
    tmp_path: Path, fresh_roots: Path
) -> None:
    source = _source(tmp_path / "source", labelled=12, unlabelled=0)
    drawn = [
        _roles(_convert(source, "--labelled", n, "--test-cases", "4", "--seed", seed, "--overwrite"))
        for n, seed in (("2", "0"), ("5", "0"), ("2", "1"))
    ]
    tests = [{c for c, role in roles.items() if role == "test"} for roles in drawn]
    labelled = [{c for c, role in roles.items() if role == "labelled"} for roles in drawn]
    assert tests[0] == tests[1] != tests[2]
    assert labelled[0] < labelled[1]
    assert [len(t) for t in tests] == [4, 4, 4]


def test_labels_are_hidden_and_test_cases_held_out_by_patient(tmp_path: Path, fresh_roots: Path) -> None:
    source = _source(tmp_path / "source", labelled=12, unlabelled=0, patients=True)
    options = ["--labelled", "4", "--test-cases", "4", "--patient-pattern", "^([^_]+)"]
    cohort = _convert(source, *options)
    roles: dict[str, set[Role]] = {}
    for case in cohort.cases:
        roles.setdefault(case.patient, set()).add(case.role)
    assert len(roles) == 6
    assert all(len(of_patient) == 1 for of_patient in roles.values())


def test_cases_that_look_like_one_patient_are_put_together_with_a_line(
    tmp_path: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = _convert(_source(tmp_path / "source", patients=True))
    assert [case.patient for case in cohort.cases] == ["p0", "p0", "p1", "p1", "p2_frame0"]
    told = capsys.readouterr().out
    assert "4 cases are taken for 2 patients' by their names, as p0_frame0 and p0_frame1" in told
    apart = _convert(tmp_path / "source", "--patient-pattern", "^(.*)$", name="Apart", dataset_id=8)
    assert [case.patient for case in apart.cases] == [case.case_id for case in apart.cases]
    assert "taken for" not in capsys.readouterr().out


def test_labels_that_cannot_be_drawn_by_patients_of_names_are_refused_with_the_way_out(
    tmp_path: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _source(tmp_path / "source", labelled=8, unlabelled=0, patients=True)
    assert main(["convert", str(source), "-d", "7", "-n", "T", "--labelled", "3"]) == 2
    told = capsys.readouterr().err
    assert "possible next to it: 2 or 4" in told
    assert "--patient-pattern" in told


def test_a_test_folder_is_named_or_found_and_may_lack_labels(tmp_path: Path, fresh_roots: Path) -> None:
    source = _source(tmp_path / "source")
    write_image(tmp_path / "flat" / "new1.nii.gz", _image(50)[None], GEOMETRY)
    cohort = _convert(source, "--test", str(tmp_path / "flat"))
    assert [(case.case_id, case.label) for case in cohort.test] == [("new1", None)]
    write_image(source / "test" / "images" / "t1.nii.gz", _image(60)[None], GEOMETRY)
    write_label(source / "test" / "labels" / "t1.nii.gz", _label(60), GEOMETRY)
    cohort = _convert(source, dataset_id=8)
    assert [(case.case_id, case.label) for case in cohort.test] == [("t1", "labelsTs/t1.nii.gz")]


@pytest.mark.parametrize("arrangement", ["suffix", "folder a case", "folder a channel"])
def test_several_channels_are_found_in_three_arrangements(tmp_path: Path, fresh_roots: Path, arrangement: str) -> None:
    source = tmp_path / "source"
    for i in range(4):
        for c, channel in enumerate(("flair", "t1")):
            name = {
                "suffix": f"brain_000{i}_{c:04d}",
                "folder a case": f"brain_000{i}/brain_000{i}_{channel}",
                "folder a channel": f"{channel}/brain_000{i}",
            }[arrangement]
            write_image(source / "images" / f"{name}.nii.gz", _image(10 * i + c)[None], GEOMETRY)
        if i < 2:
            write_label(source / "labels" / f"brain_000{i}.nii.gz", _label(i), GEOMETRY)
    cohort = _convert(source)
    assert cohort.channels == (("image0", "image1") if arrangement == "suffix" else ("flair", "t1"))
    assert [case.case_id for case in cohort.unlabelled] == ["brain_0002", "brain_0003"]
    image = read_volume(cohort.image_paths(cohort.case("brain_0003"))).array_czyx
    assert np.array_equal(image, np.stack([_image(30), _image(31)]))
    _stock_check(cohort)


def _write_channels(folder: Path, *channels: str, first: int = 0) -> None:
    for c, channel in enumerate(channels):
        for i in range(first, first + 3):
            write_image(folder / "images" / channel / f"c{i}.nii.gz", _image(10 * c + i)[None], GEOMETRY)
    write_label(folder / "labels" / f"c{first}.nii.gz", _label(first), GEOMETRY)


def test_channels_are_told_apart_by_their_names_however_these_are_spelled(
    tmp_path: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, test = tmp_path / "source", tmp_path / "test"
    _write_channels(source, "ct", "pet")
    cohort = _convert(source, "--channels", "PET,CT")
    assert cohort.channels == ("PET", "CT")
    assert np.array_equal(read_volume(cohort.image_paths(cohort.case("c2"))).array_czyx, [_image(12), _image(2)])
    capsys.readouterr()
    _convert(source, "--channels", "MR,CT", "--overwrite")
    assert "note: the source's channels ct, pet are called MR, CT, in this order" in capsys.readouterr().out
    _write_channels(test, "PET", "adc", first=5)
    assert main(["convert", str(source), "-d", "8", "-n", "T", "--test", str(test)]) == 2
    assert "has the channels PET, adc" in capsys.readouterr().err


def test_a_number_that_only_looks_like_a_channel_is_part_of_the_name(tmp_path: Path, fresh_roots: Path) -> None:
    source = tmp_path / "source"
    for i in range(3):
        write_image(source / "images" / f"img_000{i}.nii.gz", _image(i)[None], GEOMETRY)
    write_label(source / "labels" / "img_0001.nii.gz", _label(1), GEOMETRY)
    assert _roles(_convert(source)) == {"img_0000": "unlabelled", "img_0001": "labelled", "img_0002": "unlabelled"}


def test_a_decathlon_task_is_read_with_its_names_and_4d_images(tmp_path: Path, fresh_roots: Path) -> None:
    source = tmp_path / "Task05"
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (source / folder).mkdir(parents=True)
    for i in range(4):
        both = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(_image(10 * i + c)) for c in range(2)])
        SimpleITK.WriteImage(both, str(source / ("imagesTr" if i < 3 else "imagesTs") / f"prostate_{i}.nii.gz"))
        if i < 3:
            SimpleITK.WriteImage(
                SimpleITK.GetImageFromArray(_label(i).astype(np.float32)), str(source / f"labelsTr/prostate_{i}.nii.gz")
            )
    (source / "imagesTr" / "._prostate_0.nii.gz").write_bytes(b"macOS leaves these in archives")
    description = {
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "training": [{"image": f"./imagesTr/prostate_{i}.nii.gz", "label": "..."} for i in range(3)],
        "test": ["./imagesTs/prostate_3.nii.gz"],
    }
    (source / "dataset.json").write_text(json.dumps(description))
    cohort = _convert(source, "--labelled", "1")
    assert cohort.channels == ("T2", "ADC")
    assert cohort.labels == {"background": 0, "PZ": 1, "TZ": 2}
    assert (len(cohort.labelled), len(cohort.unlabelled), len(cohort.test)) == (1, 2, 1)
    assert np.array_equal(
        read_volume(cohort.image_paths(cohort.test[0])).array_czyx, np.stack([_image(30), _image(31)])
    )
    _stock_check(cohort)
    # The source's label maps are floats; what is learned from holds whole numbers.
    assert SimpleITK.ReadImage(str(cohort.label_path(cohort.labelled[0]))).GetPixelID() == SimpleITK.sitkUInt8
    cohort = _convert(source, "--test-as-unlabelled", dataset_id=8)
    assert (len(cohort.labelled), len(cohort.unlabelled), len(cohort.test)) == (3, 1, 0)


@pytest.mark.parametrize(
    ("kind", "ending", "channels"),
    [("grey8", ".png", 1), ("grey16", ".png", 1), ("rgb8", ".png", 3), ("rgb16", ".tif", 3), ("pgm", ".png", 1)],
)
def test_pictures_become_a_2d_dataset_without_loss(
    tmp_path: Path, fresh_roots: Path, kind: str, ending: str, channels: int
) -> None:
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    (source / "labels").mkdir()
    arrays = {}
    for i in range(4):
        deep = kind.endswith("16")
        shape = (20, 24, 3) if kind.startswith("rgb") else (20, 24)
        array = np.random.default_rng(i).integers(0, 60000 if deep else 255, shape)
        array = array.astype(np.uint16 if deep else np.uint8)
        arrays[f"im{i}"] = array
        if kind == "pgm":
            (source / "images" / f"im{i}.pgm").write_bytes(b"P5\n24 20\n255\n" + array.tobytes())
        elif kind == "rgb16":
            tifffile.imwrite(source / "images" / f"im{i}.tiff", array, photometric="rgb")
        else:
            Image.fromarray(array).save(source / "images" / f"im{i}.png")
        if i < 2:
            Image.fromarray(_label(i, 1, (20, 24)) * 255).save(source / "labels" / f"im{i}.png")
    cohort = _convert(source, "--labels", "thing=255")
    assert cohort.provenance["layout"] == "images2d"
    assert cohort.file_ending == ending
    assert cohort.labels == {"background": 0, "thing": 1}
    assert len(cohort.channels) == channels
    for case in cohort.cases:
        image = read_volume(cohort.image_paths(case)).array_czyx[:, 0]
        assert np.array_equal(image, np.moveaxis(np.atleast_3d(arrays[case.case_id]), -1, 0))
    assert set(np.unique(read_label(cohort.label_path(cohort.labelled[0]))[0])) == {0, 1}
    _stock_check(cohort)


def test_regions_and_the_ignore_label_reach_dataset_json(tmp_path: Path, fresh_roots: Path) -> None:
    source = _source(tmp_path / "source")
    cohort = _convert(source, "--labels", "whole=1+2,core=2", "--regions-class-order", "1,2")
    assert cohort.labels == {"background": 0, "whole": [1, 2], "core": 2}
    assert cohort.regions_class_order == (1, 2)
    _stock_check(cohort)
    cohort = _convert(source, "--labels", "organ=1,ignore=2", dataset_id=8)
    assert (cohort.ignore_value, cohort.class_values) == (2, (1,))
    _stock_check(cohort)


def test_the_background_may_be_written_with_a_capital(tmp_path: Path, fresh_roots: Path) -> None:
    cohort = _convert(_source(tmp_path / "source"), "--labels", '{"Background": 0, "a": 1, "b": 2}')
    assert cohort.labels == {"background": 0, "a": 1, "b": 2}


def test_other_volume_formats_are_rewritten_and_small_differences_of_grid_are_removed(
    tmp_path: Path, fresh_roots: Path
) -> None:
    source = _source(tmp_path / "source")
    (source / "images" / "case0.nii.gz").unlink()
    write_image(source / "images" / "case0.mha", _image(0)[None], GEOMETRY)
    near = Geometry(shape_zyx=SHAPE, spacing_xyz_mm=(1.2505, 1.25, 5.0), origin_xyz_mm=(-3.0, 4.0, 5.505))
    write_label(source / "labels" / "case1.nii.gz", _label(1), near)
    cohort = _convert(source)
    assert read_volume(cohort.image_paths(cohort.case("case0"))).geometry.mismatch(GEOMETRY) is None
    _stock_check(cohort)
    label, geometry = read_label(cohort.label_path(cohort.case("case1")))
    assert np.array_equal(label, _label(1))
    assert np.allclose(geometry.spacing_xyz_mm, GEOMETRY.spacing_xyz_mm)


def test_equal_images_of_one_role_stay_together_as_one_patient(tmp_path: Path, fresh_roots: Path) -> None:
    source = _source(tmp_path / "source")
    shutil.copy(source / "images" / "case0.nii.gz", source / "images" / "copy.nii.gz")
    write_label(source / "labels" / "copy.nii.gz", _label(77), GEOMETRY)
    cohort = _convert(source)
    assert cohort.case("copy").patient == cohort.case("case0").patient
    assert cohort.case("case1").patient != cohort.case("case0").patient


def test_the_generated_cohort_converts_with_its_hidden_truth(tiny_dataset: DatasetFolders) -> None:
    cohort = Cohort.load(tiny_dataset.raw)
    assert [len(cohort.with_role(role)) for role in Role] == [3, 2, 1]
    assert cohort.labels == {"background": 0, "large_organ": 1, "small_organ": 2}
    assert all(case.hidden_label and case.label is None for case in cohort.unlabelled)
    assert all(case.label for case in cohort.test)


def test_a_killed_conversion_leaves_no_dataset_and_the_next_one_clears_up(
    tmp_path: Path, fresh_roots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _source(tmp_path / "source")
    folders = new_dataset_folders(7, "T")
    left = folders.raw.parent / ".nnunet_sam2_tmp_0123456789ab_Dataset007_T"
    (left / "imagesTr").mkdir(parents=True)
    convert(source, folders, ConvertOptions())
    assert [p.name for p in folders.raw.parent.iterdir()] == ["Dataset007_T"]


def test_options_that_cannot_be_are_refused() -> None:
    for bad in ({"labelled": 0}, {"unlabelled": 0}, {"test_cases": -1}, {"channels": ("a", "a")}):
        with pytest.raises(InputError):
            ConvertOptions(**bad)  # type: ignore[arg-type]


def test_a_second_convert_of_an_id_is_refused_while_the_first_is_at_work_and_a_dead_one_holds_nothing(
    tmp_path: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, raw = _source(tmp_path / "source"), new_dataset_folders(7, "T").raw.parent
    raw.mkdir(parents=True, exist_ok=True)
    hold = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print(1, flush=True); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", hold, str(raw / ".Dataset007.lock")], stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None
        assert first.stdout.readline()
        assert main(["convert", str(source), "-d", "7", "-n", "Other"]) == 2
        assert "another convert is making dataset 7" in capsys.readouterr().err
        assert not list(raw.glob("Dataset*"))
    finally:
        first.kill()
        first.communicate()
    _convert(source)
