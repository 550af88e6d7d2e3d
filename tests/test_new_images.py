"""New images are cases of a finished run: what is known of its sources holds for them, one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_new_images import compared

from nnunet_sam2.cohort.cohort import Cohort, Role
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.quality.calibration import Calibration
from nnunet_sam2.labelling.quality.features import CaseFeatures, Features
from nnunet_sam2.labelling.quality.trust import spread_quality
from nnunet_sam2.rounds.ledger import LEDGER_FILE, Ledger, ReadLedger, StageResult
from nnunet_sam2.rounds.new_images import BothSources, carried_bound, new_cases, with_cases
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.state import read_state, run_folder


def test_a_new_image_takes_the_place_of_what_had_its_name_and_test_cases_are_not_looked_at(cohort: Cohort) -> None:
    test, unlabelled = cohort.test[0], cohort.unlabelled[0]
    images = {"elsewhere": cohort.image_paths(test), unlabelled.case_id: cohort.image_paths(unlabelled)}
    joined = with_cases(cohort, new_cases(cohort, images))
    assert joined.test == ()
    assert joined.labelled == cohort.labelled
    assert [case.case_id for case in joined.unlabelled] == [
        *(case.case_id for case in cohort.unlabelled[1:]),
        "elsewhere",
        unlabelled.case_id,
    ]
    assert joined.image_paths(joined.case("elsewhere")) == cohort.image_paths(test)
    assert joined.case("elsewhere").patient == "elsewhere"
    same = joined.case(unlabelled.case_id)
    known = (unlabelled.patient, unlabelled.voxel_hash, unlabelled.geometry)
    assert (same.patient, same.voxel_hash, same.geometry) == known
    assert same.role is Role.UNLABELLED


def test_an_image_with_the_name_of_a_support_is_refused(cohort: Cohort) -> None:
    support = cohort.labelled[0]
    with pytest.raises(InputError, match=r"is a labelled case .* rename the image"):
        new_cases(cohort, {support.case_id: cohort.image_paths(support)})


def test_the_bound_of_a_fused_label_lies_as_far_below_it_as_sam2s_does() -> None:
    assert carried_bound(0.8, 0.8, 0.6) == pytest.approx(0.6)
    higher = carried_bound(0.9, 0.8, 0.6)
    assert higher is not None
    assert 0.6 < higher < 0.9
    assert carried_bound(0.8, 0.8, 0.8) == pytest.approx(0.8)
    assert carried_bound(0.8, None, None) is None
    assert carried_bound(None, 0.8, 0.6) is None


def seen(agreement: float) -> CaseFeatures:
    return {1: Features(voxels=100, shown_in=1.0, agreement={"support": agreement})}


def test_a_case_alone_is_judged_beside_the_runs_own() -> None:
    calibration = Calibration(class_values=(1,))
    of_run = {"good": seen(0.95), "usual": seen(0.9), "poor": seen(0.6)}
    level = {1: 0.8}
    together = spread_quality(level, of_run, calibration)
    alone = spread_quality(level, {"new": seen(0.6)}, calibration, among=of_run)
    assert alone["new"] == together["poor"]
    assert spread_quality(level, {"new": seen(0.6)}, calibration)["new"][1] == pytest.approx(0.8)


def test_a_run_that_has_not_ended_is_told_of(fresh_dataset: DatasetFolders) -> None:
    options = RunOptions()
    ledger = Ledger(run_folder(fresh_dataset, options.run_name))
    ledger.append("run", options=options.to_json())
    with pytest.raises(InputError, match="has no final labels yet"):
        BothSources.of(fresh_dataset, read_state(fresh_dataset), device="cpu", threads=1)


def test_a_run_is_read_without_a_line_being_written(tmp_path: Path) -> None:
    Ledger(tmp_path).run_stage("setup/plan", {}, StageResult, what="plan")
    with (tmp_path / LEDGER_FILE).open("a") as handle:
        handle.write('{"event": "do')  # a run is at work, and in the middle of a line
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ledger = ReadLedger(tmp_path)
    assert [event["event"] for event in ledger.events] == ["started", "done"]
    ledger.note_retry("out of memory", "the CPU")
    with pytest.raises(RuntimeError, match="only read here"):
        ledger.append("done")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_bench_counts_the_bounds_that_held_and_leaves_out_what_nobody_has() -> None:
    told = {
        "a": {1: {"dice": 0.8, "lower": 0.7}, 2: {"dice": 0.5, "lower": None}},
        "b": {1: {"dice": 0.9, "lower": 0.85}, 2: {"dice": None, "lower": None}},
    }
    found = compared({"a": {1: 0.7, 2: None}, "b": {1: 0.8, 2: 0.4}}, told)
    assert found["dice"] == pytest.approx((0.7 + 0.8 + 0.4) / 3, abs=1e-4)
    assert found["by_class"] == {"1": 0.75, "2": 0.4}
    assert found["estimates_off"] == found["estimates_too_high"] == pytest.approx(0.1)
    assert (found["bounds_held"], found["bounds"]) == (0.5, 2)
