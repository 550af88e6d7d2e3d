"""One rule says which files are which case and channel, whatever command is given the folder."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from small_source import GRID, random_image

from nnunet_sam2.cli.main import main
from nnunet_sam2.cli.predict import find_cases
from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.cohort.layouts import find
from nnunet_sam2.cohort.layouts.file_names import cases_of_files
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.checks import VOLUME_ENDINGS
from nnunet_sam2.volumes import write_image, write_label

ROW = ("img_0000", "img_0001", "img_0002")


def sorted_into(*stems: str, **known: object) -> dict[str, list[str]]:
    files = {stem: Path("somewhere") / f"{stem}.nii.gz" for stem in stems}
    return {
        case: [p.name.removesuffix(".nii.gz") for p in paths] for case, paths in cases_of_files(files, **known).items()
    }


def each(*stems: str) -> dict[str, list[str]]:
    return {stem: [stem] for stem in stems}


def test_a_row_of_numbers_is_as_many_cases_as_the_known_number_of_channels_says() -> None:
    assert sorted_into(*ROW, counts=(1,)) == each(*ROW)
    assert sorted_into(*ROW, counts=(3,)) == {"img": list(ROW)}
    with pytest.raises(InputError, match="lacks channel img_0003"):
        sorted_into(*ROW, counts=(4,))
    with pytest.raises(InputError, match="channel img_0002 in somewhere is surplus"):
        sorted_into(*ROW, counts=(2,))


def test_where_nothing_is_known_labels_tell() -> None:
    assert sorted_into(*ROW, labelled={"img_0001"}) == each(*ROW)
    assert sorted_into(*ROW, labelled={"img"}) == {"img": list(ROW)}
    with pytest.raises(InputError, match="labels fit both: img_0001 and img"):
        sorted_into(*ROW, labelled={"img", "img_0001"})


def test_what_stays_open_is_refused_with_both_readings_and_the_option() -> None:
    both = r"3 channels of one case img, or to 3 cases with one channel .*--suffix channel or --suffix case"
    with pytest.raises(InputError, match=both):
        sorted_into(*ROW)
    assert sorted_into(*ROW, suffix="case") == each(*ROW)
    assert sorted_into(*ROW, suffix="channel") == {"img": list(ROW)}


def test_the_other_images_of_the_set_tell() -> None:
    assert sorted_into("img_0000", counts=(1,), others=[("scan_0004", "scan_0004")]) == each("img_0000")
    assert sorted_into("img_0000", counts=(1,), others=[("scan", "scan_0000")]) == {"img": ["img_0000"]}
    with pytest.raises(InputError, match=r"channel 0 of case img, or to case img_0000 .*bear no such numbers"):
        sorted_into("img_0000", counts=(1,), others=[("scan", "scan")])


def test_nnunets_own_names_are_taken_at_their_word() -> None:
    assert sorted_into("a_0000", "b_0000") == {"a": ["a_0000"], "b": ["b_0000"]}
    assert sorted_into("a_0000", counts=(1,)) == {"a": ["a_0000"]}
    two = ("a_0000", "a_0001", "b_0000", "b_0001")
    assert sorted_into(*two) == {"a": ["a_0000", "a_0001"], "b": ["b_0000", "b_0001"]}
    assert sorted_into(*two, counts=(1,)) == each(*two)
    assert sorted_into("a", "b_0000", counts=(1,)) == {"a": ["a"], "b": ["b_0000"]}


@pytest.mark.parametrize(
    ("stems", "known", "message"),
    [
        (("a", "a_0000"), {"counts": (1,), "suffix": "channel"}, "are the same case"),
        (("a", "b_0000", "b_0001"), {"counts": (2,)}, "a.nii.gz has no channel suffix, .*name it a_0000"),
        (("a",), {"counts": (2,)}, "a case takes 2 files here"),
        (("a_0000", "a_0001", "b_0000"), {"counts": (2,)}, "lacks channel b_0001"),
        (("a_0001", "b_0001"), {"counts": (2,)}, "lacks channel a_0000"),
    ],
)
def test_names_that_fit_no_reading_are_refused_with_what_is_amiss(
    stems: tuple[str, ...], known: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sorted_into(*stems, **known)


def test_pictures_in_colour_are_one_file_with_three_channels() -> None:
    assert sorted_into("a", "b", counts=(3, 1)) == each("a", "b")
    assert sorted_into("a_0000", "a_0001", "a_0002", counts=(3, 1), suffix="channel") == {
        "a": ["a_0000", "a_0001", "a_0002"]
    }


def test_predict_reads_endings_in_any_case_and_names_what_it_passes_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.nii.gz", "c.NII.GZ", "photo.png", "notes.txt", *(f"{stem}.nii" for stem in ROW)):
        (tmp_path / name).write_bytes(b"")
    cases = find_cases(tmp_path, VOLUME_ENDINGS, files_a_case=1)
    assert sorted(cases) == ["a", "c", *ROW]
    assert "1 files are passed over (photo.png)" in capsys.readouterr().out


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Three cases with one channel whose names end in numbers, two of them labelled, and a test case like them."""
    source = tmp_path / "source"
    for n, name in enumerate(ROW):
        write_image(source / f"images/{name}.nii.gz", random_image(n), GRID)
    label = np.zeros(GRID.shape_zyx, np.uint8)
    label[1:3, 2:5, 2:6] = 1
    for name in ROW[:2]:
        write_label(source / f"labels/{name}.nii.gz", label, GRID)
    write_image(source / "test/images/img_0000x_0000.nii.gz", random_image(7), GRID)
    return source


def test_a_test_folder_is_read_as_its_source_was(numbered: Path, fresh_roots: Path) -> None:
    assert main(["convert", str(numbered), "-d", "7", "-n", "T"]) == 0
    cohort = Cohort.load(fresh_roots / "nnUNet_raw" / "Dataset007_T")
    assert [case.case_id for case in cohort.test] == ["img_0000x_0000"]


def test_three_right_labels_of_three_images_are_all_good_and_one_is_not(
    numbered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handed_in = tmp_path / "handed_in"
    for name in ROW:
        write_label(handed_in / f"{name}.nii.gz", np.zeros(GRID.shape_zyx, np.uint8), GRID)
    check = ["check-submission", "-i", str(numbered / "images"), "-p", str(handed_in)]
    assert main([*check, "--suffix", "case"]) == 0
    assert main(check) == 2
    assert "--suffix case" in capsys.readouterr().err
    for name in ROW[1:]:
        (handed_in / f"{name}.nii.gz").unlink()
    assert main([*check, "--suffix", "case"]) == 1


def _nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "gone.json")


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (_nowhere, "is a link to nothing"),
        (lambda path: os.mkfifo(path), "is no file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.symlink_to("/dev/null"), "is no file"),
        (lambda path: path.write_text("null"), "no JSON object"),
        (lambda path: path.write_text("[]"), "no JSON object"),
        (lambda path: path.write_text('"x"'), "no JSON object"),
    ],
)
def test_a_dataset_json_that_is_none_is_refused_and_not_waited_for(
    put: object, message: str, numbered: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(numbered / "dataset.json")  # type: ignore[operator]
    assert main(["convert", str(numbered), "-d", "7", "-n", "T"]) == 2
    assert message in capsys.readouterr().err
    labels = numbered / "labels"
    assert main(["evaluate", "-g", str(labels), "-p", str(labels)]) == 2
    assert message in capsys.readouterr().err


def test_declared_channels_settle_what_names_leave_open(tmp_path: Path) -> None:
    for name in ROW[:2]:
        write_image(tmp_path / f"images/{name}.nii.gz", random_image(1), GRID)
    with pytest.raises(InputError, match="--suffix"):
        find(tmp_path, "folder")
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "T2"}}))
    assert [(case.case_id, len(case.images)) for case in find(tmp_path, "folder").cases] == [("img", 2)]
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1"}}))
    assert [case.case_id for case in find(tmp_path, "folder").cases] == list(ROW[:2])


@pytest.mark.parametrize("seed", range(20))
def test_made_up_folders_are_sorted_whole_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        stems = set()
        for case in rng.sample(["a", "b", "a_0001", "x.y", "Ä", "p_00012"], rng.randint(1, 4)):
            stems |= set(rng.sample([case, *(f"{case}_{n:04d}" for n in range(3))], rng.randint(1, 3)))
        known = {
            "counts": rng.choice([None, (1,), (2,), (3, 1)]),
            "labelled": set(rng.sample(sorted(stems), rng.randint(0, 1))),
            "suffix": rng.choice(["auto", "auto", "case", "channel"]),
        }
        found: dict[str, list[str]] = {}
        with contextlib.suppress(InputError):
            found = sorted_into(*sorted(stems), **known)
        if not found:
            continue
        files = [stem for of_case in found.values() for stem in of_case]
        assert sorted(files) == sorted(stems)
        assert len({len(of_case) for of_case in found.values()}) == 1
        assert known["counts"] is None or len(next(iter(found.values()))) in known["counts"]
