"""What a run's models and labels are worth on labels that it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import HIDDEN_LABELS, TEST_LABELS, Case, Cohort
from nnunet_sam2.evaluation import evaluate
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.largest import single_classes, write_largest
from nnunet_sam2.rounds import nnunet
from nnunet_sam2.rounds.state import RunState


def score_labels(cohort: Cohort, labels: Path) -> dict[str, Any]:
    """Score label maps of the unlabelled cases against their hidden truth."""
    return _short(evaluate(cohort.root / HIDDEN_LABELS, labels, class_values=cohort.class_values))


def score_model(
    folders: DatasetFolders, cohort: Cohort, configuration: str, fold: str, *, threads: int, out: Path
) -> dict[str, Any]:
    """Let a model segment the test cases and score them, also as ``predict --keep-largest`` would write them."""
    predict_test(folders, cohort, configuration, fold, cohort.test, threads=threads, out=out)
    largest = out.with_name(f"{out.name}_largest")
    names = [f"{case.case_id}{cohort.file_ending}" for case in cohort.test]
    write_largest(out, largest, names, single_classes(cohort))
    truth, values = cohort.root / TEST_LABELS, cohort.class_values
    scores = _short(evaluate(truth, out, class_values=values))
    return {**scores, "largest": _short(evaluate(truth, largest, class_values=values))}


def predict_test(
    folders: DatasetFolders,
    cohort: Cohort,
    configuration: str,
    fold: str,
    cases: Sequence[Case],
    *,
    threads: int,
    out: Path,
    device: str = "cpu",
) -> None:
    """Segment cases with one model."""
    nnunet.predict_cases(
        folders,
        configuration,
        [fold if fold == "all" else int(fold)],
        {case.case_id: cohort.image_paths(case) for case in cases},
        out,
        device=device,
        log=out.parent / f"{out.name}.log",
        threads=threads,
    )


def score_run(folders: DatasetFolders, cohort: Cohort, state: RunState, *, threads: int, out: Path) -> dict[str, Any]:
    """Score SAM 2's raw labels, the model of every round and the labels of every round of a finished run."""
    result: dict[str, Any] = {
        "stop_reason": state.stop_reason,
        "best_round": state.best_round,
        "sam2": score_labels(cohort, state.folder / "sam2" / "unlabelled"),
        "final_labels": score_labels(cohort, state.folder / "labels"),
        "rounds": [],
    }
    for round_ in state.rounds:
        scored = score_model(
            folders, cohort, round_.configuration, state.fold, threads=threads, out=out / round_.configuration
        )
        entry = {
            "round": round_.number,
            "configuration": round_.configuration,
            **scored,
            "validation_dice": round_.validation_dice,
            "change_mean": round_.change_mean,
            "change_worst_tenth": round_.change_worst_tenth,
            "iterations": round_.iterations,
            "seconds": round_.seconds,
        }
        if round_.number == 0:
            result["labelled_only"] = entry
            continue
        entry["labels"] = score_labels(cohort, state.folder / f"r{round_.number:02d}" / "labels")
        result["rounds"].append(entry)
    return result


def _short(scores: dict[str, Any]) -> dict[str, Any]:
    return {
        "dice": scores["mean"]["dice"],
        "hd95": scores["mean"]["hd95"],
        "classes": {name: values["dice"] for name, values in scores["classes"].items()},
        "cases": len(scores["cases"]),
    }
