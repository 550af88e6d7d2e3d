"""Reading every file of a source before anything is written, and refusing what would fail later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nnunet_sam2.cohort.cohort import Role
from nnunet_sam2.cohort.labels import LabelTable
from nnunet_sam2.cohort.layouts import SourceCase
from nnunet_sam2.errors import InputError, refuse_all
from nnunet_sam2.files.checks import PICTURE_ENDINGS, file_ending
from nnunet_sam2.files.nifti import is_plain_nifti_gz
from nnunet_sam2.files.pictures import picture_fits_png
from nnunet_sam2.files.repairs import STRICT, ReadPolicy, Repairs
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.progress import say, track
from nnunet_sam2.volumes import as_float32, read_label_as, read_stored_as
from nnunet_sam2.voxel_hashes import placed_voxel_hash, voxel_hash


@dataclass(frozen=True, kw_only=True)
class CheckedCase:
    """Hold what one reading found out about a case; the voxels themselves are let go."""

    case_id: str
    source: SourceCase
    picture: bool
    channel_count: int
    fits_png: bool
    geometry: Geometry
    voxel_hash: str
    placed_hash: str
    """Hash of the voxels in patient order: equal for one image however its axes are stored."""
    lowest: float
    """The least value of any channel."""
    label_values: frozenset[int]
    """Foreground values in the label or hidden label, as in the source's file."""
    copy_images: tuple[bool, ...]
    """Whether each image file can be taken byte for byte."""
    copy_label: bool
    stack: bool = False
    """Whether it is a TIFF stack that says how large its voxels are."""
    notes: tuple[str, ...] = field(default=())
    repairs: dict[str, Repairs] = field(default_factory=dict)
    """What was mended, by file name."""

    @property
    def label_file(self) -> Path:
        """Return the file that the label values were read from."""
        path = self.source.label or self.source.hidden_label
        if path is None:
            raise ValueError(f"case {self.case_id} has no label file")
        return path


def check_cases(
    cases: Mapping[str, SourceCase],
    role_of: Mapping[str, Role],
    table: LabelTable | None,
    *,
    allow_empty: bool,
    policy: ReadPolicy = STRICT,
    tell: Callable[[str], None] = say,
) -> list[CheckedCase]:
    """Read and check all cases, in order of their ids.

    Raises `InputError` once all are read, so that of many files each damaged one is named the first time: by ``tell``.
    """
    checked: list[CheckedCase] = []
    refusals: list[str] = []
    ignore = {_ignore_value(table)} if table else set()
    for case_id in track(sorted(cases), what="checking", total=len(cases)):
        try:
            case = _check_case(cases[case_id], table, policy)
            if role_of[case_id] is Role.LABELLED and not case.label_values - ignore and not allow_empty:
                raise InputError(
                    f"{cases[case_id].label} is empty: no voxel belongs to a class; remove the file to make the case "
                    "unlabelled, or accept empty labels with --allow-empty"
                )
        except InputError as refusal:
            refusals.append(str(refusal))
        else:
            checked.append(case)
    refusals += _other_kinds(checked)
    refuse_all(refusals, of=len(cases), what="cases", tell=tell)
    return checked


def check_duplicates(
    checked: list[CheckedCase], role_of: Mapping[str, Role], patient_of: Mapping[str, str]
) -> dict[str, str]:
    """Refuse the same voxels in two roles; return the patients, with equal images of one role made one patient's."""
    first: dict[str, CheckedCase] = {}
    patients = dict(patient_of)
    for case in checked:
        for key in (case.voxel_hash, case.placed_hash):
            twin = first.setdefault(key, case)
            if twin is case:
                continue
            here, there = role_of[twin.case_id], role_of[case.case_id]
            if here is not there:
                raise InputError(
                    f"{twin.source.images[0]} ({here.value}) and {case.source.images[0]} ({there.value}) hold the same "
                    "voxels; remove one of them, an image has one role"
                )
            merged, gone = patients[twin.case_id], patients[case.case_id]
            patients = {case_id: merged if patient == gone else patient for case_id, patient in patients.items()}
    return patients


def _ignore_value(table: LabelTable | None) -> int:
    if table is None or not isinstance(value := table.labels.get("ignore"), int):
        return 0
    return next(source for source, target in table.source_values.items() if target == value)


def _check_case(case: SourceCase, table: LabelTable | None, policy: ReadPolicy) -> CheckedCase:
    arrays: list[np.ndarray] = []
    geometries: list[Geometry] = []
    repairs: dict[str, Repairs] = {}
    names = [path.name for path in case.images]
    if len(set(names)) < len(names):  # a folder a channel
        names = [f"{path.parent.name}/{path.name}" for path in case.images]
    for path, name in zip(case.images, names, strict=True):
        array, geometry, mended = read_stored_as(path, policy, split_fourth_axis=case.split_fourth_axis)
        if mended:
            repairs[name] = mended
        if geometries and (difference := geometries[0].mismatch(geometry)):
            raise InputError(
                f"{case.images[0]} and {path} are channels of one image but differ in {difference}; resample one"
            )
        arrays.append(array)
        geometries.append(geometry)
    geometry = geometries[0]
    values, copy_label, mended = _check_label(case, geometry, table, policy)
    label_file = case.label or case.hidden_label
    if mended and label_file is not None:
        repairs[f"{label_file.parent.name}/{label_file.name}"] = mended
    stack = file_ending(case.images[0]) in PICTURE_ENDINGS and geometry.shape_zyx[0] > 1
    picture = file_ending(case.images[0]) in PICTURE_ENDINGS and not stack
    stacked = np.concatenate([as_float32(path, array) for path, array in zip(case.images, arrays, strict=True)])
    notes = []
    if stacked.min() == stacked.max():
        notes.append(f"{case.images[0]} is constant: every voxel is {stacked.min():g}")
    for name, mended in repairs.items():
        notes += mended.notes(f"case {case.case_id}, {name}")
    return CheckedCase(
        case_id=case.case_id,
        source=case,
        picture=picture,
        stack=stack,
        channel_count=stacked.shape[0],
        fits_png=picture and all(picture_fits_png(array) for array in arrays),
        geometry=geometry,
        voxel_hash=voxel_hash(stacked),
        placed_hash=placed_voxel_hash(stacked, geometry),
        lowest=float(stacked.min()),
        label_values=values,
        copy_images=tuple(
            not picture and is_plain_nifti_gz(path) and name not in repairs and _same_for_nnunet(geometry, own)
            for path, name, own in zip(case.images, names, geometries, strict=True)
        ),
        copy_label=copy_label,
        notes=tuple(notes),
        repairs=repairs,
    )


def _check_label(
    case: SourceCase, geometry: Geometry, table: LabelTable | None, policy: ReadPolicy
) -> tuple[frozenset[int], bool, Repairs]:
    path = case.label or case.hidden_label
    if path is None:
        return frozenset(), False, Repairs()
    allowed = None if table is None else table.source_values
    label_zyx, own, repairs = read_label_as(path, policy, allowed=allowed, names=None if table is None else table.names)
    if difference := geometry.mismatch(own):
        raise InputError(
            f"{case.images[0]} and its label {path} differ in {difference}; resample the label onto the image's grid"
        )
    values = frozenset(np.flatnonzero(np.bincount(label_zyx.ravel())).tolist()) - {0}
    as_it_is = (
        is_plain_nifti_gz(path, whole_numbers=True)
        and not repairs
        and _same_for_nnunet(geometry, own)
        and not (table and table.changes_values)
    )
    return values, as_it_is, repairs


def _same_for_nnunet(one: Geometry, other: Geometry) -> bool:
    """Say whether nnU-Net's integrity check calls two grids the same: it uses `numpy.allclose`, stricter than ours."""
    return all(
        np.allclose(a, b)
        for a, b in (
            (one.spacing_xyz_mm, other.spacing_xyz_mm),
            (one.origin_xyz_mm, other.origin_xyz_mm),
            (one.direction, other.direction),
        )
    )


def _other_kinds(checked: list[CheckedCase]) -> list[str]:
    """Say of each case that is not of the kind that most are, picture or volume and its channels, why it is none."""
    refusals: list[str] = []
    if not checked:
        return refusals
    kinds = Counter((case.picture, case.channel_count) for case in checked)
    usual = next(case for case in checked if kinds[case.picture, case.channel_count] == max(kinds.values()))
    for case in checked:
        here, there = case.source.images[0], usual.source.images[0]
        if case.picture != usual.picture:
            refusals.append(f"{here} and {there}: one is a picture, one a volume; make a dataset of each kind")
        elif case.channel_count != usual.channel_count:
            refusals.append(
                f"{here} has {case.channel_count} channels, {there} has {usual.channel_count}; all cases need the same "
                "(pictures: save all as grey or all as RGB)"
            )
    return refusals
