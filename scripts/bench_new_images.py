"""Score what ``predict --with-sam2`` wrote, against human labels: SAM 2, the student, both fused, and the bounds.

``python scripts/bench_new_images.py OUT TRUTH RESULT_JSON``: OUT as `predict` left it, TRUTH with ``CASE<ending>``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.labelling.leave_one_out import DiceTable, dice_by_class
from nnunet_sam2.storage import read_json, write_json
from nnunet_sam2.volumes import read_label

FOLDERS = {"SAM 2": "sam2", "student": "student", "both, fused": "."}


def score_new_images(out: Path, truth: Path) -> dict[str, Any]:
    """Return each source's Dice a class, how far its estimates lie from it, and the share of bounds that held."""
    quality = read_json(out / "quality.json")
    values = [int(value) for value in quality["classes"]]
    files = {case: next(truth.glob(f"{case}.*")) for case in quality["cases"]}
    result: dict[str, Any] = {key: quality[key] for key in ("run", "model", "calibrated", "classes")}
    result["cases"] = sorted(quality["cases"])
    for what, folder in FOLDERS.items():
        measured: dict[str, DiceTable] = {}
        for case in result["cases"]:
            human_zyx, _ = read_label(files[case])
            label_zyx, _ = read_label(out / folder / files[case].name)
            measured[case] = dice_by_class(label_zyx, human_zyx, values)
        told = {case: row_of(rows, folder) for case, rows in quality["cases"].items()}
        result[what] = compared(measured, told)
    return result


def row_of(rows: Mapping[str, Any], folder: str) -> dict[int, Mapping[str, Any]]:
    """Return one source's estimates of a case, by class; those of the fused label stand at the top."""
    return {int(value): row if folder == "." else row[folder] for value, row in rows.items()}


def compared(measured: Mapping[str, DiceTable], told: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Compare what was measured of cases and classes with what had been estimated."""
    pairs = [
        (value, dice, told[case].get(value, {}))
        for case, table in measured.items()
        for value, dice in table.items()
        if dice is not None
    ]
    off = [row["dice"] - dice for _, dice, row in pairs if row.get("dice") is not None]
    held = [dice >= row["lower"] for _, dice, row in pairs if row.get("lower") is not None]
    by_class: dict[int, list[float]] = {}
    for value, dice, _ in pairs:
        by_class.setdefault(value, []).append(dice)
    return {
        "dice": round(float(np.mean([dice for _, dice, _ in pairs])), 4),
        "by_class": {str(value): round(float(np.mean(found)), 4) for value, found in sorted(by_class.items())},
        "estimates_off": round(float(np.mean(np.abs(off))), 4) if off else None,
        "estimates_too_high": round(float(np.mean(off)), 4) if off else None,
        "bounds_held": round(float(np.mean(held)), 4) if held else None,
        "bounds": len(held),
    }


def main() -> None:
    """Score, write and print."""
    out, truth, target = map(Path, sys.argv[1:4])
    result = score_new_images(out, truth)
    write_json(target, result)
    print(f"{'':<14}{'Dice':>7}{'estimates off by':>18}{'bounds that held':>18}   {len(result['cases'])} new cases")
    for what in FOLDERS:
        row = result[what]
        held = "-" if row["bounds_held"] is None else f"{row['bounds_held']:.2f} of {row['bounds']}"
        print(f"{what:<14}{row['dice']:>7.3f}{row['estimates_off'] or 0:>18.3f}{held:>18}")


if __name__ == "__main__":
    main()
