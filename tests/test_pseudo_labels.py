"""A round's labels: fused from SAM 2 and student, compared with the last round's, empty ones left out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_sources import depth
from scipy.ndimage import binary_dilation, binary_erosion
from scipy.special import expit

from nnunet_sam2.cohort.cohort import Addition, Cohort
from nnunet_sam2.labelling.leave_one_out import DiceTable
from nnunet_sam2.labelling.quality.calibration import Calibration
from nnunet_sam2.labelling.quality.features import Features
from nnunet_sam2.labelling.quality.trust import Verdict, fused_estimate, spread_quality, trusted_confidence
from nnunet_sam2.rounds.decisions.holds import CaseHold
from nnunet_sam2.rounds.decisions.record import accepted_path
from nnunet_sam2.rounds.pseudo_labels import Fused, fuse_cases
from nnunet_sam2.rounds.sources import SAM2, STUDENT, Sources, mean_dice_by_class
from nnunet_sam2.storage import file_hash, read_json
from nnunet_sam2.support.library import read_probabilities, write_probabilities
from nnunet_sam2.volumes import read_label, read_map, write_label


def _source(cohort: Cohort, folder: Path, labels: dict[str, np.ndarray], *, sure: float) -> Path:
    """Write label maps, and probabilities that give each label ``sure`` and share the rest."""
    for case_id, label_zyx in labels.items():
        case = cohort.case(case_id)
        write_label(folder / f"{case_id}{cohort.file_ending}", label_zyx, case.geometry)
        one_hot = np.stack([label_zyx == v for v in (0, *cohort.class_values)]).astype(np.float32)
        rest = (1 - sure) / len(cohort.class_values)
        write_probabilities(folder / "probabilities" / f"{case_id}.npz", one_hot * (sure - rest) + rest)
    return folder


def _boxes(cohort: Cohort, offset: int) -> dict[str, np.ndarray]:
    labels = {}
    for case in cohort.unlabelled:
        label = np.zeros(case.geometry.shape_zyx, np.uint8)
        label[2:8, 5 + offset : 15 + offset, 5:15] = 1
        label[2:8, 22 + offset : 30 + offset, 22:30] = 2
        labels[case.case_id] = label
    return labels


def _fuse(
    cohort: Cohort,
    sam2: Path,
    student: Path | None,
    out: Path,
    *,
    quality: dict[str, dict[int, float]] | None = None,
    by_case: dict[str, dict[str, DiceTable]] | None = None,
    previous: Path | None = None,
    **more: Any,
) -> Fused:
    folders = {SAM2: sam2} | ({STUDENT: student} if student else {})
    sources = Sources(
        probabilities={name: folder / "probabilities" for name, folder in folders.items()},
        quality={name: (quality or {}).get(name, {1: 0.8, 2: 0.8}) for name in folders},
        by_case=by_case or {},
        temperatures=dict.fromkeys(folders, 1.0),
    )
    return fuse_cases(cohort, sources, out=out, previous=previous, **more)


def test_without_a_student_the_labels_are_sam2s(cohort: Cohort, tmp_path: Path) -> None:
    labels = _boxes(cohort, 0)
    sam2 = _source(cohort, tmp_path / "sam2", labels, sure=0.9)
    fused = _fuse(cohort, sam2, None, tmp_path / "out")
    assert fused.used_cases == tuple(labels)
    assert fused.change is None
    for case_id, label in labels.items():
        written, geometry = read_label(tmp_path / "out" / f"{case_id}.nii.gz")
        np.testing.assert_array_equal(written, label)
        assert cohort.case(case_id).geometry.mismatch(geometry) is None
        confidence, _ = read_map(tmp_path / "out" / "confidence" / f"{case_id}.nii.gz")
        assert confidence.min() > 0
        assert confidence.max() < 1


def test_where_the_sources_differ_the_better_one_wins_and_the_voxel_is_less_trusted(
    cohort: Cohort, tmp_path: Path
) -> None:
    here, there = _boxes(cohort, 0), _boxes(cohort, 3)
    sam2 = _source(cohort, tmp_path / "sam2", here, sure=0.9)
    student = _source(cohort, tmp_path / "student", there, sure=0.9)
    fused = _fuse(
        cohort,
        sam2,
        student,
        tmp_path / "out",
        quality={SAM2: {1: 0.85, 2: 0.7}, STUDENT: {1: 0.7, 2: 0.85}},
    )
    case_id = cohort.unlabelled[0].case_id
    written, _ = read_label(tmp_path / "out" / f"{case_id}.nii.gz")
    np.testing.assert_array_equal(written == 1, here[case_id] == 1)
    np.testing.assert_array_equal(written == 2, there[case_id] == 2)
    confidence, _ = read_map(tmp_path / "out" / "confidence" / f"{case_id}.nii.gz")
    disputed = here[case_id] != there[case_id]
    assert confidence[disputed].mean() < confidence[~disputed].mean() - 0.1
    assert fused.quality["student"][2] > fused.quality["sam2"][2]


def test_change_is_measured_against_the_labels_of_the_round_before(cohort: Cohort, tmp_path: Path) -> None:
    before = _source(cohort, tmp_path / "before", _boxes(cohort, 0), sure=0.9)
    moved = _source(cohort, tmp_path / "moved", _boxes(cohort, 2), sure=0.9)
    same = _fuse(cohort, before, None, tmp_path / "same", previous=before)
    other = _fuse(cohort, moved, None, tmp_path / "other", previous=before)
    assert same.change is not None
    assert same.change.mean == 0
    assert other.change is not None
    assert other.change.by_case[cohort.unlabelled[0].case_id] == pytest.approx({1: 0.2, 2: 0.25})


def test_an_empty_label_is_written_but_left_out_of_the_round_with_the_reason(cohort: Cohort, tmp_path: Path) -> None:
    labels = _boxes(cohort, 0)
    empty = cohort.unlabelled[0].case_id
    labels[empty] = np.zeros_like(labels[empty])
    fused = _fuse(cohort, _source(cohort, tmp_path / "sam2", labels, sure=0.9), None, tmp_path / "out")
    assert empty not in fused.used_cases
    assert "empty" in fused.left_out[empty]
    assert (tmp_path / "out" / f"{empty}.nii.gz").is_file()


def _confidence(cohort: Cohort, out: Path, case_id: str) -> np.ndarray:
    return read_map(out / "confidence" / f"{case_id}{cohort.file_ending}")[0]


def test_a_class_below_the_least_quality_is_not_learnt_from_and_is_no_background_either(
    cohort: Cohort, tmp_path: Path
) -> None:
    labels = _boxes(cohort, 0)
    sam2 = _source(cohort, tmp_path / "sam2", labels, sure=0.9)
    weak, fine = (case.case_id for case in cohort.unlabelled)
    estimates = {weak: {1: 0.2, 2: 0.8}, fine: {1: 0.8, 2: 0.8}}
    out = tmp_path / "out"
    fused = _fuse(cohort, sam2, None, out, by_case={SAM2: estimates}, least_quality=0.3)
    assert fused.used_cases == (weak, fine)
    assert fused.distrusted == {weak: (1,)}
    assert fused.estimates == estimates
    confidence = _confidence(cohort, out, weak)
    np.testing.assert_array_equal(confidence[labels[weak] == 1], 0)
    assert confidence[labels[weak] == 2].min() > 0.2
    assert confidence[labels[weak] == 0].min() > 0
    # The label itself is written as it was drawn.
    np.testing.assert_array_equal(read_label(out / f"{weak}{cohort.file_ending}")[0], labels[weak])
    assert _confidence(cohort, out, fine)[labels[fine] == 1].min() > 0.2


def test_where_a_distrusted_class_may_also_be_nothing_is_learnt(cohort: Cohort, tmp_path: Path) -> None:
    sam2 = _source(cohort, tmp_path / "sam2", _boxes(cohort, 0), sure=0.75)
    name = cohort.unlabelled[0].case_id
    fused = _fuse(cohort, sam2, None, tmp_path / "out", by_case={SAM2: {name: {1: 0.1, 2: 0.9}}}, least_quality=0.3)
    assert fused.distrusted == {name: (1,)}
    # Every voxel has class 1 with an eighth at least.
    assert _confidence(cohort, tmp_path / "out", name).max() == 0


def test_a_case_without_a_class_worth_learning_is_left_out_with_the_reason(cohort: Cohort, tmp_path: Path) -> None:
    sam2 = _source(cohort, tmp_path / "sam2", _boxes(cohort, 0), sure=0.9)
    bad, other = (case.case_id for case in cohort.unlabelled)
    estimates = {bad: {1: 0.2, 2: 0.1}, other: {1: 0.4, 2: None}}
    fused = _fuse(cohort, sam2, None, tmp_path / "out", by_case={SAM2: estimates}, least_quality=0.3)
    assert fused.used_cases == (other,)
    assert "below 0.3" in fused.left_out[bad]
    assert "class 1: 0.20, class 2: 0.10" in fused.left_out[bad]
    assert Fused.from_json(tmp_path / "out", fused.to_json(), digest="") == fused
    everything = _fuse(cohort, sam2, None, tmp_path / "all", by_case={SAM2: estimates})
    assert everything.used_cases == (bad, other)


def test_of_a_case_that_comes_back_by_an_accepted_class_the_others_are_still_named_as_not_learnt(
    cohort: Cohort, tmp_path: Path
) -> None:
    sam2 = _source(cohort, tmp_path / "sam2", _boxes(cohort, 0), sure=0.9)
    bad, other = cohort.unlabelled
    seen = file_hash(sam2 / f"{bad.case_id}.nii.gz")
    kept = accepted_path(tmp_path, bad.case_id, seen, ".nii.gz")
    kept.parent.mkdir(parents=True)
    shutil.copy(sam2 / f"{bad.case_id}.nii.gz", kept)
    fused = _fuse(
        cohort,
        sam2,
        None,
        tmp_path / "out",
        by_case={SAM2: {bad.case_id: {1: 0.2, 2: 0.1}}},
        least_quality=0.3,
        holds={bad.case_id: CaseHold(accepted={1: seen})},
        run=tmp_path,
    )
    assert fused.used_cases == (bad.case_id, other.case_id)
    assert fused.left_out == {}
    assert fused.distrusted == {bad.case_id: (2,)}


def test_the_record_says_which_classes_people_drew_and_which_they_accepted(cohort: Cohort, tmp_path: Path) -> None:
    sam2 = _source(cohort, tmp_path / "sam2", _boxes(cohort, 0), sure=0.9)
    first, second = (case.case_id for case in cohort.unlabelled)
    seen = {name: file_hash(sam2 / f"{name}.nii.gz") for name in (first, second)}
    for name, label in seen.items():
        kept = accepted_path(tmp_path, name, label, ".nii.gz")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sam2 / f"{name}.nii.gz", kept)
    # A path that is not relative stands for itself.
    whole = Addition(label=str(sam2 / f"{first}.nii.gz"), sha256=seen[first], time="", source="")
    part = Addition(label=str(sam2 / f"{second}.nii.gz"), sha256=seen[second], time="", source="", classes=(2,))
    holds = {
        first: CaseHold(taken_out=True, human=whole),
        second: CaseHold(accepted={1: seen[second]}, human=part),
    }
    fused = _fuse(cohort, sam2, None, tmp_path / "out", holds=holds, run=tmp_path)
    assert fused.drawn == {first: (1, 2), second: (2,)}
    assert fused.accepted == {second: (1,)}
    assert Fused.from_json(tmp_path / "out", read_json(tmp_path / "out" / "round.json"), digest="") == fused
    older = {key: value for key, value in fused.to_json().items() if key not in ("drawn", "accepted")}
    assert Fused.from_json(tmp_path / "out", older, digest="").drawn == {}


def test_confidence_keeps_both_sides_of_a_border_and_the_inside_however_low_the_estimate(
    cohort: Cohort, tmp_path: Path
) -> None:
    labels = _boxes(cohort, 0)
    sam2 = _source(cohort, tmp_path / "sam2", labels, sure=1.0)
    name = cohort.unlabelled[0].case_id
    organs = [expit(1.7 * depth(labels[name] == value)) for value in (1, 2)]
    write_probabilities(sam2 / "probabilities" / f"{name}.npz", np.stack([1 - np.sum(organs, axis=0), *organs]))
    means = []
    for dice in (0.9, 0.6):
        _fuse(cohort, sam2, None, tmp_path / str(dice), by_case={SAM2: {name: {1: dice, 2: dice}}})
        confidence = _confidence(cohort, tmp_path / str(dice), name)
        label = read_label(tmp_path / str(dice) / f"{name}.nii.gz")[0]
        inside, outside = label > 0, label == 0
        rim = binary_dilation(inside) & outside, binary_dilation(outside) & inside
        assert confidence[rim[0]].mean() == pytest.approx(confidence[rim[1]].mean(), abs=0.1)
        deep = binary_erosion(inside, iterations=2)
        assert confidence[deep].mean() > max(0.65, confidence[rim[1]].mean() + 0.2)
        assert confidence[outside & ~binary_dilation(inside, iterations=6)].min() > 0.98
        means.append(confidence[inside].mean())
    assert means[0] > means[1] + 0.05


def test_each_case_is_fused_by_its_own_estimates(cohort: Cohort, tmp_path: Path) -> None:
    here, there = _boxes(cohort, 0), _boxes(cohort, 3)
    sam2 = _source(cohort, tmp_path / "sam2", here, sure=0.9)
    student = _source(cohort, tmp_path / "student", there, sure=0.9)
    good, failed = (case.case_id for case in cohort.unlabelled)
    by_case: dict[str, dict[str, DiceTable]] = {
        SAM2: {good: {1: 0.9, 2: 0.9}, failed: {1: 0.1, 2: 0.1}},
        STUDENT: {good: {1: 0.6, 2: 0.6}, failed: {1: 0.8, 2: 0.8}},
    }
    _fuse(cohort, sam2, student, tmp_path / "out", by_case=by_case)
    for name, expected in ((good, here), (failed, there)):
        written, _ = read_label(tmp_path / "out" / f"{name}{cohort.file_ending}")
        np.testing.assert_array_equal(written, expected[name])


def test_a_students_level_is_spread_over_its_cases_and_a_missed_class_stands_at_nothing() -> None:
    def seen(level: float) -> dict[int, Features]:
        return {
            1: Features(voxels=9, shown_in=1.0, reverse={"a": level}, inside=level),
            2: Features(voxels=0, shown_in=1.0),
            3: Features(voxels=0, shown_in=0.5),
        }

    cases = {"worst": seen(0.3), "middle": seen(0.6), "best": seen(0.8)}
    table = spread_quality({1: 0.7, 2: 0.7, 3: 0.7}, cases, Calibration(class_values=(1, 2, 3)))
    assert table["middle"] == {1: pytest.approx(0.7), 2: 0.0, 3: None}
    assert (table["worst"][1] or 0) < 0.5 < 0.8 < (table["best"][1] or 0)


def test_the_record_survives_the_way_through_json(cohort: Cohort, tmp_path: Path) -> None:
    sam2 = _source(cohort, tmp_path / "sam2", _boxes(cohort, 0), sure=0.9)
    fused = _fuse(cohort, sam2, None, tmp_path / "out", previous=sam2)
    assert Fused.from_json(tmp_path / "out", fused.to_json(), digest="") == fused


def test_the_same_sources_give_the_same_bytes(cohort: Cohort, tmp_path: Path) -> None:
    sam2 = _source(cohort, tmp_path / "sam2", _boxes(cohort, 0), sure=0.9)
    student = _source(cohort, tmp_path / "student", _boxes(cohort, 2), sure=0.7)
    for out in ("a", "b"):
        _fuse(cohort, sam2, student, tmp_path / out)
    for path in (tmp_path / "a").rglob("*.nii.gz"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_ignored_voxels_count_nowhere(cohort: Cohort, tmp_path: Path) -> None:
    labels = _boxes(cohort, 0)
    predicted = _source(cohort, tmp_path / "predicted", labels, sure=0.9)
    case = cohort.unlabelled[0]
    reference = labels[case.case_id].copy()
    reference[5:] = 3
    write_label(tmp_path / "truth" / f"{case.case_id}.nii.gz", reference, case.geometry)
    with_ignore = Cohort(**{**vars(cohort), "labels": {**cohort.labels, "ignore": 3}})
    assert mean_dice_by_class(with_ignore, [case], predicted, reference=tmp_path / "truth") == {1: 1.0, 2: 1.0}


def test_a_low_estimate_acts_on_what_is_in_doubt_alike_on_both_sides_and_not_on_what_is_certain() -> None:
    # From the organ's middle to far away, along one line; the last voxels are most of the image.
    organ_x = np.array([1.0] * 6 + [0.9, 0.7, 0.3, 0.1] + [0.0] * 60, np.float32)
    prob_czyx = np.stack([1 - organ_x, organ_x])[:, None, None]
    label_zyx = (organ_x > 0.5).astype(np.uint8)[None, None]

    def trusted(dice: float) -> np.ndarray:
        verdict = Verdict(estimate={1: dice}, failed=(), reason=None)
        return trusted_confidence(label_zyx, prob_czyx, (1,), verdict)[0, 0]

    fine, poor = trusted(0.95), trusted(0.7)
    for x, mirrored in ((6, 9), (7, 8)):
        assert poor[x] == pytest.approx(poor[mirrored], abs=1e-3)
        assert poor[x] < fine[x] - 0.1
    assert poor[0] > 0.6
    assert poor[10:].min() > 0.98


def test_a_fused_label_is_expected_to_be_better_than_sources_that_err_apart_and_not_than_one_twice() -> None:
    sources: dict[str, DiceTable] = {"a": {1: 0.8}, "b": {1: 0.8}}
    weights = {"a": {1: 0.5}, "b": {1: 0.5}}
    # Errors of 0.2 each that have nothing in common differ by 0.2 times the root of two.
    apart = fused_estimate(sources, weights, {1: 1 - 0.2 * 2**0.5}, {1: 9})
    assert apart[1] == pytest.approx(1 - 0.2 / 2**0.5)
    assert fused_estimate(sources, weights, {1: 1.0}, {1: 9}) == {1: pytest.approx(0.8)}
    assert fused_estimate({"a": {1: 0.0}, "b": {1: None}}, weights, {1: None}, {1: 0}) == {1: 0.0}


def test_probabilities_are_kept_where_asked_and_say_what_people_say(cohort: Cohort, tmp_path: Path) -> None:
    labels = _boxes(cohort, 0)
    sam2 = _source(cohort, tmp_path / "sam2", labels, sure=0.8)
    first, second = (case.case_id for case in cohort.unlabelled)
    moved = _boxes(cohort, 4)[second]
    drawn = tmp_path / "drawn.nii.gz"
    write_label(drawn, moved, cohort.case(second).geometry)
    human = Addition(label=str(drawn), sha256=file_hash(drawn), time="", source="", classes=(1,))
    out = tmp_path / "out"
    plain = _fuse(cohort, sam2, None, tmp_path / "plain")
    fused = _fuse(cohort, sam2, None, out, holds={second: CaseHold(human=human)}, run=tmp_path, keep_probabilities=True)
    assert not (tmp_path / "plain" / "probabilities").exists()
    assert len(fused.files(".nii.gz")) == len(plain.files(".nii.gz")) + 2
    machine = read_probabilities(out / "probabilities" / f"{first}.npz") / 255
    np.testing.assert_array_equal(machine.argmax(axis=0), labels[first])
    assert machine.max() == pytest.approx(0.8, abs=0.01)
    settled = read_probabilities(out / "probabilities" / f"{second}.npz")
    written, _ = read_label(out / f"{second}.nii.gz")
    np.testing.assert_array_equal(written == 1, moved == 1)
    np.testing.assert_array_equal(settled[1] == 255, moved == 1)
    np.testing.assert_array_equal(settled.argmax(axis=0), written)
