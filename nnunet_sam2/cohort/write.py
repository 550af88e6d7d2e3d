"""Writing checked cases as an nnU-Net raw dataset."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.cohort import cohort as names
from nnunet_sam2.cohort.checks import CheckedCase
from nnunet_sam2.cohort.cohort import Case, Cohort, Role
from nnunet_sam2.cohort.declared import DATASET_FILE
from nnunet_sam2.cohort.labels import LabelTable
from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.files.repairs import STRICT, ReadPolicy
from nnunet_sam2.progress import track
from nnunet_sam2.storage import file_hash, write_json
from nnunet_sam2.volumes import read_label_as, read_stored_as, write_image, write_label

VOLUME_ENDING = ".nii.gz"
PICTURE_READER = "NaturalImage2DIO"

_FOLDERS = {
    Role.LABELLED: (names.LABELLED_IMAGES, names.LABELS),
    Role.UNLABELLED: (names.UNLABELLED_IMAGES, names.HIDDEN_LABELS),
    Role.TEST: (names.TEST_IMAGES, names.TEST_LABELS),
}


def choose_ending(checked: list[CheckedCase]) -> str:
    """Choose the dataset's file ending: NIfTI for volumes, PNG for pictures, TIFF where PNG would lose bits."""
    if not checked[0].picture:
        return VOLUME_ENDING
    return ".png" if all(case.fits_png for case in checked) else ".tif"


def write_dataset(
    root: Path,
    checked: list[CheckedCase],
    *,
    role_of: Mapping[str, Role],
    patient_of: Mapping[str, str],
    table: LabelTable,
    cohort: Cohort,
    policy: ReadPolicy = STRICT,
    annotated: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Case, ...]:
    """Write images, labels and ``dataset.json`` under ``root`` and return the cases.

    Files that nnU-Net can take as they are keep their bytes; the others are rewritten without changing a value.
    """
    cases = []
    for case in track(checked, what="writing", total=len(checked)):
        role = role_of[case.case_id]
        images_folder, labels_folder = _FOLDERS[role]
        images = _write_images(root, images_folder, case, cohort.file_ending, policy)
        label = None
        if case.source.label or case.source.hidden_label:
            label = f"{labels_folder}/{case.case_id}{cohort.file_ending}"
            _write_label(root / label, case, table, policy)
        cases.append(
            Case(
                case_id=case.case_id,
                role=role,
                patient=patient_of[case.case_id],
                images=images,
                label=None if role is Role.UNLABELLED else label,
                hidden_label=label if role is Role.UNLABELLED else None,
                geometry=case.geometry,
                voxel_hash=case.voxel_hash,
                placed_hash=case.placed_hash,
                file_hashes={name: file_hash(root / name) for name in (*images, *([label] if label else []))},
                repairs={name: mended.to_json() for name, mended in case.repairs.items()},
                annotated=(annotated or {}).get(case.case_id),
            )
        )
    write_json(root / DATASET_FILE, dataset_json(cohort, sum(role_of[c.case_id] is Role.LABELLED for c in checked)))
    return tuple(cases)


def dataset_json(cohort: Cohort, labelled: int) -> dict[str, Any]:
    """Return nnU-Net's ``dataset.json``; it counts the labelled cases alone, which are all that nnU-Net may plan on."""
    value: dict[str, Any] = {
        "channel_names": {str(i): name for i, name in enumerate(cohort.channels)},
        "labels": cohort.labels,
        "numTraining": labelled,
        "file_ending": cohort.file_ending,
        "name": cohort.name,
    }
    if cohort.regions_class_order is not None:
        value["regions_class_order"] = list(cohort.regions_class_order)
    if cohort.file_ending != VOLUME_ENDING:
        value["overwrite_image_reader_writer"] = PICTURE_READER
    return value


def _write_images(root: Path, folder: str, case: CheckedCase, ending: str, policy: ReadPolicy) -> tuple[str, ...]:
    written: list[str] = []
    for path, copy in zip(case.source.images, case.copy_images, strict=True):
        if copy:
            written.append(f"{folder}/{case.case_id}_{len(written):04d}{ending}")
            _copy(path, root / written[-1])
            continue
        array_czyx, _, _ = read_stored_as(path, policy, split_fourth_axis=case.source.split_fourth_axis)
        parts = [array_czyx] if case.picture else list(array_czyx[:, None])
        for part in parts:
            written.append(f"{folder}/{case.case_id}_{len(written):04d}{ending}")
            write_image(root / written[-1], part, case.geometry)
    return tuple(written)


def _write_label(target: Path, case: CheckedCase, table: LabelTable, policy: ReadPolicy) -> None:
    source = case.source.label or case.source.hidden_label
    if source is None:
        return
    if case.copy_label:
        _copy(source, target)
        return
    label_zyx, _, _ = read_label_as(source, policy, allowed=table.source_values, names=table.names)
    write_label(target, np.asarray(table.translate(label_zyx)), case.geometry)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:
        raise InputError(f"{source} vanished while it was copied; run the command again") from None
    if file_hash(source) != file_hash(target):
        raise StageError(f"{source} could not be copied whole to {target.parent}; is the disk full?")
