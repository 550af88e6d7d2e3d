"""SAM 2's own labels of a run, from the supports alone: with the estimates of how good they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Addition, Cohort
from nnunet_sam2.labelling.job import label_files
from nnunet_sam2.labelling.labeller import label_cases
from nnunet_sam2.labelling.leave_one_out import DiceTable, estimated_quality
from nnunet_sam2.labelling.quality.calibration import Calibration
from nnunet_sam2.labelling.quality.options import QualityOptions
from nnunet_sam2.labelling.quality.record import calibration_of, read_estimates
from nnunet_sam2.labelling.records import record_path
from nnunet_sam2.labelling.registry import make_strategy
from nnunet_sam2.rounds.context import RunContext
from nnunet_sam2.rounds.decisions.holds import Holds
from nnunet_sam2.rounds.device_memory import on_cpu_if_full
from nnunet_sam2.rounds.ledger import StageResult
from nnunet_sam2.storage import read_json


@dataclass(frozen=True, kw_only=True)
class SupportLabels:
    """Hold what SAM 2 made of the unlabelled cases from the supports alone."""

    folder: Path
    """Labels of the unlabelled cases, with their probabilities."""
    labelled: Path
    """Labels of labelled cases, each made from other patients."""
    checked: tuple[str, ...]
    """The labelled cases in there; none where there is one patient."""
    quality: dict[int, float]
    """Dice of each class on ``checked``."""
    estimates: dict[str, DiceTable]
    """Estimated Dice of each unlabelled case and class."""
    calibration: Calibration
    digest: str


class SupportLabelling:
    """Make SAM 2's labels when they are first asked for, and again when people have drawn labels since."""

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self._support_labels: SupportLabels | None = None
        self._drawn: Mapping[str, Addition] = {}  # what people drew during the run and SAM 2 was prompted with

    def of_round(self, number: int, holds: Holds) -> SupportLabels:
        """Label the unlabelled cases by SAM 2 from the supports, and the labelled ones to see how good that is.

        Whole labels that people drew while the run went on are supports as well, from the round on in which they hold:
        in that round all is labelled anew, otherwise what there is stays.
        """
        known = self.run.added_before
        drawn = {
            case_id: hold.human
            for case_id, hold in sorted(holds.items())
            if hold.human is not None and hold.whole_human and not hold.taken_out and hold.human != known.get(case_id)
        }
        if self._support_labels is None or drawn != self._drawn:
            self._drawn, self._support_labels = drawn, self._label_from(drawn, f"r{number:02d}" if drawn else "setup")
        return self._support_labels

    def _label_from(self, drawn: Mapping[str, Addition], phase: str) -> SupportLabels:
        out = self.run.folder / (f"{phase}/sam2" if drawn else "sam2")
        cohort, before = self.run.support_cohort(drawn), self.run.added_before
        supports = [*self.run.support_ids, *(case_id for case_id in drawn if case_id not in before)]
        inputs = {
            "setup": self.run.digest("setup/plan"),
            "supports": supports,
            **self.run.several_scans,
            **_to_json("added", before),
            **_to_json("drawn", drawn),
            "strategy": self.run.options.strategy,
            "strategy_options": self.run.options.strategy_options,
            "sam2": self.run.sam2_identity,
            "image_size": self.run.options.image_size,
            "seed": self.run.options.seed,
        }
        unlabelled = [c.case_id for c in self.run.cohort.unlabelled]
        checked_ids = checkable(self.run.cohort, cohort, supports)

        def check() -> StageResult:
            records, files = label_stage(
                self.run,
                cohort,
                checked_ids,
                supports,
                self.run.options.strategy,
                out / "labelled",
                calibrate_on=checked_ids,
            )
            quality = estimated_quality(records, self.run.cohort.class_values)
            return StageResult(files=files, info={"dice": {str(v): d for v, d in quality.items() if d is not None}})

        checked = self.run.ledger.run_stage(
            f"{phase}/sam2_quality",
            {**inputs, "quality": QualityOptions().looked_at},
            check,
            what="SAM 2 labels the labelled cases, each from other patients: the estimates of all others follow them",
        )
        calibration = calibration_on(self.run.cohort, out / "labelled", checked_ids)

        def label() -> StageResult:
            _, files = label_stage(
                self.run,
                cohort,
                unlabelled,
                supports,
                self.run.options.strategy,
                out / "unlabelled",
                calibration=calibration,
            )
            return StageResult(files=files, info={"sam2": self.run.backend.spec.origin, "cases": len(unlabelled)})

        # Labels that came before the run are supports as well, so that counts alone would not tell.
        spared = len({c.case_id for c in self.run.cohort.labelled} - set(supports))
        held_out = f", with {spared} held out for validation" if spared else ""
        by_hand = f", {len(drawn)} of them drawn since the run began" if drawn else ""
        labelled = self.run.ledger.run_stage(
            f"{phase}/sam2",
            {**inputs, "quality": checked["digest"]},
            label,
            what=f"SAM 2 labels {len(unlabelled)} cases from {len(supports)} supports{by_hand}{held_out}",
        )
        return SupportLabels(
            folder=out / "unlabelled",
            labelled=out / "labelled",
            checked=tuple(checked_ids),
            quality={int(value): dice for value, dice in checked["info"]["dice"].items()},
            estimates={c: read_estimates(read_json(record_path(out / "unlabelled", c))) for c in unlabelled},
            calibration=calibration,
            digest=labelled["digest"],
        )


def checkable(cohort: Cohort, prompts: Cohort, supports: Sequence[str]) -> list[str]:
    """Return the labelled cases of a run that can be labelled from other patients' ``supports`` among ``prompts``."""
    patients = {prompts.case(case_id).patient for case_id in supports}
    return [case.case_id for case in cohort.labelled if patients - {case.patient}]


def calibration_on(cohort: Cohort, labelled: Path, checked: Sequence[str]) -> Calibration:
    """Calibrate on what SAM 2 made of the ``checked`` cases in the folder ``labelled``."""
    return calibration_of([read_json(record_path(labelled, case_id)) for case_id in checked], cohort.class_values)


def label_stage(
    run: RunContext,
    cohort: Cohort,
    case_ids: Sequence[str],
    support_ids: Sequence[str],
    strategy: str,
    out: Path,
    *,
    student_probabilities: Path | None = None,
    calibration: Calibration | None = None,
    calibrate_on: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], tuple[Path, ...]]:
    """Let SAM 2 label cases of a run, and return their records and all files that were written."""
    settings = run.options.strategy_options if strategy == run.options.strategy else {}
    records = on_cpu_if_full(
        run,
        lambda backend: label_cases(
            cohort=cohort,
            case_ids=case_ids,
            support_ids=support_ids,
            strategy=make_strategy(strategy, settings),
            backend=backend,
            out=out,
            seed=run.options.seed,
            save_probabilities=True,
            student_probabilities=student_probabilities,
            quality=QualityOptions() if calibration is not None or calibrate_on else None,
            calibration=calibration,
            calibrate_on=calibrate_on,
        ),
    )
    ending = run.cohort.file_ending
    files = tuple(path for case_id in case_ids for path in label_files(out, case_id, ending, probabilities=True))
    return records, files


def _to_json(name: str, labels: Mapping[str, Addition]) -> dict[str, Any]:
    return {name: {case_id: addition.to_json() for case_id, addition in labels.items()}} if labels else {}
