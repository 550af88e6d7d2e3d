"""A run whose ledger, records and label files lie on disk, without a network that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.rounds.ledger import Ledger, StageResult
from nnunet_sam2.rounds.options import RunOptions
from nnunet_sam2.rounds.state import run_folder
from nnunet_sam2.storage import write_json
from nnunet_sam2.volumes import write_label, write_map


@pytest.fixture
def run(fresh_dataset: DatasetFolders) -> tuple[DatasetFolders, Path]:
    """Return a dataset and the folder of a run on it: baseline and two rounds, the second one best."""
    cohort = Cohort.load(fresh_dataset.raw)
    options = RunOptions()
    folder = run_folder(fresh_dataset, options.run_name)
    ledger = Ledger(folder)
    labelled = [case.case_id for case in cohort.labelled]
    first, second = cohort.unlabelled

    def stage(name: str, **info: Any) -> None:
        ledger.run_stage(name, info, lambda: StageResult(info=info), what=name)

    ledger.append("run", options=options.to_json())
    ledger.append("machine", machine={"packages": {"nnunetv2": "2.8.1"}, "cores": 2})
    inputs = {
        "cases": {c.case_id: [c.role.value, c.patient, c.voxel_hash] for c in cohort.cases},
        "labels": dict.fromkeys(labelled, "ff" * 32),
    }
    folds = {"folds": [{"train": labelled[1:], "val": labelled[:1]}]}
    ledger.run_stage("setup/plan", inputs, lambda: StageResult(info=folds), what="plan")
    for case in cohort.labelled:
        _labels(cohort, case, folder / "sam2" / "labelled", shift=0)
        _record(folder / "sam2" / "labelled", case, human={"1": 0.81, "2": 0.62})
    for case in cohort.unlabelled:
        _labels(cohort, case, folder / "sam2" / "unlabelled", shift=0)
        _record(folder / "sam2" / "unlabelled", case, human=None)
    stage("setup/sam2", cases=2)
    for number, dice in ((0, 0.7), (1, 0.75), (2, 0.78)):
        name = f"r{number:02d}"
        if number:
            info = fused_record(first.case_id, second.case_id, number)
            add_labels(ledger, cohort, number, info)
        stage(f"{name}/data", round=number, configuration=f"3d_fullres_{name}", final=False)
        checkpoint = f"T__P__3d_fullres_{name}/fold_0/checkpoint_final.pth"
        measured = {"1": {"Dice": dice + 0.1}, "2": {"Dice": float("nan")}}
        write_json(
            fresh_dataset.results / checkpoint.replace("checkpoint_final.pth", "validation/summary.json"),
            {"metric_per_case": [{"prediction_file": f"/x/{labelled[0]}.nii.gz", "metrics": measured}]},
        )
        by_class = {"1": dice + 0.1, "2": dice - 0.1}
        stage(f"{name}/train", validation_dice=dice, validation_by_class=by_class, iterations=10, checkpoint=checkpoint)
    _labels(cohort, cohort.case(labelled[0]), folder / "r02" / "student", shift=1)
    ledger.append("retried", stage="r02/train", cause="out of memory", remedy="a smaller batch")
    ledger.append("stopped", reason="round limit", best_round=2, validation_watched=True)
    return fresh_dataset, folder


def add_labels(ledger: Ledger, cohort: Cohort, number: int, info: dict[str, Any]) -> None:
    """Write the labels of a round and say in the ledger that they are done."""
    out = ledger.folder / f"r{number:02d}" / "labels"
    for case in cohort.unlabelled:
        _labels(cohort, case, out, shift=number)
    write_json(out / "round.json", info)
    files = tuple(out / f"{case.case_id}{cohort.file_ending}" for case in cohort.unlabelled)
    ledger.run_stage(
        f"r{number:02d}/fuse", info, lambda: StageResult(files=files, info={"round": number, **info}), what="labels"
    )


def _labels(cohort: Cohort, case: Case, out: Path, *, shift: int) -> None:
    label_zyx = np.zeros(case.geometry.shape_zyx, np.uint8)
    label_zyx[3:8, 8:20, 8 + shift : 20 + shift] = 1
    label_zyx[4:7, 24:32, 24:32] = 2
    write_label(out / f"{case.case_id}{cohort.file_ending}", label_zyx, case.geometry)
    write_map(out / "confidence" / f"{case.case_id}{cohort.file_ending}", np.full(label_zyx.shape, 0.5), case.geometry)


def _record(out: Path, case: Case, *, human: dict[str, float] | None) -> None:
    classes = {"1": {"dice": 0.8, "lower": 0.7, "coverage": 0.75}, "2": {"dice": 0.6, "lower": 0.5, "coverage": 0.75}}
    record = {
        "case": case.case_id, "strategy": "transfer", "options": {}, "seed": 1, "supports": ["one", "two"],
        "sam2": {"name": "embedded", "image_size": 256, "checkpoint_hash": "cd" * 32, "origin": "here"},
        "fusion": {"components": "auto"}, "voxels": {"1": 720, "2": 192}, "dice_with_human_label": human,
        "quality": {
            "calibrated": True, "calibration_cases": ["one", "two"], "classes": None if human else classes,
            "features": {"1": {"shown_in": 1.0}, "2": {"shown_in": 1.0}},
        },
    }  # fmt: skip
    write_json(out / "members" / f"{case.case_id}.json", record)


def fused_record(first: str, second: str, number: int) -> dict[str, Any]:
    change = {"mean": 0.03, "worst_tenth": 0.09, "by_case": {first: {"1": 0.02, "2": 0.04}, second: {"1": 0.09}}}
    return {
        "used_cases": [first], "left_out": {second: "its estimated Dice is below 0.3"},
        "change": change if number > 1 else None, "quality": {"sam2": {"1": 0.8, "2": 0.6}},
        "voxels": {first: {"1": 720, "2": 192}, second: {"1": 700, "2": 0}},
        "confidence": {first: 0.6, second: 0.4}, "confident": {first: 0.5, second: 0.3},
        "estimates": {first: {"1": 0.82, "2": 0.25}, second: {"1": 0.1, "2": None}}, "distrusted": {first: [2]},
    }  # fmt: skip
