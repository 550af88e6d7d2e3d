"""Orientation: headers bring files to one order of axes, exactly; a cohort stored in many gets the labels of one."""

from __future__ import annotations

import dataclasses
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.cohort.convert import ConvertOptions, convert
from nnunet_sam2.folders import new_dataset_folders
from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry, choose_slice_axis
from nnunet_sam2.labelling.components import single_component_classes
from nnunet_sam2.labelling.explain.cases import as_text, find_case
from nnunet_sam2.labelling.fusion import FusionOptions, fuse
from nnunet_sam2.labelling.labeller import label_cases
from nnunet_sam2.labelling.quality.folder import measure_folder, read_folder
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.labelling.strategies.transfer.strategy import Transfer, TransferOptions
from nnunet_sam2.orientation import Turn, axis_code, common_direction, orientation_note, turn_to
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.sam2.protocol import Sam2Backend
from nnunet_sam2.support.cases import Query, Support
from nnunet_sam2.support.library import load_query, load_support
from nnunet_sam2.support.showing import cohort_slice_axis, told_orientations
from nnunet_sam2.volumes import read_label, read_map, read_stored, read_volume, write_image, write_label

TURNS = [
    Turn(axes=axes, flips=flips)  # type: ignore[arg-type]  # three of each
    for axes in permutations(range(3))
    for flips in product((False, True), repeat=3)
]


def _rotation(axis: int, degrees: float) -> np.ndarray:
    """Return a turn around x, y or z as a matrix."""
    angle, matrix = np.deg2rad(degrees), np.eye(3)
    i, j = [k for k in range(3) if k != axis]
    matrix[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return matrix


def _grid(matrix: np.ndarray, **more: Any) -> Geometry:
    return Geometry(
        **{"shape_zyx": (3, 4, 5), "spacing_xyz_mm": (1.0, 2.0, 5.0), "origin_xyz_mm": (7.0, -8.0, 9.0), **more},
        direction=tuple(float(v) for v in matrix.ravel()),
    )


def _place(geometry: Geometry, index_zyx: tuple[int, int, int]) -> np.ndarray:
    step_xyz = np.multiply(index_zyx[::-1], geometry.spacing_xyz_mm)
    return np.asarray(geometry.origin_xyz_mm) + np.reshape(geometry.direction, (3, 3)) @ step_xyz


@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_a_turn_keeps_every_voxel_in_its_place_and_is_undone_exactly(turn: Turn) -> None:
    geometry = _grid(_rotation(2, 20) @ _rotation(0, 10))
    array_czyx = np.arange(2 * 60).reshape(2, 3, 4, 5)
    turned_czyx, turned = turn.apply(array_czyx), turn.geometry(geometry)
    assert turned.shape_zyx == turned_czyx.shape[1:]
    assert np.array_equal(turn.undo(turned_czyx), array_czyx)
    for index_zyx in np.ndindex(3, 4, 5):
        there = np.argwhere(turned_czyx[0] == array_czyx[0][index_zyx])[0]
        assert _place(turned, tuple(there)) == pytest.approx(_place(geometry, index_zyx), abs=1e-9)
    # However it is stored, it comes back to the one order.
    assert turn_to(turned).geometry(turned).mismatch(geometry) is None
    assert np.array_equal(turn_to(turned).apply(turned_czyx), array_czyx)


def test_the_usual_order_of_arrays_is_not_changed_at_all() -> None:
    for matrix in (np.eye(3), _rotation(0, 30), _rotation(2, -25) @ _rotation(1, 15)):
        assert not turn_to(_grid(matrix)).changes
    array = np.zeros((2, 3, 4))
    assert Turn().apply(array) is array
    assert turn_to(Geometry(shape_zyx=(1, 30, 40))) == Turn()


def test_orientations_are_named_as_viewers_name_them() -> None:
    assert axis_code(np.eye(3).ravel()) == "LPS"
    assert axis_code(np.diag([-1.0, -1.0, 1.0]).ravel()) == "RAS"
    # The file's x runs to the back, its y downwards, its z to the right.
    assert axis_code(np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]).ravel()) == "PIR"


def test_planes_that_are_oblique_in_every_patient_show_the_same_plane() -> None:
    # Short axes on both sides of 45 degrees: next to the patient's own axes some would be cut across.
    oblique = [_grid(_rotation(0, degrees)) for degrees in (33, 41, 44, 47, 52, 58)]
    assert len({turn_to(geometry) for geometry in oblique}) == 2
    direction = common_direction(oblique)
    assert len({turn_to(geometry, direction) for geometry in oblique}) == 1
    # How they are stored has no part in it.
    stored = [turn.geometry(geometry) for turn, geometry in zip(TURNS[5:], oblique, strict=False)]
    assert common_direction(stored) == pytest.approx(direction, abs=1e-6)
    back = [turn_to(geometry, direction).geometry(geometry) for geometry in oblique]
    again = [turn_to(geometry, direction).geometry(geometry) for geometry in stored]
    assert all(a.mismatch(b) is None for a, b in zip(back, again, strict=True))
    assert orientation_note({str(n): geometry for n, geometry in enumerate(oblique)}, direction) is None


def test_a_single_slice_is_shown_whole_however_it_is_stored() -> None:
    assert choose_slice_axis(Geometry(shape_zyx=(30, 40, 1))) == 2
    assert choose_slice_axis(Geometry(shape_zyx=(30, 1, 40), spacing_xyz_mm=(9.0, 1.0, 1.0))) == 1


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=64, threads=1)


STORED = (
    Turn(axes=(0, 1, 2), flips=(False, True, True)),  # RAS
    Turn(axes=(2, 0, 1), flips=(True, False, True)),
    Turn(axes=(1, 2, 0), flips=(False, True, False)),
)
"""How half of the cases are stored: the slice axis comes second, and last, as well."""


def _write(source: Path, generated: Path, turn_of: dict[str, Turn]) -> None:
    """Write the generated cohort with some cases stored otherwise, their headers saying so, all tilted a little."""
    tilted = tuple(float(v) for v in (_rotation(2, 12) @ _rotation(0, 8)).ravel())
    for path in sorted(generated.rglob("*.nii.gz")):
        if "test" in path.relative_to(generated).parts or "Hidden" in str(path):
            continue
        array_czyx, geometry = read_stored(path)
        turn = turn_of.get(path.name.split(".")[0], Turn())
        stored = turn.geometry(dataclasses.replace(geometry, direction=tilted))
        target = source / path.relative_to(generated)
        if "labels" in target.parts:
            write_label(target, turn.apply(array_czyx[0]), stored)
        else:
            write_image(target, turn.apply(array_czyx), stored)


@pytest.fixture(scope="module")
def two_cohorts(
    generated_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Cohort, Cohort, dict[str, Turn]]:
    """The generated cohort in one orientation and with half of it in others, and how each of these is stored."""
    root = tmp_path_factory.mktemp("oriented")
    names = sorted(path.name.split(".")[0] for path in (generated_folder / "images").iterdir())
    turn_of = dict(zip(names[::2], STORED, strict=False))
    cohorts = []
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(variable, str(root / variable))
            (root / variable).mkdir()
        for number, turns in ((520, {}), (521, turn_of)):
            _write(root / f"source{number}", generated_folder, turns)
            convert(root / f"source{number}", folders := new_dataset_folders(number, "Oriented"), ConvertOptions())
            cohorts.append(Cohort.load(folders.raw))
    return cohorts[0], cohorts[1], turn_of


def _label(
    cohort: Cohort, backend: Sam2Backend, strategy: str, out: Path, case_ids: list[str] | None = None
) -> list[dict[str, Any]]:
    options = {"check_slices": "2"} if strategy == "transfer" else {"check_slices": "2", "views": "one"}
    return label_cases(
        cohort=cohort,
        case_ids=case_ids or [cohort.labelled[0].case_id, *(case.case_id for case in cohort.unlabelled)],
        support_ids=[case.case_id for case in cohort.labelled],
        strategy=make_strategy(strategy, options),
        backend=backend,
        out=out,
        seed=0,
        save_probabilities=True,
    )


@pytest.mark.parametrize("strategy", ["transfer", "auto"])
def test_half_a_cohort_stored_otherwise_gets_the_same_labels(
    two_cohorts: tuple[Cohort, Cohort, dict[str, Turn]], backend: MetaSam2Backend, tmp_path: Path, strategy: str
) -> None:
    plain, mixed, turn_of = two_cohorts
    assert {case.role for case in mixed.cases if case.case_id in turn_of} == {
        mixed.labelled[0].role,
        mixed.unlabelled[0].role,
    }
    records = [_label(cohort, backend, strategy, tmp_path / cohort.root.name) for cohort in (plain, mixed)]
    for one, other in zip(*records, strict=True):
        name, case = one["case"], mixed.case(one["case"])
        turn = turn_of.get(name, Turn())
        files = [f"{name}{plain.file_ending}", f"confidence/{name}{plain.file_ending}"]
        mine, theirs = tmp_path / plain.root.name, tmp_path / mixed.root.name
        label_zyx, (stored_zyx, geometry) = read_label(mine / files[0])[0], read_label(theirs / files[0])
        assert geometry.mismatch(case.geometry) is None
        assert np.unique(label_zyx).size > 1
        assert np.array_equal(turn.apply(label_zyx), stored_zyx)
        assert np.array_equal(turn.apply(read_map(mine / files[1])[0]), read_map(theirs / files[1])[0])
        prob_czyx = [np.load(folder / "probabilities" / f"{name}.npz")["prob_czyx"] for folder in (mine, theirs)]
        assert np.array_equal(turn.apply(prob_czyx[0]), prob_czyx[1])
        assert one["dice_with_human_label"] == other["dice_with_human_label"]
        assert one["members"] == other["members"]
        assert (other["shown"]["turned"] is not None) == turn.changes
        said = as_text(find_case(mixed, name, theirs, dataset="521"), mixed)
        assert ("  turned: the axes z, y, x of slices and places below are " in said) == turn.changes
    if strategy == "transfer":
        _assert_judged_alike(plain, mixed, [record["case"] for record in records[0]], backend, tmp_path)


def _assert_judged_alike(
    plain: Cohort, mixed: Cohort, case_ids: list[str], backend: MetaSam2Backend, labels: Path
) -> None:
    """Judge labels that lie in files, as a student's do, in both cohorts."""
    features = []
    for cohort in (plain, mixed):
        out = labels / f"judged {cohort.root.name}"
        supports = [case.case_id for case in cohort.labelled]
        folder = labels / cohort.root.name
        measure_folder(cohort, case_ids, support_ids=supports, backend=backend, labels=folder, out=out)
        features.append(read_folder(out, case_ids))
    assert features[0] == features[1]


def test_labels_of_a_cohort_in_the_usual_order_are_those_of_the_arrays_as_they_are(
    cohort: Cohort, backend: MetaSam2Backend, tmp_path: Path
) -> None:
    case, values = cohort.unlabelled[0], cohort.class_values
    (record,) = _label(cohort, backend, "transfer", tmp_path, case_ids=[case.case_id])
    assert record["shown"]["turned"] is None

    def parts(one: Case) -> dict[str, Any]:
        volume = read_volume(cohort.image_paths(one))
        frames = Frames.from_volume(volume, size=64, slice_axis=0)
        shown = {"frames": frames, "embeddings": backend.embed(frames), "geometry": volume.geometry}
        return {"case_id": one.case_id, **shown}

    supports = [Support(**parts(one), label_zyx=read_label(cohort.label_path(one))[0]) for one in cohort.labelled]
    strategy = Transfer(TransferOptions(check_slices=2))
    strategy.prepare(supports, values, backend)
    members = strategy.members(Query(**parts(case)), supports, values, backend, np.random.default_rng(0))
    single = single_component_classes([support.label_zyx for support in supports], values)
    label_zyx = fuse(members, values, FusionOptions(single_component_classes=single)).label_zyx
    assert np.array_equal(read_label(tmp_path / f"{case.case_id}{cohort.file_ending}")[0], label_zyx)


def test_convert_and_label_tell_of_several_orientations(
    generated_folder: Path, fresh_roots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(path.name.split(".")[0] for path in (generated_folder / "images").iterdir())
    _write(fresh_roots / "source", generated_folder, {names[-1]: STORED[0]})
    assert main(["convert", str(fresh_roots / "source"), "-d", "522", "-n", "Mixed"]) == 0
    told = f"note: the images are stored in several orientations (LPS {len(names) - 1}; RAS 1: {names[-1]})"
    assert capsys.readouterr().out.count(told) == 1
    model = ["--sam2", "untrained", "--image-size", "64", "--device", "cpu", "--threads", "1", "--quality", "off"]
    assert main(["label", "-d", "522", *model, "--strategy", "transfer", "--set", "decoder=off"]) == 0
    assert capsys.readouterr().out.count(told) == 1


def test_students_probabilities_and_labels_are_turned_with_their_image(
    two_cohorts: tuple[Cohort, Cohort, dict[str, Turn]], backend: MetaSam2Backend, tmp_path: Path
) -> None:
    plain, mixed, turn_of = two_cohorts
    name = next(case.case_id for case in mixed.labelled if case.case_id in turn_of)
    prob_czyx = np.random.default_rng(0).integers(0, 255, (3, *plain.case(name).geometry.shape_zyx)).astype(np.uint8)
    for folder, array in (("plain", prob_czyx), ("mixed", turn_of[name].apply(prob_czyx))):
        (tmp_path / folder).mkdir()
        np.savez_compressed(tmp_path / folder / f"{name}.npz", prob_czyx=array)
    one, other = (
        load_support(cohort, cohort.case(name), backend, slice_axis=0, student_probabilities=tmp_path / folder)
        for cohort, folder in ((plain, "plain"), (mixed, "mixed"))
    )
    assert one.student_prob_czyx is not None
    assert other.student_prob_czyx is not None
    assert np.array_equal(one.student_prob_czyx, other.student_prob_czyx)
    assert np.array_equal(one.label_zyx, other.label_zyx)
    assert one.frames.key == other.frames.key
    assert one.geometry.mismatch(other.geometry) is None


def test_the_slice_axis_counts_in_the_shown_order(two_cohorts: tuple[Cohort, Cohort, dict[str, Turn]]) -> None:
    plain, _, turn_of = two_cohorts

    def coronal(case: Any, turn: Turn) -> Any:
        straight = Geometry(shape_zyx=(30, 6, 30), spacing_xyz_mm=(1.0, 6.0, 1.0))
        return dataclasses.replace(case, geometry=turn.geometry(straight))

    cases = tuple(coronal(case, turn_of.get(case.case_id, Turn())) for case in plain.cases)
    assert {choose_slice_axis(case.geometry) for case in cases} > {1}
    assert cohort_slice_axis(dataclasses.replace(plain, cases=cases)) == 1


def test_several_orientations_are_told_in_one_line_with_their_counts(
    two_cohorts: tuple[Cohort, Cohort, dict[str, Turn]],
) -> None:
    plain, mixed, turn_of = two_cohorts
    assert told_orientations(plain) is None
    told = told_orientations(mixed)
    assert told is not None
    assert f"LPS {len(mixed.cases) - len(turn_of)}, " in told
    assert "RAS 1" in told


def test_frames_of_the_usual_order_are_those_of_the_file(
    two_cohorts: tuple[Cohort, Cohort, dict[str, Turn]], backend: MetaSam2Backend
) -> None:
    cohort = two_cohorts[0]
    case = cohort.unlabelled[0]
    frames = Frames.from_volume(read_volume(cohort.image_paths(case)), size=64, slice_axis=0)
    assert load_query(cohort, case, backend, slice_axis=0).frames.key == frames.key
