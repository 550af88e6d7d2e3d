"""What a label file says of its own values decides, whatever the file is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from small_source import GRID, SHAPE, random_image

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.doctor.dataset import check_labels
from nnunet_sam2.doctor.finding import Level
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.label_tables import read_label_table
from nnunet_sam2.files.repairs import STRICT
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.review.take_in import take_in
from nnunet_sam2.submission import VALUES, check_submission
from nnunet_sam2.volumes import read_label, read_label_as, write_image, write_label

DECLARED = {"background": 0, "liver": 1, "spleen": 2}
CONVERT = ["-d", "7", "-n", "T"]


def drawn() -> np.ndarray:
    """Liver 1 and spleen 2, apart."""
    label = np.zeros(SHAPE, np.uint8)
    label[1:3, 2:5, 2:6], label[2:4, 6:9, 7:11] = 1, 2
    return label


def write_segments(path: Path, layers: Sequence[np.ndarray], segments: Sequence[tuple[str, int, int]]) -> None:
    """Write NRRD as 3D Slicer does: (name, value, layer) of each segment in the header."""
    array = layers[0] if len(layers) == 1 else np.stack(layers, axis=-1)
    image = SimpleITK.GetImageFromArray(array, isVector=len(layers) > 1)
    image.SetSpacing(GRID.spacing_xyz_mm)
    for n, (name, value, layer) in enumerate(segments):
        for key, told in (("Name", name), ("LabelValue", str(value)), ("Layer", str(layer)), ("ID", f"Segment_{n}")):
            image.SetMetaData(f"Segment{n}_{key}", told)
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path), True)


def swapped(label: np.ndarray) -> np.ndarray:
    return np.array([0, 2, 1], np.uint8)[label]


def read_named(path: Path) -> tuple[np.ndarray, str | None, int]:
    label_zyx, _, repairs = read_label_as(path, STRICT, allowed=(1, 2), names=DECLARED)
    return label_zyx, repairs.renamed, repairs.renamed_voxels


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Three labelled cases, the third with its segments the other way round, and an unlabelled one."""
    folder = tmp_path / "source"
    for n, name in enumerate(("a", "b", "c", "d")):
        write_image(folder / f"images/{name}.nii.gz", random_image(n), GRID)
    for name in ("a", "b"):
        write_segments(folder / f"labels/{name}.nrrd", [drawn()], [("liver", 1, 0), ("spleen", 2, 0)])
    write_segments(folder / "labels/c.seg.nrrd", [swapped(drawn())], [("Spleen ", 1, 0), ("LIVER", 2, 0)])
    return folder


@pytest.mark.parametrize("declared", [["--labels", "liver=1,spleen=2"], ["--labels", "spleen=2,liver=1"]])
def test_segments_are_mapped_by_name_with_a_note_and_a_count(
    declared: list[str], three: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(three), *CONVERT, *declared]) == 0
    told = capsys.readouterr().out
    count = np.count_nonzero(drawn())
    assert f"c.seg.nrrd: {count} label voxels were mapped by the names in its label table" in told
    raw = fresh_roots / "nnUNet_raw" / "Dataset007_T"
    for name in ("a", "b", "c"):
        np.testing.assert_array_equal(read_label(raw / f"labelsTr/{name}.nii.gz")[0], drawn())
    assert Cohort.load(raw).case("c").repairs["labels/c.seg.nrrd"]["renamed_voxels"] == count


def test_names_that_contradict_each_other_without_declared_labels_are_refused_with_the_option(
    three: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(three), *CONVERT]) == 2
    assert "--labels liver=1,spleen=2" in capsys.readouterr().err
    (three / "labels/c.seg.nrrd").unlink()
    assert main(["convert", str(three), *CONVERT]) == 0
    assert "2 label files name their values" in capsys.readouterr().out
    assert Cohort.load(fresh_roots / "nnUNet_raw" / "Dataset007_T").labels == DECLARED


def test_a_segment_that_is_not_declared_is_refused_with_both_lists(tmp_path: Path) -> None:
    path = tmp_path / "x.nrrd"
    write_segments(path, [drawn()], [("liver", 1, 0), ("milt", 2, 0)])
    with pytest.raises(InputError, match=r"holds milt by its label table, declared are background, liver, spleen"):
        read_named(path)
    write_segments(path, [drawn()], [("liver", 1, 0)])
    with pytest.raises(InputError, match=r"holds the value 2, which its label table does not name \(it names liver=1"):
        read_named(path)
    # A segment without a voxel is no reason to refuse.
    write_segments(path, [drawn()], [("liver", 1, 0), ("spleen", 2, 0), ("scratch", 3, 0)])
    np.testing.assert_array_equal(read_named(path)[0], drawn())


def test_layers_are_merged_where_they_do_not_overlap_and_refused_else(tmp_path: Path) -> None:
    path = tmp_path / "x.seg.nrrd"
    layers = [(drawn() == 1).astype(np.uint8), (drawn() == 2).astype(np.uint8)]
    write_segments(path, layers, [("liver", 1, 0), ("spleen", 1, 1)])
    label, said, _ = read_named(path)
    np.testing.assert_array_equal(label, drawn())
    assert said is not None
    assert said.startswith("2 layers merged")
    layers[1][1:3, 2:5, 2:3] = 1
    write_segments(path, layers, [("liver", 1, 0), ("spleen", 1, 1)])
    with pytest.raises(InputError, match="segment spleen overlaps another one in 6 voxels"):
        read_named(path)


def test_a_metaimage_that_kept_the_segments_is_read_by_them(tmp_path: Path) -> None:
    write_segments(tmp_path / "x.nrrd", [swapped(drawn())], [("spleen", 1, 0), ("liver", 2, 0)])
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(tmp_path / "x.nrrd")), str(tmp_path / "x.mha"), True)
    np.testing.assert_array_equal(read_named(tmp_path / "x.mha")[0], drawn())


WORKBENCH = (
    '<CaretExtension><VolumeInformation Index="0"><LabelTable><Label Key="0" Red="1">???</Label>'
    '<Label Key="1" Red="1"><![CDATA[spleen]]></Label><Label Key="2">liver</Label></LabelTable></VolumeInformation>'
    "</CaretExtension>"
)
AFNI = '<AFNI_attributes><AFNI_atr ni_type="String" atr_name="VALUE_LABEL_DTABLE" >"&lt;VALUE_LABEL_DTABLE\n'
AFNI += '&quot;1&quot; &quot;spleen&quot;\n&quot;2&quot; &quot;liver&quot;\n"</AFNI_atr></AFNI_attributes>'


@pytest.mark.parametrize(
    ("code", "text"),
    [(30, WORKBENCH), (4, AFNI), (6, '{"spleen": 1, "liver": 2}'), (6, '{"labels": {"1": "spleen", "2": "liver"}}')],
)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_table_in_a_nifti_extension_is_read(code: int, text: str, ending: str, tmp_path: Path) -> None:
    write_label(tmp_path / "plain.nii", swapped(drawn()), GRID)
    image = nibabel.load(tmp_path / "plain.nii")
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(code, text.encode()))
    nibabel.save(image, tmp_path / f"x{ending}")
    np.testing.assert_array_equal(read_named(tmp_path / f"x{ending}")[0], drawn())


def _itksnap(names: dict[int, str]) -> str:
    lines = ["# ITK-SnAP Label Description File", '    0     0    0    0        0  0  0    "Clear Label"']
    return "\n".join([*lines, *(f'{v:5d}   255    0    0        1  1  1    "{name}"' for v, name in names.items())])


def test_a_label_description_of_itk_snap_beside_the_labels_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.nii.gz"
    write_label(path, swapped(drawn()), GRID)
    (tmp_path / "labels.txt").write_text(_itksnap({1: "Spleen", 2: "Liver"}))
    np.testing.assert_array_equal(read_named(path)[0], drawn())
    (tmp_path / "other.txt").write_text(_itksnap({1: "Liver", 2: "Spleen"}))
    with pytest.raises(InputError, match=r"labels\.txt and other\.txt beside it differ"):
        read_named(path)
    (tmp_path / "other.txt").rename(tmp_path / "x.txt")
    np.testing.assert_array_equal(read_named(path)[0], swapped(drawn()))
    # Its own default names nothing.
    (tmp_path / "x.txt").unlink()
    (tmp_path / "labels.txt").write_text(_itksnap({n: f"Label {n}" for n in range(1, 7)}))
    assert read_label_table(path) == ()


def test_a_segmentation_of_slicer_is_imported_by_its_names(
    fresh_dataset: DatasetFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = Cohort.load(fresh_dataset.raw)
    case = cohort.unlabelled[0]
    one, two = (next(name for name, v in cohort.labels.items() if v == value) for value in (1, 2))
    label = np.zeros(case.geometry.shape_zyx, np.uint8)
    label[3:8, 8:20, 8:20], label[4:7, 24:32, 24:32] = 1, 2
    path = tmp_path / f"{case.case_id}.seg.nrrd"
    write_label(tmp_path / "x.nrrd", swapped(label), case.geometry)
    image = SimpleITK.ReadImage(str(tmp_path / "x.nrrd"))
    for n, (name, value) in enumerate(((two, 1), (one, 2))):
        image.SetMetaData(f"Segment{n}_Name", name.upper())
        image.SetMetaData(f"Segment{n}_LabelValue", str(value))
    SimpleITK.WriteImage(image, str(path), True)
    ((_, kept),) = take_in(fresh_dataset.raw, [path])
    np.testing.assert_array_equal(read_label(kept)[0], label)
    assert "label voxels were mapped by the names" in capsys.readouterr().out


@pytest.mark.parametrize("declared", [["--labels", "liver=1,spleen=2"], []])
def test_evaluate_compares_by_the_names_that_the_files_give_their_values(
    declared: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, guess = tmp_path / "truth", tmp_path / "guess"
    write_segments(truth / "a.nrrd", [drawn()], [("liver", 1, 0), ("spleen", 2, 0)])
    write_segments(guess / "a.nrrd", [swapped(drawn())], [("Liver", 2, 0), ("Spleen", 1, 0)])
    status = main(["evaluate", "-g", str(truth), "-p", str(guess), *declared])
    shown = capsys.readouterr()
    if declared:
        assert status == 0
        assert "mapped by the names in their label tables" in shown.out + shown.err
        assert "1.0000" in shown.out.splitlines()[-1]
    else:
        assert status == 2
        assert "--labels" in shown.err


def test_evaluate_takes_the_names_that_the_files_agree_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_segments(tmp_path / "truth/a.nrrd", [drawn()], [("liver", 1, 0), ("spleen", 2, 0)])
    write_label(tmp_path / "guess/a.nrrd", drawn(), GRID)
    assert main(["evaluate", "-g", str(tmp_path / "truth"), "-p", str(tmp_path / "guess")]) == 0
    assert "1.0000" in capsys.readouterr().out.splitlines()[-1]


def test_a_submission_whose_label_table_contradicts_its_values_is_faulty(tmp_path: Path) -> None:
    cases = {"a": GRID}
    names = {"background": 0, "liver": 1, "spleen": 2}
    write_segments(tmp_path / "a.nrrd", [swapped(drawn())], [("liver", 2, 0), ("spleen", 1, 0)])
    (problem,) = check_submission(tmp_path, cases, ending=".nrrd", allowed=(1, 2), names=names)
    assert problem.kind == VALUES
    assert "liver 2 -> 1" in problem.text
    write_segments(tmp_path / "a.nrrd", [drawn()], [("liver", 1, 0), ("spleen", 2, 0)])
    assert check_submission(tmp_path, cases, ending=".nrrd", allowed=(1, 2), names=names) == []


def test_doctor_finds_a_converted_label_that_was_replaced_by_one_with_other_names(
    three: Path, fresh_roots: Path
) -> None:
    assert main(["convert", str(three), *CONVERT, "--labels", "liver=1,spleen=2"]) == 0
    cohort = Cohort.load(fresh_roots / "nnUNet_raw" / "Dataset007_T")
    assert check_labels(cohort).level is Level.OK
    path = cohort.label_path(cohort.labelled[0])
    image = nibabel.load(path)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(30, WORKBENCH.encode()))
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), path)
    finding = check_labels(cohort)
    assert finding.level is Level.FAIL
    assert "other names for its values" in finding.message
