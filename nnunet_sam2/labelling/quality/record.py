"""Quality in the records of labelled cases: written beside the label, read again to calibrate and to fuse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nnunet_sam2.labelling.leave_one_out import DiceTable
from nnunet_sam2.labelling.quality.calibration import Calibration, Pair
from nnunet_sam2.labelling.quality.features import CaseFeatures, Features
from nnunet_sam2.labelling.quality.options import QualityOptions

_DECIMALS = 6


def quality_record(features: CaseFeatures, calibration: Calibration | None) -> dict[str, Any]:
    """Return the features of a case and, with a calibration, the estimate of every class, as a JSON value.

    A labelled case that serves to calibrate has features alone.
    """
    record: dict[str, Any] = {"features": {str(value): seen.to_json() for value, seen in features.items()}}
    if calibration is None:
        return {"calibrated": None, "classes": None, **record}
    estimates = calibration.estimate(features)
    return {
        "calibrated": calibration.calibrated,
        "calibration_cases": [pair.case_id for pair in calibration.pairs],
        "calibration_patients": sorted({pair.patient_id for pair in calibration.pairs}),
        "slopes": calibration.slopes(),
        "classes": {
            str(value): {
                "dice": _rounded(estimate.dice),
                "lower": _rounded(estimate.lower),
                "coverage": estimate.coverage,
                "proven": estimate.proven,
            }
            for value, estimate in estimates.items()
        },
        **record,
    }


def calibration_of(
    records: Iterable[Mapping[str, Any]], class_values: Sequence[int], options: QualityOptions | None = None
) -> Calibration:
    """Calibrate on the records of labelled cases, each of which was labelled from other patients."""
    pairs = []
    for record in records:
        if record.get("dice_with_human_label") and record.get("quality"):
            pairs.append(
                Pair(
                    case_id=record["case"],
                    features=read_features(record),
                    dice={int(value): dice for value, dice in record["dice_with_human_label"].items()},
                    patient=record.get("patient"),
                )
            )
    return Calibration(
        class_values=tuple(class_values),
        pairs=tuple(sorted(pairs, key=lambda pair: pair.case_id)),
        options=options or QualityOptions(),
    )


def read_features(record: Mapping[str, Any]) -> CaseFeatures:
    """Read the features of a case from its record."""
    return {int(value): Features.from_json(seen) for value, seen in record["quality"]["features"].items()}


def read_estimates(record: Mapping[str, Any]) -> DiceTable:
    """Read the estimated Dice of every class from a case's record; empty where nothing was estimated."""
    classes = (record.get("quality") or {}).get("classes") or {}
    return {int(value): entry["dice"] for value, entry in classes.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DECIMALS)
