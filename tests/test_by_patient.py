"""Another scan of the same patient has no say in what labels and estimates of a labelled case are worth."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_sam2.cli.label import _calibrating
from nnunet_sam2.cohort.cohort import Addition, Cohort, Role
from nnunet_sam2.errors import InputError
from nnunet_sam2.labelling.explain.cases import as_text, find_case
from nnunet_sam2.labelling.labeller import label_cases
from nnunet_sam2.labelling.leave_one_out import held_out, places_of_patient, scans_of
from nnunet_sam2.labelling.prompting.support_slices import SupportSlices
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.labelling.strategies.auto.strategy import Auto, AutoOptions
from nnunet_sam2.labelling.strategies.guided.lora import draw_partner
from nnunet_sam2.labelling.strategies.transfer.memory import slice_descriptors
from nnunet_sam2.labelling.strategies.transfer.strategy import Transfer, TransferOptions
from nnunet_sam2.sam2.backend import MetaSam2Backend, load_backend
from nnunet_sam2.support.cases import Support
from nnunet_sam2.support.library import load_support
from nnunet_sam2.volumes import read_label, write_label


@pytest.fixture(scope="module")
def backend() -> MetaSam2Backend:
    return load_backend("untrained", device="cpu", image_size=128, threads=1)


@pytest.fixture(scope="module")
def twins(cohort: Cohort) -> Cohort:
    """The cohort with the first two labelled cases and the first unlabelled one as scans of patient ``twin``."""
    own = {cohort.labelled[0].case_id, cohort.labelled[1].case_id, cohort.unlabelled[0].case_id}
    cases = tuple(dataclasses.replace(c, patient="twin") if c.case_id in own else c for c in cohort.cases)
    return dataclasses.replace(cohort, cases=cases)


@pytest.fixture(scope="module")
def supports(twins: Cohort, backend: MetaSam2Backend) -> list[Support]:
    return [load_support(twins, case, backend, slice_axis=0) for case in twins.labelled]


def _label(cohort: Cohort, backend: MetaSam2Backend, out: Path, cases: list[str], **changes: Any) -> list[dict]:
    arguments: dict[str, Any] = {
        "support_ids": [case.case_id for case in cohort.labelled],
        "strategy": make_strategy("transfer", {"decoder": "off"}),
        "quality": QualityOptions(),
        **changes,
    }
    return label_cases(cohort=cohort, case_ids=cases, backend=backend, out=out, seed=1, **arguments)


def test_a_labelled_case_is_labelled_and_judged_by_other_patients_alone(
    twins: Cohort, backend: MetaSam2Backend, tmp_path: Path
) -> None:
    first, _, other = (case.case_id for case in twins.labelled)
    (record,) = _label(twins, backend, tmp_path, [first])
    assert record["supports"] == [other]
    assert record["supports_of_the_patient"] == []
    assert record["patient"] == "twin"
    assert record["dice_with_human_label"]
    assert {name for seen in record["quality"]["features"].values() for name in seen["reverse"]} == {other}


def test_an_unlabelled_scan_takes_its_patients_help_and_is_judged_by_others(
    twins: Cohort, backend: MetaSam2Backend, tmp_path: Path
) -> None:
    name = twins.unlabelled[0].case_id
    (record,) = _label(twins, backend, tmp_path, [name], calibrate_on=[case.case_id for case in twins.labelled])
    first, second, other = (case.case_id for case in twins.labelled)
    assert record["supports"] == [first, second, other]
    assert record["supports_of_the_patient"] == [first, second]
    assert {seen for f in record["quality"]["features"].values() for seen in f["reverse"]} == {other}
    quality = record["quality"]
    assert quality["calibration_cases"] == [first, second, other]
    assert quality["calibration_patients"] == sorted(["twin", twins.labelled[2].patient])
    bounds = {(e["coverage"], e["proven"]) for e in quality["classes"].values() if e["lower"] is not None}
    assert bounds == {(0.6667, 0.3333)}
    told = as_text(find_case(twins, name, tmp_path, dataset="501"), twins)
    assert f"of the same patient: {first}, {second}" in told
    assert "in 67% as a rule, proven for 33%" in told
    assert "checked on" not in told  # of a strategy that checked nothing


def test_a_class_that_one_patients_scans_alone_answer_for_is_measured_on_none_of_them(
    twins: Cohort, backend: MetaSam2Backend, tmp_path: Path
) -> None:
    """Each group of classes leaves the patient out for itself: in checks, labels, estimates and calibration."""
    first, second, other = (case.case_id for case in twins.labelled)
    shared, of_twin = twins.class_values
    cases = tuple(dataclasses.replace(c, annotated=(shared,)) if c.case_id == other else c for c in twins.cases)
    partly, name = dataclasses.replace(twins, cases=cases), twins.unlabelled[0].case_id
    strategy = make_strategy("transfer", {"decoder": "off", "check_slices": 3})
    calibrate_on = [case.case_id for case in partly.labelled]
    known, new = _label(partly, backend, tmp_path, [first, name], strategy=strategy, calibrate_on=calibrate_on)
    # The scan of the patient would answer for the class; the label of another patient's case cannot.
    assert known["unanswered"] == [of_twin]
    assert known["dice_with_human_label"][str(of_twin)] is None
    assert known["dice_with_human_label"][str(shared)] is not None
    checked = {group["answers_for"][0]: group["prepared"]["recipe_check"] for group in known["prepared"]["groups"]}
    assert set(checked[shared]) == {first, second, other}
    assert checked[of_twin] == {}
    # A scan without a label takes its patient's help, and nobody can judge what came of it.
    assert "unanswered" not in new
    features = {int(value): seen for value, seen in new["quality"]["features"].items()}
    assert set(features[shared]["reverse"]) == {other}
    assert not features[of_twin].get("reverse")
    assert new["quality"]["classes"][str(of_twin)]["lower"] is None
    assert new["quality"]["classes"][str(shared)]["lower"] is not None


def test_a_labelled_case_whose_patient_alone_supports_is_refused_by_the_patients_name(
    twins: Cohort, backend: MetaSam2Backend, tmp_path: Path
) -> None:
    first, second, _ = (case.case_id for case in twins.labelled)
    with pytest.raises(InputError, match=r"all 2 show its own patient, twin.*--patient-pattern"):
        _label(twins, backend, tmp_path, [first], support_ids=[first, second])
    assert not list(tmp_path.iterdir())


def test_a_label_that_came_later_helps_but_measures_nothing_where_its_patient_alone_supports(
    twins: Cohort, backend: MetaSam2Backend, tmp_path: Path
) -> None:
    first, second, _ = twins.labelled
    added = Addition(label=str(second.label), sha256="", time="now", source="x", classes=None)
    cases = tuple(dataclasses.replace(c, added=added) if c.case_id == second.case_id else c for c in twins.cases)
    later = dataclasses.replace(twins, cases=cases)
    assert later.case(second.case_id).as_planned.role is Role.UNLABELLED
    (record,) = _label(later, backend, tmp_path, [second.case_id], support_ids=[first.case_id, second.case_id])
    assert record["supports"] == record["supports_of_the_patient"] == [first.case_id]
    assert record["dice_with_human_label"] is None


def test_a_patients_label_has_no_part_in_the_label_of_another_scan(
    twins: Cohort, backend: MetaSam2Backend, tmp_path: Path
) -> None:
    """The whole way: another label of the second scan changes no byte of what the first is labelled with."""
    changed = tmp_path / "raw"
    first, second, _ = twins.labelled
    shutil.copytree(twins.root, changed)
    label_zyx, geometry = read_label(changed / str(second.label))
    write_label(changed / str(second.label), np.roll(label_zyx, 5, axis=2), geometry)
    # What is chosen on other patients, who are labelled from both scans, is left aside.
    strategy = make_strategy("transfer", {"check_slices": 0})
    records = [
        _label(cohort, backend, tmp_path / out, [first.case_id], strategy=strategy)[0]
        for out, cohort in (("a", twins), ("b", dataclasses.replace(twins, root=changed)))
    ]
    assert records[0]["input_key"] != records[1]["input_key"]
    assert records[0]["files"] == records[1]["files"]
    assert json.dumps(records[0]["quality"]) == json.dumps(records[1]["quality"])


def _others_label(supports: list[Support]) -> list[Support]:
    """The supports with another label of the second, of the first one's patient."""
    return [supports[0], dataclasses.replace(supports[1], label_zyx=supports[2].label_zyx), supports[2]]


@pytest.mark.parametrize("check", ["recipe_check", "decoder_check"])
def test_checks_on_a_labelled_case_leave_its_patient_out(
    check: str, supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> None:
    def prepared(given: list[Support]) -> Any:
        return Transfer(TransferOptions(check_slices=9)).prepare(given, values, backend)[check]

    first = supports[0].case_id
    assert prepared(supports)[first] == prepared(_others_label(supports))[first]
    # Where nobody says that two scans are one patient's, the label of one is copied to the other.
    strangers = [dataclasses.replace(support, patient=None) for support in supports]
    assert prepared(strangers)[first] != prepared(_others_label(strangers))[first]
    # Two scans of one patient can check nothing, as one case cannot.
    assert prepared(supports[:2]) == {}


def test_what_was_found_on_any_scan_of_a_patient_has_no_say_in_its_choices(
    supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> None:
    strategy = Transfer(TransferOptions(check_slices=9))
    strategy.prepare(supports, values, backend)
    query = supports[0].as_query()
    assert query.patient_id == "twin"
    own = scans_of(query, {support.case_id: support.patient_id for support in supports})
    assert own == {supports[0].case_id, supports[1].case_id}
    assert strategy.checked_dice(values, without=own) != strategy.checked_dice(values)
    auto = Auto(AutoOptions(check_slices=9))
    auto.prepare(supports, values, backend)
    assert auto._patients[supports[1].case_id] == "twin"


def test_label_calibrates_on_as_many_patients_as_there_are(cohort: Cohort) -> None:
    names = [f"{patient}_{scan}" for patient in "abcdefghij" for scan in range(2)]
    cases = tuple(dataclasses.replace(cohort.labelled[0], case_id=n, patient=n[0]) for n in names)
    many = dataclasses.replace(cohort, cases=cases)
    args, strategy = argparse.Namespace(check=False, student=None), make_strategy("transfer")
    found = _calibrating(args, many, strategy, names, [])
    assert len({name[0] for name in found}) == len(found) == QualityOptions().calibration_cases
    assert _calibrating(args, many, strategy, names[:6], []) == names[:6]
    assert _calibrating(args, many, strategy, names[:2], []) == ()


def test_each_patient_is_held_out_whole(supports: list[Support]) -> None:
    left = [[other.case_id for other in others] for _, others in held_out(supports)]
    first, second, other = (support.case_id for support in supports)
    assert left == [[other], [other], [first, second]]
    assert list(held_out(supports[:2])) == []


def test_support_slices_of_a_patient_are_not_found_for_the_patient(
    supports: list[Support], values: tuple[int, ...], backend: MetaSam2Backend
) -> None:
    library, descriptor_f = SupportSlices(supports, values), slice_descriptors(supports[0].embeddings)[4]
    own = places_of_patient(supports, 0)
    assert own == {0, 1}
    assert {found.support for found in library.find(descriptor_f, 10**6, 0.05, without=own)} == {2}
    assert make_strategy("guided").prepare(supports[:2], values, backend) == {"second_pass_check": {}}


def test_a_training_pair_of_lora_is_of_two_patients_where_there_are_two(
    supports: list[Support], values: tuple[int, ...]
) -> None:
    library, rng = SupportSlices(supports, values), np.random.default_rng(0)
    for k in range(len(values)):
        for s, n in library.showing(k):
            if s < 2 and any(t == 2 for t, _ in library.showing(k)):
                assert draw_partner(library, s, n, k, rng)[0] == 2
