"""What SAM 2 does in a run: every strategy gives the labels of the first round, and may take a student's later."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunet_sam2.cohort.cohort import HIDDEN_LABELS, Cohort
from nnunet_sam2.cohort.convert import ConvertOptions, convert
from nnunet_sam2.folders import DatasetFolders, new_dataset_folders
from nnunet_sam2.labelling.records import record_path
from nnunet_sam2.labelling.registry import STRATEGIES
from nnunet_sam2.review.take_in import take_in
from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.decisions.holds import holds_of
from nnunet_sam2.rounds.labelling_stages import LabellingStages
from nnunet_sam2.rounds.ledger import Ledger, StageResult
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.support_labels import SupportLabels
from nnunet_sam2.rounds.training_stages import Student
from nnunet_sam2.storage import read_json
from nnunet_sam2.support.library import PROBABILITIES, write_probabilities
from nnunet_sam2.volumes import read_label, write_label

NEEDS_A_STUDENT = "prompted"
QUICK = {"insert": {"insertions": "1", "supports": "1"}, "chain": {"self_training": "off"}}


@pytest.fixture(scope="module")
def flat_dataset(
    generated_folder: Path, nnunet_environment: Path, tmp_path_factory: pytest.TempPathFactory
) -> DatasetFolders:
    """One slice of every volume of the generated cohort, as pictures of one slice with two classes."""
    source = tmp_path_factory.mktemp("source") / "flat"
    for kind in ("images", "labels"):
        for path in (generated_folder / kind).iterdir():
            data = nib.load(path)
            middle = data.shape[2] // 2
            (source / kind).mkdir(parents=True, exist_ok=True)
            nib.save(data.slicer[:, :, middle : middle + 1], source / kind / path.name)
    shutil.copy(generated_folder / "dataset.json", source)
    folders = new_dataset_folders(502, "Flat")
    convert(source, folders, ConvertOptions())
    return folders


def _run(folders: DatasetFolders, folder: Path, strategy: str, fold: str = "all") -> RunContext:
    cohort = Cohort.load(folders.raw).as_planned()
    ledger = Ledger(folder)
    labelled = [case.case_id for case in cohort.labelled]
    folds = [{"train": labelled[1:], "val": labelled[:1]}]
    ledger.run_stage("setup/plan", {}, lambda: StageResult(info={"folds": folds}), what="planned")
    options = RunOptions(
        fold=fold,
        sam2="untrained",
        image_size=64,
        strategy=strategy,
        strategy_options=QUICK.get(strategy, {}),
        device="cpu",
        threads=1,
    )
    return RunContext(folders=folders, cohort=cohort, options=options, ledger=ledger, folder=folder)


def _student(run: RunContext, like: Path) -> Student:
    """A student that has seen what SAM 2 drew, and of labelled cases the human label."""
    out = run.round_folder(0) / "student"
    for case in (*run.cohort.unlabelled, *run.cohort.labelled):
        path = like / f"{case.case_id}.nii.gz" if case in run.cohort.unlabelled else run.cohort.label_path(case)
        label_zyx, geometry = read_label(path)
        write_label(out / f"{case.case_id}.nii.gz", label_zyx, geometry)
        one_hot = np.stack([label_zyx == value for value in (0, *run.cohort.class_values)]).astype(np.float32)
        write_probabilities(out / PROBABILITIES / f"{case.case_id}.npz", 0.8 * one_hot + 0.2 / len(one_hot))
    return Student(
        number=0,
        configuration="none",
        checkpoint=out,
        validation_dice=None,
        digest="student",
    )


@pytest.mark.parametrize("dataset", ["tiny_dataset", "flat_dataset"])
@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {NEEDS_A_STUDENT}))
def test_every_strategy_that_needs_no_student_labels_a_runs_volumes_and_single_slices_from_the_supports(
    request: pytest.FixtureRequest, tmp_path: Path, strategy: str, dataset: str
) -> None:
    run = _run(request.getfixturevalue(dataset), tmp_path / "run", strategy)
    labels = LabellingStages(run).label_from_supports()
    assert set(labels.estimates) == {case.case_id for case in run.cohort.unlabelled}
    for case in run.cohort.unlabelled:
        _, geometry = read_label(labels.folder / f"{case.case_id}.nii.gz")
        assert case.geometry.mismatch(geometry) is None
        record = read_json(record_path(labels.folder, case.case_id))
        assert record["strategy"] == strategy
        assert set(record["quality"]["classes"]) == {str(value) for value in run.cohort.class_values}


def test_a_label_that_a_person_drew_during_the_run_prompts_sam_2_from_its_round_on(
    fresh_dataset: DatasetFolders, generated_folder: Path, tmp_path: Path
) -> None:
    run = _run(fresh_dataset, tmp_path / "run", "transfer")
    stages = LabellingStages(run)
    first = stages.label_from_supports()
    drawn, other = run.cohort.unlabelled[:2]
    take_in(fresh_dataset.raw, [generated_folder / HIDDEN_LABELS / f"{drawn.case_id}.nii.gz"])
    holds = holds_of(Cohort.load(fresh_dataset.raw), [], held_out_patients=frozenset())

    def supports(of: SupportLabels) -> set[str]:
        return set(read_json(record_path(of.folder, other.case_id))["supports"])

    assert stages.label_from_supports(2, {}) is first
    again = stages.label_from_supports(3, holds)
    assert supports(again) - supports(first) == {drawn.case_id}
    assert again.folder == run.round_folder(3) / "sam2" / "unlabelled"
    assert first.folder == run.folder / "sam2" / "unlabelled"
    assert stages.label_from_supports(4, holds) is again
    # A run that is repeated goes the same way and finds everything done.
    events = len(run.ledger.events)
    repeated = LabellingStages(run)
    assert [repeated.label_from_supports(n, h).digest for n, h in ((0, None), (2, {}), (3, holds), (4, holds))] == [
        first.digest,
        first.digest,
        again.digest,
        again.digest,
    ]
    assert len(run.ledger.events) == events
    # The same label drawn once more is another prompt, and the first one stays what the labels before were made from.
    label_zyx, geometry = read_label(generated_folder / HIDDEN_LABELS / f"{drawn.case_id}.nii.gz")
    write_label(tmp_path / f"{drawn.case_id}.nii.gz", np.where(label_zyx == 2, 0, label_zyx), geometry)
    take_in(fresh_dataset.raw, [tmp_path / f"{drawn.case_id}.nii.gz"], replace=True)
    newer = holds_of(Cohort.load(fresh_dataset.raw), [], held_out_patients=frozenset())
    assert stages.label_from_supports(5, newer).folder == run.round_folder(5) / "sam2" / "unlabelled"
    second = _run(fresh_dataset, tmp_path / "second", "transfer")
    made = LabellingStages(second).label_from_supports()
    assert second.added_before[drawn.case_id] == newer[drawn.case_id].human
    assert LabellingStages(second).label_from_supports(1, newer).digest == made.digest
    assert LabellingStages(second).label_from_supports(2, holds).folder == second.round_folder(2) / "sam2/unlabelled"
    # A case that is taken out prompts nobody.
    out = {case_id: replace(hold, taken_out=True) for case_id, hold in holds.items()}
    assert stages.label_from_supports(6, out).digest == first.digest


def test_a_run_whose_labelled_cases_are_one_patients_calibrates_nothing_and_labels_a_drawn_scan_of_that_patient(
    fresh_dataset: DatasetFolders, generated_folder: Path, tmp_path: Path
) -> None:
    of_cases = _run(fresh_dataset, tmp_path / "run", "transfer")
    assert of_cases.several_scans == {}
    drawn, other = of_cases.cohort.unlabelled[:2]
    one = {case.case_id for case in of_cases.cohort.labelled} | {drawn.case_id}
    cases = tuple(replace(c, patient="one") if c.case_id in one else c for c in of_cases.cohort.cases)
    run = replace(of_cases, cohort=replace(of_cases.cohort, cases=cases))
    assert run.several_scans == {"patients": dict.fromkeys(sorted(one), "one")}
    stages = LabellingStages(run)
    first = stages.label_from_supports()
    assert not first.calibration.calibrated
    assert read_json(record_path(first.folder, drawn.case_id))["supports_of_the_patient"] == list(run.support_ids)
    take_in(fresh_dataset.raw, [generated_folder / HIDDEN_LABELS / f"{drawn.case_id}.nii.gz"])
    holds = holds_of(Cohort.load(fresh_dataset.raw), [], held_out_patients=frozenset())
    again = stages.label_from_supports(1, holds)
    assert not again.calibration.calibrated
    record = read_json(record_path(again.folder, drawn.case_id))
    assert record["supports"] == list(run.support_ids)
    assert record["dice_with_human_label"] is None
    assert drawn.case_id in read_json(record_path(again.folder, other.case_id))["supports"]


@pytest.mark.parametrize(("strategy", "used"), [("refine", "refine"), ("transfer", "prompted")])
def test_a_strategy_that_takes_a_student_refines_its_predictions_in_the_rounds_and_others_leave_it_to_prompted(
    tiny_dataset: DatasetFolders, tmp_path: Path, strategy: str, used: str
) -> None:
    run = _run(tiny_dataset, tmp_path / "run", strategy, fold="0")
    stages = LabellingStages(run)
    student = _student(run, stages.label_from_supports().folder)
    refined = stages.refine(2, student)
    assert refined is not None
    for case in run.cohort.unlabelled:
        assert (refined / f"{case.case_id}.npz").is_file()
        assert read_json(record_path(refined.parent, case.case_id))["strategy"] == used
