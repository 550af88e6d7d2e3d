"""Predictions against reference labels: Dice, Hausdorff distances and normalised surface Dice."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.cohort.layouts.found import image_files
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.checks import strip_ending
from nnunet_sam2.files.repairs import STRICT
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.progress import track
from nnunet_sam2.surfaces import hausdorff, surface_dice
from nnunet_sam2.volumes import read_label_as

METRICS = ("dice", "hd95", "hd", "nsd")
DEFAULT_NSD_TOLERANCE_MM = 1.0

Classes = Mapping[str, tuple[int, ...]]
"""Name of a class in the result to the label values that make it up."""


def evaluate(
    reference: Path,
    prediction: Path,
    *,
    class_values: Sequence[int] | Classes,
    nsd_tolerance_mm: float = DEFAULT_NSD_TOLERANCE_MM,
    ignore_value: int | None = None,
    declared_values: Collection[int] | None = None,
    allow_missing: bool = False,
    annotated: Mapping[str, Collection[int]] | None = None,
    names: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Compare two label files, or the files of the same name in two folders.

    Returns a JSON value with ``mean``, ``classes`` (one entry a class) and ``cases`` (one entry a case, with
    ``classes`` inside); each holds ``dice``, ``hd95``, ``hd`` and ``nsd``, see `compare`. A class's value is the mean
    over the cases, the overall mean the mean over the classes, both without nulls. ``annotated`` holds the values that
    a reference was annotated for, by case, where not for all: classes with others count nowhere in it. With ``names``,
    the declared names and their values, files with label tables of their own are mapped by their names, and
    ``renamed`` says which were changed by that, and how. Raises
    `InputError` for a missing prediction (unless ``allow_missing``), for grids that differ, and for values that are
    not among ``declared_values`` where these are known.
    """
    if not (math.isfinite(nsd_tolerance_mm) and nsd_tolerance_mm >= 0):
        raise InputError(f"the surface tolerance is {nsd_tolerance_mm} mm; it must be 0 or more")
    classes = class_table(class_values)
    pairs = match_files(reference, prediction, allow_missing=allow_missing)
    cases: dict[str, dict[str, Any]] = {}
    renamed: dict[str, str] = {}
    for case_id, (reference_file, prediction_file) in track(pairs.items(), what="evaluating", total=len(pairs)):
        truth_zyx, geometry, told = read_label_as(reference_file, STRICT, allowed=declared_values, names=names)
        guess_zyx, own, guess_told = read_label_as(prediction_file, STRICT, allowed=declared_values, names=names)
        both = ((reference_file, told.renamed), (prediction_file, guess_told.renamed))
        renamed |= {str(file): changes for file, changes in both if changes}
        if difference := geometry.mismatch(own):
            raise InputError(
                f"{reference_file} and {prediction_file} differ in {difference}; resample the prediction onto the "
                "reference's grid"
            )
        per_class = compare(
            truth_zyx,
            guess_zyx,
            geometry,
            classes=classes,
            nsd_tolerance_mm=nsd_tolerance_mm,
            ignore_value=ignore_value,
        )
        known = (annotated or {}).get(strip_ending(reference_file))
        if known is not None:
            per_class |= {
                name: dict.fromkeys(METRICS) for name, values in classes.items() if not set(values) <= set(known)
            }
        cases[case_id] = {**_mean(per_class.values()), "classes": per_class}
    by_class = {name: _mean(case["classes"][name] for case in cases.values()) for name in classes}
    return {
        "mean": _mean(by_class.values()),
        "classes": by_class,
        "cases": cases,
        **({"renamed": renamed} if renamed else {}),
        "options": {"nsd_tolerance_mm": nsd_tolerance_mm, "ignore_value": ignore_value, "cases": len(cases)},
    }


def compare(
    truth_zyx: np.ndarray,
    guess_zyx: np.ndarray,
    geometry: Geometry,
    *,
    classes: Classes,
    nsd_tolerance_mm: float = DEFAULT_NSD_TOLERANCE_MM,
    ignore_value: int | None = None,
) -> dict[str, dict[str, float | None]]:
    """Compare two label maps on one grid, class by class.

    ``dice`` is 0 to 1; ``hd95`` and ``hd`` are the symmetric Hausdorff distances in mm (pixels for a picture), the
    first as the greater of both directions' 95th percentiles; ``nsd`` is the share of both surfaces' area that lies
    within the tolerance of the other; see `surfaces`. A class that is in neither map has
    None throughout. One that is in only one of them (a false positive, or missed) has Dice and NSD 0 and, for want of
    a distance, the length of the volume's diagonal. Voxels that the truth marks ``ignore_value`` count as background
    in both.
    """
    if ignore_value is not None:
        known = truth_zyx != ignore_value
        truth_zyx, guess_zyx = truth_zyx * known, guess_zyx * known
    return {
        name: _compare_masks(np.isin(truth_zyx, values), np.isin(guess_zyx, values), geometry, nsd_tolerance_mm)
        for name, values in classes.items()
    }


def class_table(class_values: Sequence[int] | Classes) -> dict[str, tuple[int, ...]]:
    """Name classes: a plain value by itself, a region as it is named."""
    if isinstance(class_values, Mapping):
        table = {name: tuple(values) for name, values in class_values.items()}
    else:
        table = {str(value): (int(value),) for value in sorted(set(class_values))}
    if not table or any(not values or min(values) < 1 for values in table.values()):
        raise InputError("evaluation needs at least one class, with values above 0")
    return table


def match_files(reference: Path, prediction: Path, *, allow_missing: bool) -> dict[str, tuple[Path, Path]]:
    """Pair reference and prediction files by name; predictions without reference are left out."""
    if reference.is_file() and prediction.is_file():
        return {prediction.name: (reference, prediction)}
    for folder in (reference, prediction):
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; name two folders of label maps, or two files")
    references, predictions = image_files(reference), image_files(prediction)
    missing = sorted(set(references) - set(predictions))
    if missing and not allow_missing:
        raise InputError(
            f"{prediction} has no prediction for {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; predict all, or leave them out with --allow-missing"
        )
    pairs = {stem: (references[stem], predictions[stem]) for stem in references if stem in predictions}
    if not pairs:
        raise InputError(f"{reference} and {prediction} have no label map of the same name")
    return pairs


def _compare_masks(
    truth_zyx: np.ndarray, guess_zyx: np.ndarray, geometry: Geometry, nsd_tolerance_mm: float
) -> dict[str, float | None]:
    volumes = int(truth_zyx.sum()), int(guess_zyx.sum())
    if not any(volumes):
        return dict.fromkeys(METRICS)
    if not all(volumes):
        lengths = np.multiply(geometry.shape_zyx, geometry.spacing_zyx_mm)
        diagonal = float(np.linalg.norm(lengths[_axes(geometry)]))
        return {"dice": 0.0, "hd95": diagonal, "hd": diagonal, "nsd": 0.0}

    truth, guess = _crop(truth_zyx, guess_zyx)
    axes = _axes(geometry)
    if len(axes) == 2:
        truth, guess = truth[0], guess[0]
    spacing = [geometry.spacing_zyx_mm[axis] for axis in axes]
    hd95, hd = hausdorff(guess, truth, spacing, (95, 100))
    return {
        "dice": 2.0 * int((truth & guess).sum()) / sum(volumes),
        "hd95": hd95,
        "hd": hd,
        "nsd": surface_dice(guess, truth, spacing, nsd_tolerance_mm),
    }


def _axes(geometry: Geometry) -> list[int]:
    """Return the axes that distances run along; a single slice is compared as a picture."""
    return [1, 2] if geometry.shape_zyx[0] == 1 else [0, 1, 2]


def _crop(truth_zyx: np.ndarray, guess_zyx: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Crop both masks to their common bounding box; no metric looks beyond it."""
    box = []
    either = truth_zyx | guess_zyx
    for axis in range(3):
        filled = np.flatnonzero(either.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(filled[0]), int(filled[-1]) + 1))
    return truth_zyx[tuple(box)], guess_zyx[tuple(box)]


def _mean(entries: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    listed = list(entries)
    means: dict[str, float | None] = {}
    for metric in METRICS:
        values = [entry[metric] for entry in listed if entry[metric] is not None]
        means[metric] = float(np.mean(values)) if values else None
    return means
