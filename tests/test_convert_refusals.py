"""Each bad input ends with exit status 2, one line that names the file and the way out, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from PIL import Image
from small_source import GRID, SHAPE, random_image, write_source

from nnunet_sam2.cli.main import main
from nnunet_sam2.folders import VARIABLES
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.volumes import write_image, write_label


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two labelled and two unlabelled cases that convert as they are."""
    return write_source(tmp_path / "source", cases=4)


def _refused(
    capsys: pytest.CaptureFixture[str], source: Path, *options: str, words: tuple[str, ...], name: str = "T"
) -> None:
    roots = Path(source.parent)
    before = sorted(str(p) for variable in VARIABLES for p in (roots / variable).rglob("*"))
    capsys.readouterr()
    assert main(["convert", str(source), "-d", "7", "-n", name, *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s]" not in line and line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("nnunet_sam2 convert: ")
    for word in words:
        assert word in lines[0], lines[0]
    assert sorted(str(p) for variable in VARIABLES for p in (roots / variable).rglob("*")) == before


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def _write_float(path: Path, value: float) -> None:
    array = random_image(0)[0].astype(np.float32)
    array[0, 0, 0] = value
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path))


def _move_label(source: Path) -> None:
    moved = Geometry(shape_zyx=SHAPE, spacing_xyz_mm=(1.25, 1.25, 5.0), origin_xyz_mm=(0.0, 0.5, 0.0))
    write_label(source / "labels/case1.nii.gz", np.ones(SHAPE, np.uint8), moved)


def _turn_label(source: Path) -> None:
    turned = Geometry(shape_zyx=SHAPE, spacing_xyz_mm=(1.25, 1.25, 5.0), direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1))
    write_label(source / "labels/case1.nii.gz", np.ones(SHAPE, np.uint8), turned)


def _crop_label(source: Path) -> None:
    small = Geometry(shape_zyx=(3, 10, 12), spacing_xyz_mm=(1.25, 1.25, 5.0))
    write_label(source / "labels/case1.nii.gz", np.ones((3, 10, 12), np.uint8), small)


def _scale_label(source: Path) -> None:
    scaled = Geometry(shape_zyx=SHAPE, spacing_xyz_mm=(1.25, 1.26, 5.0))
    write_label(source / "labels/case1.nii.gz", np.ones(SHAPE, np.uint8), scaled)


def _set_label(source: Path, value: float, dtype: type = np.float32) -> None:
    array = (random_image(3)[0] % 3).astype(dtype)
    array[0, 0, 0] = value
    write_image(source / "labels/case1.nii.gz", array[None], GRID)


def _channels(source: Path, *, missing: bool) -> None:
    for path in sorted((source / "images").iterdir()):
        shutil.copy(path, path.with_name(path.name.replace(".nii.gz", "_0001.nii.gz")))
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
    if missing:
        (source / "images/case2_0001.nii.gz").unlink()


def _two_kinds(source: Path) -> None:
    (source / "images/sub").mkdir()
    shutil.copy(source / "images/case3.nii.gz", source / "images/sub/x.nii.gz")


def _picture_among(source: Path) -> None:
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(source / "images/photo.png")


def _dataset_json(source: Path, labels: dict[str, object]) -> None:
    (source / "dataset.json").write_text(json.dumps({"labels": labels}))


FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...], tuple[str, ...]]] = {
    # name: (what is done to the source, options, words of the message)
    "cut image": (lambda s: _truncate(s / "images/case2.nii.gz"), (), ("images/case2.nii.gz", "cut off", "again")),
    "cut label": (lambda s: _truncate(s / "labels/case1.nii.gz"), (), ("labels/case1.nii.gz", "cut off")),
    "NaN": (lambda s: _write_float(s / "images/case2.nii.gz", np.nan), (), ("images/case2.nii.gz", "1 NaN", "replace")),
    "Inf": (lambda s: _write_float(s / "images/case2.nii.gz", np.inf), (), ("images/case2.nii.gz", "1 infinite")),
    "NaN label": (lambda s: _write_float(s / "labels/case1.nii.gz", np.nan), (), ("labels/case1.nii.gz", "1 NaN")),
    "beyond 32 bits": (
        lambda s: write_image(s / "images/case2.nii.gz", random_image(2) * 1e300, GRID),
        (),
        ("images/case2.nii.gz", "32 bit floats", "rescale"),
    ),
    "moved label": (_move_label, (), ("labels/case1.nii.gz", "origin", "tolerance 0.01", "resample")),
    "turned label": (_turn_label, (), ("labels/case1.nii.gz", "direction", "tolerance 0.001")),
    "cropped label": (_crop_label, (), ("labels/case1.nii.gz", "shape", "(3, 10, 12)")),
    "scaled label": (_scale_label, (), ("labels/case1.nii.gz", "spacing", "tolerance 0.001")),
    "half label": (lambda s: _set_label(s, 0.5), (), ("labels/case1.nii.gz", "0.5", "tolerance 0.001")),
    "negative label": (lambda s: _set_label(s, -1, np.int16), (), ("labels/case1.nii.gz", "-1")),
    "undeclared label": (
        lambda s: _set_label(s, 4, np.uint8),
        ("--labels", "a=1,b=2"),
        ("labels/case1.nii.gz", "label 4", "declared are 0, 1, 2"),
    ),
    "gap in labels": (
        lambda s: _set_label(s, 255, np.uint8),
        (),
        ("1, 2, 255", "case1.nii.gz", "--labels name1=1,name2=2,name3=255"),
    ),
    "empty label": (
        lambda s: write_label(s / "labels/case1.nii.gz", np.zeros(SHAPE, np.uint8), GRID),
        (),
        ("labels/case1.nii.gz is empty", "--allow-empty"),
    ),
    "only ignored": (
        lambda s: write_label(s / "labels/case1.nii.gz", np.full(SHAPE, 2, np.uint8), GRID),
        ("--labels", "a=1,ignore=2"),
        ("labels/case1.nii.gz is empty",),
    ),
    "missing channel": (lambda s: _channels(s, missing=True), (), ("case2", "case2_0001", "add the file")),
    "channel without suffix": (
        lambda s: (_channels(s, missing=False), shutil.copy(s / "images/case2_0000.nii.gz", s / "images/new.nii.gz")),
        (),
        ("images/new.nii.gz", "new_0000"),
    ),
    "equal channels": (lambda s: None, ("--channels", "MR,MR"), ("--channels MR,MR", "repeated")),
    "too many channel names": (lambda s: None, ("--channels", "T1,T2"), ("case0_0000", "--channels")),
    "duplicate case": (
        lambda s: write_image(s / "images/case2.mha", random_image(5), GRID),
        (),
        ("case2.mha", "case2.nii.gz", "keep one"),
    ),
    "names that differ in case": (
        lambda s: write_image(s / "images/CASE2.nii.gz", random_image(5), GRID),
        (),
        ("CASE2.nii.gz", "case2.nii.gz"),
    ),
    "bad id": (
        lambda s: write_image(s / "images/my case.nii.gz", random_image(5), GRID),
        (),
        ("'my case' cannot be a case id", "rename"),
    ),
    "label with channel suffix": (
        lambda s: (s / "labels/case1.nii.gz").rename(s / "labels/case1_0000.nii.gz"),
        (),
        ("labels/case1_0000.nii.gz", "drop the _0000"),
    ),
    "label without image": (
        lambda s: (s / "images/case1.nii.gz").unlink(),
        (),
        ("labels/case1.nii.gz has no image", "add or remove"),
    ),
    "same voxels in two roles": (
        lambda s: write_image(s / "images/renamed.mha", random_image(0).astype(np.float32), GRID),
        (),
        ("case0.nii.gz (labelled)", "renamed.mha (unlabelled)", "remove one of them"),
    ),
    "no labelled case": (
        lambda s: shutil.rmtree(s / "labels"),
        (),
        ("no labelled case", "images/case0.nii.gz", "labels/"),
    ),
    "no unlabelled case": (
        lambda s: [(s / f"images/case{i}.nii.gz").unlink() for i in (2, 3)],
        (),
        ("no unlabelled case", "--labelled N"),
    ),
    "no images folder": (lambda s: (s / "images").rename(s / "pictures"), (), ("no images/ folder",)),
    "no image": (
        lambda s: (shutil.rmtree(s / "images"), (s / "images").mkdir(), (s / "images/a.txt").write_text("a")),
        (),
        ("images holds no image",),
    ),
    "files and folders": (_two_kinds, (), ("both image files and folders", "sub")),
    "picture among volumes": (_picture_among, (), ("photo.png", "picture", "volume")),
    "too many labels wanted": (lambda s: None, ("--labelled", "5"), ("--labelled 5", "2 cases")),
    "all labels held out": (lambda s: None, ("--test-cases", "2"), ("--test-cases 2", "leave some")),
    "pattern without match": (lambda s: None, ("--patient-pattern", "^p"), ("--patient-pattern", "case0")),
    "broken pattern": (lambda s: None, ("--patient-pattern", "("), ("not a regular expression",)),
    "one patient in test and training": (
        lambda s: write_image(s / "test/case9.nii.gz", random_image(77), GRID),
        ("--patient-pattern", "^(....)"),
        ("patient case", "keep each patient on one side"),
    ),
    "test case of the same name": (
        lambda s: write_image(s / "test/case1.nii.gz", random_image(77), GRID),
        (),
        ("test/case1.nii.gz", "both case case1", "rename"),
    ),
    "test image that is a training image": (
        lambda s: write_image(s / "test/new.nii.gz", random_image(1), GRID),
        (),
        ("new.nii.gz (test)", "case1.nii.gz (labelled)"),
    ),
    "the source as test folder": (lambda s: None, ("--test", "SOURCE"), ("--test", "source itself")),
    "no such test folder": (lambda s: None, ("--test", "nowhere"), ("nowhere", "not a folder")),
    "unknown layout": (lambda s: None, ("--layout", "dicom"), ("unknown layout 'dicom'", "msd")),
    "not MSD": (lambda s: None, ("--layout", "msd"), ("dataset.json does not exist",)),
    "labels that are no table": (lambda s: None, ("--labels", "liver"), ("'liver' is not NAME=VALUE", "liver=1")),
    "labels that share a value": (lambda s: None, ("--labels", "a=1,b=1"), ("a and b", "share the value 1")),
    "broken JSON": (lambda s: None, ("--labels", "{a"), ("not valid JSON",)),
    "no such JSON": (lambda s: None, ("--labels", "/nowhere/x.json"), ("/nowhere/x.json does not exist",)),
    "ignore that a region holds": (
        lambda s: None,
        ("--labels", "a=1+2,ignore=2", "--regions-class-order", "1"),
        ("ignore", "value 2 of another label"),
    ),
    "a channel that is told by a dot": (
        lambda s: (s / "images/case0.nii.gz").rename(s / "images/case0.0000.nii.gz"),
        (),
        ("there is case0.0000: a channel wants _0000", "case0_0000"),
    ),
    "regions without order": (lambda s: None, ("--labels", "w=1+2,c=2"), ("--regions-class-order", "2 values")),
    "order without regions": (
        lambda s: None,
        ("--labels", "a=1,b=2", "--regions-class-order", "1,2"),
        ("no label is a region",),
    ),
    "order that is no numbers": (lambda s: None, ("--regions-class-order", "a"), ("whole numbers",)),
    "broken dataset.json": (
        lambda s: (s / "dataset.json").write_text("{"),
        (),
        ("dataset.json is not valid JSON",),
    ),
    "dataset.json with text values": (
        lambda s: _dataset_json(s, {"background": 0, "liver": "one"}),
        (),
        ("dataset.json", "whole numbers"),
    ),
    "dataset.json with half values": (
        lambda s: _dataset_json(s, {"background": 0, "liver": 1.5}),
        (),
        ("dataset.json", "whole numbers", "1.5"),
    ),
    "dataset.json with endless values": (
        lambda s: (s / "dataset.json").write_text('{"labels": {"liver": 1e999}}'),
        (),
        ("dataset.json", "whole numbers"),
    ),
    "dataset.json that names a label twice": (
        lambda s: _dataset_json(s, {"1": "liver", "2": "liver"}),
        (),
        ("dataset.json names liver twice",),
    ),
    "dataset.json with a list of channels": (
        lambda s: (s / "dataset.json").write_text('{"channel_names": ["CT"]}'),
        (),
        ("dataset.json", "channel_names counts from", "['CT']"),
    ),
    "labels that are a folder": (
        lambda s: (s.parent / "labels.json").mkdir(),
        ("--labels", "LABELS"),
        ("labels.json is a folder",),
    ),
    "sub-zero seed": (lambda s: None, ("--seed", "-1"), ("--seed -1",)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_refused(fault: str, source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, options, words = FAULTS[fault]
    change(source)
    named = {"SOURCE": str(source), "LABELS": str(source.parent / "labels.json")}
    _refused(capsys, source, *(named.get(o, o) for o in options), words=words)


def test_of_several_faults_each_is_named_the_first_time(
    source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _truncate(source / "images/case2.nii.gz")
    _write_float(source / "images/case3.nii.gz", np.nan)
    _move_label(source)
    assert main(["convert", str(source), "-d", "7", "-n", "T"]) == 2
    out, error = capsys.readouterr()
    named = [line for line in out.splitlines() if line.startswith("refused ")]
    assert [word in line for word, line in zip(("case1", "case2", "case3"), named, strict=True)] == [True] * 3
    assert error.count("\n") == 1
    assert "3 of 4 cases cannot be used" in error
    assert "origin" in error
    assert not any((fresh_roots / "nnUNet_raw").iterdir())


def test_the_case_that_differs_from_most_is_named_and_not_the_most(
    source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (source / "labels", source / "images"):
        shutil.rmtree(path)
        path.mkdir()
    for i in range(4):
        Image.fromarray(
            np.random.default_rng(i).integers(0, 255, (9, 9, 3) if i == 0 else (9, 9)).astype(np.uint8)
        ).save(source / f"images/p{i}.png")
    Image.fromarray(np.eye(9, dtype=np.uint8)).save(source / "labels/p1.png")
    _refused(capsys, source, words=("images/p0.png has 3 channels", "images/p1.png has 1;"))


def test_the_source_of_these_tests_is_accepted_as_it_is(source: Path, fresh_roots: Path) -> None:
    assert main(["convert", str(source), "-d", "7", "-n", "T"]) == 0


@pytest.mark.parametrize("variable", VARIABLES)
def test_an_unset_variable_is_refused_with_the_line_that_sets_it(
    variable: str, source: Path, fresh_roots: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(variable)
    _refused(capsys, source, words=(f"export {variable}=",))


def test_another_version_of_nnunet_is_refused(
    source: Path, fresh_roots: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.metadata

    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.7.0" if name == "nnunetv2" else version(name))
    _refused(capsys, source, words=("nnunetv2 2.7.0", "pip install"))


def test_a_taken_id_or_name_is_refused(source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fresh_roots / "nnUNet_results" / "Dataset007_Other").mkdir()
    _refused(capsys, source, words=("id 7 is taken", "Dataset007_Other", "-d"))
    (fresh_roots / "nnUNet_results" / "Dataset007_Other").rmdir()
    _refused(capsys, source, words=("dataset name", "a b"), name="a b")
    assert main(["convert", str(source), "-d", "7", "-n", "T"]) == 0
    _refused(capsys, source, words=("exists", "--overwrite"))
    (fresh_roots / "nnUNet_preprocessed" / "Dataset007_T").mkdir()
    _refused(capsys, source, "--overwrite", words=("nnUNet_preprocessed/Dataset007_T", "remove it first"))


def test_a_dataset_that_has_taken_in_human_labels_is_not_overwritten(
    source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), "-d", "7", "-n", "T"]) == 0
    write_label(fresh_roots / "case2.nii.gz", (random_image(5)[0] % 3).astype(np.uint8), GRID)
    assert main(["review", "-d", "7", "--import", str(fresh_roots / "case2.nii.gz")]) == 0
    _refused(capsys, source, "--overwrite", words=("holds human labels", "labelsAdded", "case2-", "would be lost"))


def test_a_dataset_of_other_making_is_not_overwritten(
    source: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fresh_roots / "nnUNet_raw" / "Dataset007_T" / "imagesTr").mkdir(parents=True)
    _refused(capsys, source, "--overwrite", words=("was not made by this command",))


def test_a_decathlon_archive_unpacked_in_part_is_refused(
    tmp_path: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "Task"
    for i in range(2):
        write_image(task / "imagesTr" / f"c{i}.nii.gz", random_image(i), GRID)
        write_label(task / "labelsTr" / f"c{i}.nii.gz", (random_image(9 + i)[0] % 3).astype(np.uint8), GRID)
    value = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "a", "2": "b"}}
    training = [{"image": f"./imagesTr/c{i}.nii.gz", "label": f"./labelsTr/c{i}.nii.gz"} for i in range(3)]
    (task / "dataset.json").write_text(json.dumps({**value, "training": training}))
    _refused(capsys, task, words=("c2.nii.gz", "unpack the archive whole"))
    (task / "dataset.json").write_text(json.dumps({"labels": value["labels"], "training": training[:2]}))
    _refused(capsys, task, words=("names no channels", "modality"))
