"""A case handed over to an editor of labels: image, label, colour tables, and how to bring it back."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from nnunet_sam2.cohort.cohort import Case, Cohort, Role
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.labelling.explain.cases import class_names
from nnunet_sam2.report.run_files import RunFiles
from nnunet_sam2.rounds.decisions.record import REVIEW_FOLDER
from nnunet_sam2.storage import atomic_folder, write_json, write_text
from nnunet_sam2.volumes import read_label, write_label
from nnunet_sam2.voxel_hashes import voxel_hash

EXPORT_FOLDER = "export"
EXPORT_FILE = "export.json"
"""Says which case a folder holds, and the voxels of the label as it was handed over."""

COLOURS = (
    (255, 138, 61),
    (67, 180, 255),
    (61, 220, 151),
    (255, 116, 179),
    (240, 207, 69),
    (165, 148, 255),
    (85, 220, 224),
    (255, 107, 102),
    (178, 224, 90),
    (217, 166, 123),
)
"""The colours of the page, in the order of the classes."""

_GREY = (150, 150, 150)


def hand_over(folders: DatasetFolders, run: Path, case_id: str, *, out: Path | None = None) -> Path:
    """Write a folder with all that an editor needs to correct a case's newest label, and return it.

    It holds the images, the label, a label description for ITK-SNAP, a colour table for 3D Slicer and a README.txt.
    Raises `InputError` where the case has no label, and where the folder exists: it may hold somebody's work.
    """
    files = RunFiles.open(folders, run)
    case = files.cohort.case(case_id)
    if case.role is not Role.UNLABELLED:
        raise InputError(f"case {case_id} is a {case.role.value} one; only labels that the run made are handed over")
    label_zyx = _newest_label(files, case)
    if label_zyx is None:
        raise InputError(f"case {case_id} has no label yet in {run}; continue with: nnunet_sam2 run")
    target = out or run / REVIEW_FOLDER / EXPORT_FOLDER / case_id
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            f"{target} is there already and may hold your work; import it, remove it, or give another --output"
        )
    cohort = files.cohort
    name = f"{case_id}{cohort.file_ending}"
    with atomic_folder(target) as folder:
        images = []
        for image in cohort.image_paths(case):
            shutil.copyfile(image, folder / image.name)
            images.append(image.name)
        write_label(folder / name, label_zyx, case.geometry)
        colours = colours_of(cohort)
        write_text(folder / "labels_itksnap.txt", itksnap_labels(colours))
        write_text(folder / "labels_slicer.ctbl", slicer_colours(colours))
        write_text(folder / "README.txt", _readme(case, images, name, folders.dataset_id, target))
        write_json(
            folder / EXPORT_FILE,
            {"dataset": folders.name, "run": run.name, "case": case_id, "voxels": voxel_hash(label_zyx)},
        )
    return target


def _newest_label(files: RunFiles, case: Case) -> np.ndarray | None:
    """Read the label that holds now: what a person drew, and the run's newest for the classes that nobody drew."""
    shown = files.label_files(case)
    paths = [shown[kind] for kind in ("human", "last", "first") if kind in shown]
    if not paths:
        return None
    label_zyx, _ = read_label(paths[0])
    drawn = case.added.classes if case.added else None
    if drawn and "human" in shown and len(paths) > 1:
        rest_zyx, _ = read_label(paths[1])
        drawn = drawn if files.cohort.ignore_value is None else (*drawn, files.cohort.ignore_value)
        label_zyx = np.where(np.isin(label_zyx, drawn), label_zyx, np.where(np.isin(rest_zyx, drawn), 0, rest_zyx))
    return label_zyx


def colours_of(cohort: Cohort) -> dict[int, tuple[str, tuple[int, int, int]]]:
    """Name each label value of a cohort and give it a colour; a value of several regions has their names."""
    names = class_names(cohort)
    found = {value: (names[str(value)], COLOURS[n % len(COLOURS)]) for n, value in enumerate(cohort.class_values)}
    if cohort.ignore_value is not None:
        found[cohort.ignore_value] = ("ignore", _GREY)
    return found


def itksnap_labels(colours: dict[int, tuple[str, tuple[int, int, int]]]) -> str:
    """Write a label description as ITK-SNAP reads it (Segmentation > Import Label Descriptions)."""
    rule = "#" * 48
    lines = [
        rule,
        "# ITK-SnAP Label Description File",
        "# File format:",
        "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL",
        rule,
        '    0     0    0    0        0  0  0    "Clear Label"',
    ]
    for value, (name, (r, g, b)) in colours.items():
        quoted = name.replace('"', "'")
        lines.append(f'{value:5d}   {r:3d}  {g:3d}  {b:3d}        1  1  1    "{quoted}"')
    return "\n".join(lines) + "\n"


def slicer_colours(colours: dict[int, tuple[str, tuple[int, int, int]]]) -> str:
    """Write a colour table as 3D Slicer reads it; names hold no blanks there."""
    lines = ["# Color table file", f"# {len(colours) + 1} values", "0 background 0 0 0 0"]
    lines += [f"{value} {'_'.join(name.split())} {r} {g} {b} 255" for value, (name, (r, g, b)) in colours.items()]
    return "\n".join(lines) + "\n"


def _readme(case: Case, images: list[str], label: str, dataset_id: int, folder: Path) -> str:
    bring_back = f'nnunet_sam2 review -d {dataset_id} --import "{(folder / label).absolute()}"'
    return f"""Case {case.case_id}: correct the label, save it under its name, bring it back.

ITK-SNAP   File > Open Main Image: {images[0]}; Segmentation > Open Segmentation: {label};
           Segmentation > Import Label Descriptions: labels_itksnap.txt. Save with Segmentation > Save.
           Or: itksnap -g {images[0]} -s {label} -l labels_itksnap.txt
3D Slicer  Add Data: {images[0]}, {label} (as LabelMap) and labels_slicer.ctbl; Data, right click on the label
           map: Convert to segmentation node; correct it in the Segment Editor; Segmentations > Export to files:
           NIfTI, merged into one file, colour table labels_slicer.ctbl, so that values stay; or a .seg.nrrd.
napari     Open {label} with a NIfTI plug-in as labels layer over the image; save as .nii.gz with the same plug-in.

Keep grid and values: 0 is background, the others are in labels_itksnap.txt. Then:

    {bring_back}

The file answers for every voxel of the case. If you looked at some classes alone, add --classes NAME,NAME.
"""
