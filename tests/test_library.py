"""The support library, and labelling of pictures through it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.cohort.convert import ConvertOptions, convert
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.pictures import write_picture
from nnunet_sam2.folders import new_dataset_folders
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.labeller import label_cases
from nnunet_sam2.labelling.registry import make_strategy, parse_settings
from nnunet_sam2.sam2.backend import load_backend
from nnunet_sam2.support.library import (
    choose_supports,
    load_query,
    read_probabilities,
    write_probabilities,
)
from nnunet_sam2.support.showing import cohort_slice_axis
from nnunet_sam2.volumes import read_label, read_map


def test_supports_are_all_labelled_cases_the_first_few_or_those_named(cohort: Cohort) -> None:
    ids = tuple(case.case_id for case in cohort.labelled)
    assert choose_supports(cohort) == ids
    assert choose_supports(cohort, "2") == ids[:2]
    assert choose_supports(cohort, f"{ids[2]},{ids[0]},{ids[2]}") == (ids[2], ids[0])


def test_supports_that_cannot_be_used_are_refused_by_name(cohort: Cohort) -> None:
    unlabelled = cohort.unlabelled[0].case_id
    for wanted, message in (("0", "--supports 0"), ("99", "--supports 99"), (unlabelled, unlabelled), (",", "empty")):
        with pytest.raises(InputError, match=message):
            choose_supports(cohort, wanted)
    with pytest.raises(InputError, match="no labelled case"):
        choose_supports(dataclasses.replace(cohort, cases=cohort.unlabelled))


def test_a_few_oddly_spaced_volumes_do_not_turn_the_slices(cohort: Cohort) -> None:
    def spaced(count: int, spacing: tuple[float, float, float]) -> list[object]:
        geometry = Geometry(shape_zyx=(12, 40, 40), spacing_xyz_mm=spacing)
        return [dataclasses.replace(cohort.labelled[0], geometry=geometry)] * count

    sagittal, axial = spaced(2, (5.0, 1.0, 1.0)), spaced(1, (1.0, 1.0, 5.0))
    assert cohort_slice_axis(dataclasses.replace(cohort, cases=(*sagittal, *axial))) == 2
    assert cohort_slice_axis(dataclasses.replace(cohort, cases=(*sagittal[:1], *axial))) == 0


def test_probabilities_of_another_shape_or_kind_are_refused(cohort: Cohort, tmp_path: Path) -> None:
    backend = load_backend("untrained", device="cpu", image_size=64, threads=1)
    case = cohort.unlabelled[0]
    path = tmp_path / f"{case.case_id}.npz"
    write_probabilities(path, np.zeros((2, 3, 4, 5), np.float32))
    with pytest.raises(InputError, match="expected"):
        load_query(cohort, case, backend, slice_axis=0, student_probabilities=tmp_path)
    whole = path.read_bytes()
    with_other_bits = bytearray(whole)
    with_other_bits[len(whole) // 2] ^= 255
    for damaged in (b"PK not a zip", b"", whole[: len(whole) // 2], bytes(with_other_bits)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="no probabilities"):
            read_probabilities(path)


def test_settings_from_the_command_line_are_checked() -> None:
    assert parse_settings(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    for wrong in (["a"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(InputError, match="--set"):
            parse_settings(wrong)
    with pytest.raises(InputError, match=r"choose one of: .*insert, .*transfer"):
        make_strategy("transfers")


@pytest.mark.parametrize("colours", [1, 3])
def test_pictures_are_labelled_too(fresh_roots: Path, tmp_path: Path, colours: int) -> None:
    source = tmp_path / "pictures"
    rng = np.random.default_rng(4)
    for number in range(4):
        rows, columns = np.mgrid[:64, :48]
        label = (np.hypot(rows - 30 - number, columns - 24) < 12).astype(np.uint8)
        image = (60 + 120 * label + rng.integers(0, 30, label.shape)).astype(np.uint8)
        (source / "images").mkdir(parents=True, exist_ok=True)
        (source / "labels").mkdir(exist_ok=True)
        write_picture(source / "images" / f"p{number}.png", np.repeat(image[None], colours, axis=0))
        if number < 3:
            write_picture(source / "labels" / f"p{number}.png", label[None])
    folders = new_dataset_folders(510, "Pictures")
    convert(source, folders, ConvertOptions())
    cohort = Cohort.load(folders.raw)
    out = tmp_path / "out"
    (record,) = label_cases(
        cohort=cohort,
        case_ids=["p3"],
        support_ids=["p0", "p1", "p2"],
        strategy=make_strategy("transfer", {"check_slices": "0"}),
        backend=load_backend("untrained", device="cpu", image_size=128, threads=1),
        out=out,
        seed=0,
    )
    label_zyx, _ = read_label(out / f"p3{cohort.file_ending}", allowed=[1])
    truth = np.hypot(np.mgrid[:64][:, None] - 33, np.arange(48)[None] - 24) < 12
    assert 2 * (label_zyx[0] & truth).sum() / (label_zyx.sum() + truth.sum()) > 0.8
    confidence_zyx, _ = read_map(out / "confidence" / f"p3{cohort.file_ending}")
    assert confidence_zyx.shape == (1, 64, 48)
    assert record["voxels"]["1"] == label_zyx.sum()
