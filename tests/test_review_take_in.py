"""A case goes to an editor with all that it needs and comes back as a human label, or is refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import ADDED_LABELS, Cohort, Role
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.geometry import ORIGIN_TOLERANCE_MM, Geometry
from nnunet_sam2.report.run_files import RunFiles
from nnunet_sam2.review.hand_over import hand_over, itksnap_labels, slicer_colours
from nnunet_sam2.review.take_in import HISTORY_KEY, find_case, take_in
from nnunet_sam2.storage import TEMPORARY_MARK, file_hash
from nnunet_sam2.volumes import read_label, write_label

NAME = "subject_003"


def _label(geometry: Geometry, shift: int = 0) -> np.ndarray:
    label = np.zeros(geometry.shape_zyx, np.uint8)
    label[3:8, 8:20, 8 + shift : 20 + shift] = 1
    label[4:7, 24:32, 24:32] = 2
    return label


@pytest.fixture
def drawn(fresh_dataset: DatasetFolders, tmp_path: Path) -> tuple[Path, Path]:
    """Return a raw folder and the label that a person drew of one of its unlabelled cases."""
    geometry = Cohort.load(fresh_dataset.raw).case(NAME).geometry
    path = tmp_path / "mine" / f"{NAME}.nii.gz"
    write_label(path, _label(geometry), geometry)
    return fresh_dataset.raw, path


def test_a_corrected_label_makes_the_case_a_labelled_one_and_is_never_changed_again(drawn: tuple[Path, Path]) -> None:
    raw, path = drawn
    before = {p: file_hash(p) for p in raw.rglob("*") if p.is_file() and p.name != "cohort.json"}
    ((case_id, kept),) = take_in(raw, [path])
    case = Cohort.load(raw).case(NAME)
    assert case_id == NAME
    assert (case.role, case.as_planned.role) == (Role.LABELLED, Role.UNLABELLED)
    assert case.added is not None
    assert raw / case.added.label == kept == Cohort.load(raw).label_path(case)
    assert case.added.sha256 == file_hash(kept)
    assert kept.stat().st_mode & 0o222 == 0
    np.testing.assert_array_equal(read_label(kept)[0], read_label(path)[0])
    (entry,) = Cohort.load(raw).provenance[HISTORY_KEY]
    assert (entry["case"], entry["from"], entry["to"], entry["source"]) == (NAME, "unlabelled", "labelled", path.name)
    assert {p: file_hash(p) for p in before} == before
    assert not list(raw.rglob(f"{TEMPORARY_MARK}*"))


def test_of_several_files_each_that_is_refused_is_named_and_none_is_taken(
    drawn: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, path = drawn
    before = Cohort.load(raw)
    stranger = tmp_path / "stranger.nii.gz"
    write_label(stranger, _label(before.case(NAME).geometry), before.case(NAME).geometry)
    with pytest.raises(InputError, match="2 of 3 files cannot be used"):
        take_in(raw, [tmp_path / "nowhere.nii.gz", path, stranger])
    told = capsys.readouterr().out.splitlines()
    assert ["nowhere" in told[0], "no case of" in told[1], len(told)] == [True, True, 2]
    assert Cohort.load(raw) == before


def test_a_label_that_another_case_has_voxel_for_voxel_is_refused(drawn: tuple[Path, Path], tmp_path: Path) -> None:
    raw, path = drawn
    cohort = Cohort.load(raw)
    of, other = cohort.labelled[0], cohort.unlabelled[1]
    twin = tmp_path / f"{other.case_id}.nii.gz"
    write_label(twin, read_label(cohort.label_path(of))[0], other.geometry)
    with pytest.raises(InputError, match=f"case {other.case_id} would get the label of case {of.case_id}, voxel for"):
        take_in(raw, [twin])
    write_label(twin, read_label(path)[0], other.geometry)
    with pytest.raises(InputError, match=f"would get the label of case {NAME}, voxel for voxel"):
        take_in(raw, [path, twin])
    assert Cohort.load(raw) == cohort


def test_the_command_says_how_far_a_label_agrees_with_the_runs_and_what_goes_on_with_the_run(
    run: tuple[DatasetFolders, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders, folder = run
    first, second = RunFiles.open(folders, folder).cohort.unlabelled
    machine = read_label(folder / "r02" / "labels" / f"{first.case_id}.nii.gz")[0]
    machine[0, 0, 0] = 1
    write_label(tmp_path / f"{first.case_id}.nii.gz", machine, first.geometry)
    other = np.zeros(second.geometry.shape_zyx, np.uint8)
    other[:, :2, :2] = 1
    write_label(tmp_path / f"{second.case_id}.nii.gz", other, second.geometry)
    files = [str(tmp_path / f"{case.case_id}.nii.gz") for case in (first, second)]
    assert main(["review", "-d", "501", "--import", *files]) == 0
    told = capsys.readouterr().out.splitlines()
    agrees = [line for line in told if "Dice with the label that the run had drawn" in line]
    assert [line.split(":")[0] for line in agrees] == [first.case_id, second.case_id]
    assert [line.split(":")[0] for line in told if "if the file is another case's" in line] == [second.case_id]
    assert told[-1].endswith("nnunet_sam2 run -d 501 -c 3d_fullres -f 0 --profile gpu")
    assert main(["status", "-d", "501"]) == 0
    assert "people's word on 2 cases waits" in capsys.readouterr().out


def test_a_second_label_needs_replace_and_the_first_one_stays_on_disk(drawn: tuple[Path, Path]) -> None:
    raw, path = drawn
    ((_, first),) = take_in(raw, [path])
    bytes_before = first.read_bytes()
    geometry = Cohort.load(raw).case(NAME).geometry
    write_label(path, _label(geometry, shift=3), geometry)
    with pytest.raises(InputError, match=r"has a human label since .*--replace"):
        take_in(raw, [path])
    ((_, second),) = take_in(raw, [path], replace=True)
    assert second != first
    assert first.read_bytes() == bytes_before
    assert Cohort.load(raw).label_path(Cohort.load(raw).case(NAME)) == second
    assert len(Cohort.load(raw).provenance[HISTORY_KEY]) == 2


def test_a_label_of_some_classes_answers_for_these_alone(drawn: tuple[Path, Path]) -> None:
    raw, path = drawn
    take_in(raw, [path], classes=["large_organ"])
    case = Cohort.load(raw).case(NAME)
    assert (case.role, case.label) == (Role.UNLABELLED, None)
    assert case.added is not None
    assert case.added.classes == (1,)
    with pytest.raises(InputError, match="no class 'heart'; there are large_organ, small_organ"):
        take_in(raw, [path], classes=["heart"], replace=True)
    take_in(raw, [path], classes=["2", "large_organ"], replace=True)
    again = Cohort.load(raw).case(NAME).added
    assert again is not None
    assert again.classes == (1, 2)


def test_files_of_editors_are_read_in_their_formats_and_within_the_named_tolerances(
    drawn: tuple[Path, Path], tmp_path: Path
) -> None:
    raw, path = drawn
    geometry = Cohort.load(raw).case(NAME).geometry
    x, y, z = geometry.origin_xyz_mm
    near = replace(geometry, origin_xyz_mm=(x + ORIGIN_TOLERANCE_MM / 2, y, z))
    for name in (f"{NAME}_corrected.nii", f"{NAME}-final.nrrd", f"{NAME}.mha"):
        write_label(tmp_path / name, _label(geometry), near)
        take_in(raw, [tmp_path / name], replace=True)
        kept = Cohort.load(raw).case(NAME).added
        assert kept is not None
        # Kept on the image's own grid.
        assert read_label(raw / kept.label)[1] == geometry
    image = SimpleITK.ReadImage(str(path))
    SimpleITK.WriteImage(SimpleITK.Cast(image, SimpleITK.sitkFloat32), str(tmp_path / f"{NAME} float.nii.gz"))
    take_in(raw, [tmp_path / f"{NAME} float.nii.gz"], replace=True)


def test_what_does_not_fit_is_refused_and_nothing_is_taken(drawn: tuple[Path, Path], tmp_path: Path) -> None:
    raw, path = drawn
    geometry = Cohort.load(raw).case(NAME).geometry
    known = (raw / "cohort.json").read_bytes()

    def refused(label: np.ndarray, grid: Geometry, match: str, name: str = f"{NAME}.nii.gz", **more: object) -> None:
        write_label(tmp_path / "bad" / name, label, grid)
        with pytest.raises(InputError, match=match):
            take_in(raw, [path, tmp_path / "bad" / name] if "other" in name else [tmp_path / "bad" / name], **more)  # type: ignore[arg-type]

    label = _label(geometry)
    sx, sy, sz = geometry.spacing_xyz_mm
    refused(label, replace(geometry, spacing_xyz_mm=(sx, sy, sz + 0.1)), "differ in spacing")
    refused(label, replace(geometry, origin_xyz_mm=(9.0, 9.0, 9.0)), "differ in origin")
    refused(label, replace(geometry, direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1)), "differ in direction")
    refused(label[:, :, 1:], Cohort.load(raw).case(NAME).geometry.cropped((0, 0, 1), geometry.shape_zyx), "in shape")
    refused(label * 3, geometry, "holds label 3, 6, declared are 0, 1, 2")
    refused(np.zeros_like(label), geometry, "shows none of the classes.*--allow-empty")
    refused(label, geometry, "no case of .* begins this name; .*--case", name="other.nii.gz")
    refused(label, geometry, "held out for tests", case_id=Cohort.load(raw).test[0].case_id)
    refused(label, geometry, "human label from the start", case_id=Cohort.load(raw).labelled[0].case_id)
    refused(label, geometry, "no case nobody", case_id="nobody")
    (tmp_path / f"{NAME}.seg.nrrd").write_bytes(b"NRRD0004\n")
    with pytest.raises(InputError, match="cannot be read"):
        take_in(raw, [tmp_path / f"{NAME}.seg.nrrd"])
    with pytest.raises(InputError, match="two of the files are for case"):
        take_in(raw, [path, path])
    with pytest.raises(InputError, match="--case names the case of one file"):
        take_in(raw, [path, path], case_id=NAME)
    truncated = tmp_path / "bad" / f"{NAME}_cut.nii.gz"
    truncated.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cut"):
        take_in(raw, [truncated])
    assert (raw / "cohort.json").read_bytes() == known
    assert not (raw / ADDED_LABELS).exists()


def test_the_longest_name_that_fits_is_the_case(drawn: tuple[Path, Path]) -> None:
    cohort = Cohort.load(drawn[0])
    first = cohort.case(NAME)
    more = replace(cohort, cases=(*cohort.cases, replace(first, case_id=f"{NAME}_b")))
    for name, expected in ((f"{NAME}_b_new.nii.gz", f"{NAME}_b"), (f"{NAME}_c.nii", NAME), (f"{NAME}.nii.gz", NAME)):
        assert find_case(more, Path("x") / name).case_id == expected
    with pytest.raises(InputError, match="begins this name"):
        find_case(more, Path(f"{NAME}1.nii.gz"))


def test_a_case_is_handed_over_with_all_that_an_editor_needs_and_found_again(
    run: tuple[DatasetFolders, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folders, folder = run
    assert main(["review", "-d", "501", "--export", NAME]) == 0
    out = folder / "review" / "export" / NAME
    assert str(out) in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {
        f"{NAME}_0000.nii.gz", f"{NAME}.nii.gz", "labels_itksnap.txt", "labels_slicer.ctbl", "README.txt",
        "export.json",
    }  # fmt: skip
    assert file_hash(out / f"{NAME}.nii.gz") == file_hash(folder / "r02" / "labels" / f"{NAME}.nii.gz")
    assert f'nnunet_sam2 review -d 501 --import "{out / NAME}.nii.gz"' in (out / "README.txt").read_text()
    assert main(["review", "-d", "501", "--export", NAME]) == 2
    assert "may hold your work" in capsys.readouterr().err
    assert main(["review", "-d", "501", "--import", str(out / f"{NAME}.nii.gz")]) == 2
    assert "no voxel was corrected" in capsys.readouterr().err
    geometry = Cohort.load(folders.raw).case(NAME).geometry
    write_label(out / "Segmentation.nii.gz", _label(geometry, shift=4), geometry)
    assert main(["review", "-d", "501", "--import", str(out / "Segmentation.nii.gz")]) == 0
    assert Cohort.load(folders.raw).case(NAME).role is Role.LABELLED
    with pytest.raises(InputError, match="is a labelled one"):
        hand_over(folders, folder, "subject_000")
    assert main(["review", "-d", "501", "--case", NAME]) == 2


def test_a_case_of_which_some_classes_were_drawn_is_handed_over_with_the_newest_of_the_others(
    run: tuple[DatasetFolders, Path], tmp_path: Path
) -> None:
    folders, folder = run
    geometry = Cohort.load(folders.raw).case(NAME).geometry
    mine = _label(geometry, shift=9)
    mine[mine == 2] = 0
    write_label(tmp_path / f"{NAME}.nii.gz", mine, geometry)
    take_in(folders.raw, [tmp_path / f"{NAME}.nii.gz"], classes=["large_organ"])
    out = hand_over(folders, folder, NAME)
    handed, _ = read_label(out / f"{NAME}.nii.gz")
    newest, _ = read_label(folder / "r02" / "labels" / f"{NAME}.nii.gz")
    np.testing.assert_array_equal(handed == 1, mine == 1)
    np.testing.assert_array_equal(handed == 2, newest == 2)


def test_a_file_of_another_program_beside_the_label_is_not_taken_for_ours(drawn: tuple[Path, Path]) -> None:
    raw, path = drawn
    for written in ("[]", "{", '{"dataset": "Dataset001_Other", "case": "subject_004"}'):
        (path.parent / "export.json").write_text(written)
        assert take_in(raw, [path], replace=True)[0][0] == NAME
        with pytest.raises(InputError, match="begins this name"):
            find_case(Cohort.load(raw), path.parent / "Segmentation.nii.gz")


def test_colour_tables_are_as_the_editors_write_them() -> None:
    colours = {1: ("left lung", (255, 138, 61)), 2: ('a "b"', (67, 180, 255))}
    assert itksnap_labels(colours).splitlines()[5:] == [
        '    0     0    0    0        0  0  0    "Clear Label"',
        '    1   255  138   61        1  1  1    "left lung"',
        "    2    67  180  255        1  1  1    \"a 'b'\"",
    ]
    assert slicer_colours(colours).splitlines()[2:] == [
        "0 background 0 0 0 0", "1 left_lung 255 138 61 255", '2 a_"b" 67 180 255 255',
    ]  # fmt: skip
