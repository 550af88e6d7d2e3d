"""Quality on real embeddings: wrong labels are told from right ones, and records carry what was found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_sam2.cli.main import main
from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.frames import Frames
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.labelling.labeller import label_cases
from nnunet_sam2.labelling.member import PseudoLabel
from nnunet_sam2.labelling.quality.cells import LabelledCells, relabel
from nnunet_sam2.labelling.quality.features import CaseFeatures
from nnunet_sam2.labelling.quality.folder import measure_folder, read_folder
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.quality.probe import QualityProbe
from nnunet_sam2.labelling.quality.record import calibration_of, read_features
from nnunet_sam2.labelling.records import CALIBRATION
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.storage import file_hash
from nnunet_sam2.support.cases import Support
from nnunet_sam2.support.library import load_support


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=128, threads=1)


@pytest.fixture(scope="module")
def supports(cohort: Cohort, backend: MetaSam2Backend) -> list[Support]:
    return [load_support(cohort, case, backend, slice_axis=0) for case in cohort.labelled]


def _pseudo(label_zyx: np.ndarray, values: Sequence[int], *, sure: float = 0.9) -> PseudoLabel:
    one_hot = np.stack([label_zyx == v for v in (0, *values)]).astype(np.float32)
    rest = (1 - sure) / len(values)
    return PseudoLabel(
        label_zyx=label_zyx,
        confidence_zyx=np.ones(label_zyx.shape, np.float32),
        prob_czyx=one_hot * (sure - rest) + rest,
    )


def _measured(supports: list[Support], label_zyx: np.ndarray, values: tuple[int, ...]) -> CaseFeatures:
    return QualityProbe(values).measure(supports[0].as_query(), _pseudo(label_zyx, values), supports[1:])


def test_a_right_label_labels_other_cases_better_than_a_wrong_one(cohort: Cohort, supports: list[Support]) -> None:
    values, human_zyx = cohort.class_values, supports[0].label_zyx
    right, wrong = _measured(supports, human_zyx, values), _measured(supports, np.roll(human_zyx, 9, axis=2), values)
    for found in (right, wrong):
        assert set(found[values[0]].reverse) == {s.case_id for s in supports[1:]}
    for value in values:
        good, bad = right[value].columns, wrong[value].columns
        for name in ("reverse_best", "agreement"):
            assert (good[name] or 0) > (bad[name] or 0) + 0.1, (value, name)


def test_one_labelled_case_is_enough_to_look_and_none_leaves_the_confidence(
    cohort: Cohort, supports: list[Support]
) -> None:
    values, pseudo = cohort.class_values, _pseudo(supports[0].label_zyx, cohort.class_values)
    probe, query = QualityProbe(values), supports[0].as_query()
    one = probe.measure(query, pseudo, supports[1:2])[values[0]]
    assert list(one.reverse) == [supports[1].case_id]
    alone = probe.measure(query, pseudo, [])[values[0]]
    assert (alone.reverse, alone.agreement) == ({}, {})
    assert alone.inside == one.inside == pytest.approx(0.9)


def test_an_empty_label_costs_nothing_and_says_how_many_labelled_cases_show_the_class(
    cohort: Cohort, supports: list[Support], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = cohort.class_values
    without_zyx = np.where(supports[1].label_zyx == values[0], 0, supports[1].label_zyx)
    others = [dataclasses.replace(supports[1], label_zyx=without_zyx), supports[2]]
    probe = QualityProbe(values)
    monkeypatch.setattr(probe, "_compare", lambda *a: pytest.fail("an empty label was held against labelled cases"))
    empty = _pseudo(np.zeros_like(supports[0].label_zyx), values)
    found = probe.measure(supports[0].as_query(), empty, others)
    assert (found[values[0]].voxels, found[values[0]].shown_in) == (0, 0.5)
    assert found[values[1]].shown_in == 1.0


def test_the_most_similar_labelled_cases_are_looked_at(cohort: Cohort, supports: list[Support]) -> None:
    values = cohort.class_values
    twin = dataclasses.replace(supports[0], case_id="twin")
    probe = QualityProbe(values, QualityOptions(references=1))
    found = probe.measure(supports[0].as_query(), _pseudo(twin.label_zyx, values), [*supports[1:], twin])
    assert list(found[values[0]].reverse) == ["twin"]
    assert found[values[0]].reverse["twin"] > 0.6


def test_voxels_that_nobody_judged_count_nowhere(cohort: Cohort, supports: list[Support]) -> None:
    values, ignore = cohort.class_values, 9
    masked_zyx = supports[1].label_zyx.copy()
    masked_zyx[:, :, : masked_zyx.shape[2] // 2] = ignore
    partly = LabelledCells(dataclasses.replace(supports[1], label_zyx=masked_zyx, ignore_value=ignore), values)
    features_mf, labels_mc = partly.entries(range(len(partly.embeddings)))
    assert len(features_mf) == len(partly.embeddings) * partly.grid**2 // 2
    np.testing.assert_allclose(labels_mc.sum(dim=1), 1.0, atol=1e-5)
    nothing = dataclasses.replace(supports[1], label_zyx=np.full_like(masked_zyx, ignore), ignore_value=ignore)
    assert relabel(LabelledCells(nothing, values), partly, 5) is None


def test_single_pictures_are_measured_like_volumes(backend: MetaSam2Backend) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for number in range(3):
        label_zyx = np.zeros((1, 64, 80), np.uint8)
        y, x = rng.integers(10, 25, 2)
        label_zyx[0, y : y + 24, x : x + 30] = 1
        image = (label_zyx * 0.6 + rng.normal(0.2, 0.03, label_zyx.shape)).astype(np.float32)
        geometry = Geometry(shape_zyx=label_zyx.shape)
        frames = Frames(
            array_czyx=image[None], geometry=geometry, size=128, slice_axis=0, channels=(0, 0, 0), windows=[(0.0, 1.0)]
        )
        cases.append(
            Support(
                case_id=str(number),
                frames=frames,
                embeddings=backend.embed(frames),
                label_zyx=label_zyx,
                geometry=geometry,
            )
        )
    right, wrong = (_measured(cases, label, (1,))[1] for label in (cases[0].label_zyx, 1 - cases[0].label_zyx))
    assert min(right.reverse.values()) > 0.7
    assert min(right.reverse.values()) > max(wrong.reverse.values()) + 0.2


def _label(cohort: Cohort, backend: MetaSam2Backend, out: Path, **changes: Any) -> list[dict[str, Any]]:
    arguments: dict[str, Any] = {
        "case_ids": [cohort.unlabelled[0].case_id],
        "support_ids": [case.case_id for case in cohort.labelled],
        "strategy": make_strategy("transfer", {"decoder": "off", "check_slices": "0"}),
        "seed": 1,
        "quality": QualityOptions(),
        "calibrate_on": [case.case_id for case in cohort.labelled],
        **changes,
    }
    return label_cases(cohort=cohort, backend=backend, out=out, **arguments)


def _hashes(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_labelled_cases_calibrate_and_the_record_says_what_is_expected(
    cohort: Cohort, backend: MetaSam2Backend, tmp_path: Path
) -> None:
    (record,) = _label(cohort, backend, tmp_path)
    quality = record["quality"]
    labelled = sorted(case.case_id for case in cohort.labelled)
    assert quality["calibrated"] is True
    assert quality["calibration_cases"] == labelled
    large = cohort.class_values[0]
    entry = quality["classes"][str(large)]
    assert 0 <= entry["lower"] <= entry["dice"] <= 1
    # One of the three labelled cases may have been labelled without the class.
    assert entry["coverage"] in (0.6667, 0.75)
    assert set(quality["features"][str(large)]["reverse"]) == set(labelled)
    aside = tmp_path / CALIBRATION / "members"
    assert sorted(path.stem for path in aside.iterdir()) == labelled
    calibrating = json.loads((aside / f"{labelled[0]}.json").read_text())
    assert calibrating["quality"]["classes"] is None
    assert labelled[0] not in calibrating["quality"]["features"][str(cohort.class_values[0])]["reverse"]
    assert 0 <= calibrating["dice_with_human_label"][str(cohort.class_values[0])] <= 1


def test_estimates_survive_a_kill_and_another_calibration_labels_nothing_anew(
    cohort: Cohort, backend: MetaSam2Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _label(cohort, backend, tmp_path / "a")
    before = _hashes(tmp_path / "a")
    case_id = cohort.unlabelled[0].case_id
    (tmp_path / "a" / "members" / f"{case_id}.json").unlink()
    (tmp_path / "a" / CALIBRATION / "members" / f"{cohort.labelled[1].case_id}.json").unlink()
    _label(cohort, backend, tmp_path / "a")
    assert _hashes(tmp_path / "a") == before

    monkeypatch.setattr(backend, "embed", lambda frames: pytest.fail("a finished case was read again"))
    aside = [
        json.loads((tmp_path / "a" / CALIBRATION / "members" / f"{c.case_id}.json").read_text())
        for c in cohort.labelled
    ]
    fewer = calibration_of(aside[:2], cohort.class_values)
    (second,) = _label(cohort, backend, tmp_path / "a", calibrate_on=(), calibration=fewer)
    assert second["quality"]["features"] == first[0]["quality"]["features"]
    assert second["quality"]["classes"] != first[0]["quality"]["classes"]
    assert json.loads((tmp_path / "a" / "members" / f"{case_id}.json").read_text()) == second
    (third,) = _label(cohort, backend, tmp_path / "a", calibrate_on=())
    assert third["quality"]["calibrated"] is False


def test_a_folder_of_labels_is_measured_like_labels_that_are_being_made(
    cohort: Cohort, backend: MetaSam2Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = _label(cohort, backend, tmp_path / "labels", save_probabilities=True, calibrate_on=())
    arguments: dict[str, Any] = {
        "case_ids": [record["case"]],
        "support_ids": [case.case_id for case in cohort.labelled],
        "backend": backend,
        "labels": tmp_path / "labels",
        "out": tmp_path / "seen",
    }
    (path,) = measure_folder(cohort, **arguments)
    before = path.read_bytes()
    found, expected = read_folder(tmp_path / "seen", [record["case"]])[record["case"]], read_features(record)
    for value in cohort.class_values:
        assert found[value].reverse == expected[value].reverse
        assert found[value].typical == expected[value].typical
        assert set(found[value].typical) == ({"smoothness", "core"} if found[value].voxels else set())
        for name, share in expected[value].columns.items():
            # Probabilities lie in the folder in steps of 1/255; how the supports voted does not lie there.
            told = None if share is None or name == "supports" else pytest.approx(share, abs=0.02)
            assert found[value].columns[name] == told
    monkeypatch.setattr(backend, "embed", lambda frames: pytest.fail("a case was measured again"))
    measure_folder(cohort, **arguments)
    assert path.read_bytes() == before


def test_label_estimates_by_default_and_can_be_told_not_to(
    cohort: Cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case_id = cohort.unlabelled[0].case_id
    common = ["label", "-d", "501", "--sam2", "untrained", "--image-size", "64", "--device", "cpu", "--cases", case_id]
    common += ["--cache-dir", str(tmp_path / "cache"), "--set", "decoder=off", "--set", "check_slices=0"]
    assert main([*common, "-o", str(tmp_path / "default")]) == 0
    assert "calibrated on 3 labelled cases" in capsys.readouterr().out
    assert main([*common, "-o", str(tmp_path / "off"), "--quality", "off"]) == 0
    assert "estimated Dice" not in capsys.readouterr().out
    assert not (tmp_path / "off" / CALIBRATION).exists()
    name = f"{case_id}{cohort.file_ending}"
    assert file_hash(tmp_path / "off" / name) == file_hash(tmp_path / "default" / name)
    assert main(["label", "-d", "501", "-o", str(tmp_path / "default"), "--explain", case_id]) == 0
    explained = capsys.readouterr().out
    assert "estimated Dice" in explained
    assert "probability inside" in explained
