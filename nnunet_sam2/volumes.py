"""Reading and writing images and label maps, whole or not at all: the only place that touches image files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.files.checks import LOSSY_ENDINGS, PICTURE_ENDINGS, check_content, check_path, file_ending
from nnunet_sam2.files.label_tables import by_names, read_label_table
from nnunet_sam2.files.nifti import NiftiFacts, mend_nonfinite, read_values
from nnunet_sam2.files.one_hot import merge_one_hot
from nnunet_sam2.files.pictures import read_picture, read_tiff_stack, write_picture
from nnunet_sam2.files.repairs import ERROR, STRICT, ReadPolicy, Repairs
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.storage import atomic_path

LABEL_TOLERANCE = 1e-3
"""Largest distance of a label value from a whole number that is still rounded to it."""

MAP_LEVELS = 255
"""Maps of values from 0 to 1 are kept in steps of 1 / MAP_LEVELS."""


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Hold an image with all its channels on one grid; a 2D picture is a volume of one slice."""

    array_czyx: np.ndarray
    """Voxel values, float32, (C, Z, Y, X)."""
    geometry: Geometry

    def __post_init__(self) -> None:
        if self.array_czyx.ndim != 4 or self.array_czyx.shape[1:] != self.geometry.shape_zyx:
            raise ValueError(f"array_czyx {self.array_czyx.shape} is not on the grid {self.geometry.shape_zyx}")


def read_volume(paths: Sequence[Path], *, split_fourth_axis: bool = False) -> Volume:
    """Read one file a channel into a volume; an RGB picture gives three channels, (3, 1, H, W).

    With ``split_fourth_axis`` the volumes of a 4D file become channels (Medical Segmentation Decathlon). Raises
    `InputError` for a missing, damaged or non-finite file and where the channels are not on one grid.
    """
    channels: list[np.ndarray] = []
    first: Geometry | None = None
    for path in paths:
        array, geometry = read_stored(path, split_fourth_axis=split_fourth_axis)
        if first is None:
            first = geometry
        elif difference := first.mismatch(geometry):
            raise InputError(
                f"{paths[0]} and {path} are channels of one image but differ in {difference}; resample one"
            )
        channels.append(as_float32(path, array))
    if first is None:
        raise InputError("an image needs at least one file")
    return Volume(array_czyx=np.concatenate(channels), geometry=first)


def as_float32(path: Path, array: np.ndarray) -> np.ndarray:
    """Return a file's finite values as nnU-Net and SAM 2 take them; raise `InputError` where one becomes infinite."""
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{path} holds values beyond the range of 32 bit floats; rescale it")
    return values


def read_geometry(path: Path) -> Geometry:
    """Read the grid of an image or label file; a volume's voxels are checked as they go by, and not held."""
    if file_ending(path) in PICTURE_ENDINGS:
        return _read(path, indices=True)[1]
    facts = check_content(path)
    if facts is not None and facts.by_own_rules:
        return facts.geometry
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path, error) from None
    geometry = _geometry(reader)
    _check_placement(path, facts, geometry)
    return geometry


def read_label(path: Path, *, allowed: Iterable[int] | None = None) -> tuple[np.ndarray, Geometry]:
    """Read a label map as (Z, Y, X), uint8, or uint16 where a value exceeds 255.

    Raises `InputError` for values that are not whole numbers within `LABEL_TOLERANCE`, are negative, exceed 65535, or
    are not among ``allowed`` (0 is always allowed).
    """
    label_zyx, geometry, _ = read_label_as(path, STRICT, allowed=allowed)
    return label_zyx, geometry


def read_label_as(
    path: Path, policy: ReadPolicy, *, allowed: Iterable[int] | None = None, names: Mapping[str, int] | None = None
) -> tuple[np.ndarray, Geometry, Repairs]:
    """Read a label map as `read_label` does, its geometry mended as the policy says, and say what was mended.

    NaN and infinite values are refused whatever the policy says of images. With ``names``, the declared names and their
    values, a file that has a label table of its own (`files.label_tables`) is mapped by its names, and segments in
    several layers are merged. Volumes of 0 and 1 are merged where the policy says so (`files.one_hot`).
    """
    if file_ending(path) in LOSSY_ENDINGS:
        raise InputError(f"{path} is a JPEG, which changes label values; save the label map as PNG")
    array, geometry, repairs = _read(path, policy=replace(policy, nonfinite=ERROR), indices=True)
    if names is not None and (segments := read_label_table(path)):
        array, renamed, voxels = by_names(path, array, segments, names)
        repairs = replace(repairs, renamed=renamed, renamed_voxels=voxels)
    elif array.shape[0] > 1 and policy.one_hot:
        array, merged = merge_one_hot(path, array, allowed)
        repairs = replace(repairs, one_hot=merged)
    label_zyx, rounded = as_label(path, array, allowed=allowed)
    return label_zyx, geometry, replace(repairs, rounded_voxels=rounded)


def as_label(path: Path, array: np.ndarray, *, allowed: Iterable[int] | None = None) -> tuple[np.ndarray, int]:
    """Return what `read_stored` gave for a file as a label map, checked as in `read_label`, and how many were rounded.

    ``array`` is (C, Z, Y, X) with C 1, the label map (Z, Y, X).
    """
    if array.shape[0] != 1:
        raise InputError(f"{path} has {array.shape[0]} values a voxel; a label map has one, save it as grey or palette")
    label_zyx, rounded_voxels = array[0], 0
    if np.issubdtype(label_zyx.dtype, np.floating):
        rounded = np.rint(label_zyx)
        far = float(np.abs(label_zyx - rounded).max())
        if far > LABEL_TOLERANCE:
            worst = float(label_zyx.flat[int(np.abs(label_zyx - rounded).argmax())])
            raise InputError(
                f"{path} holds {worst:g}, which is not a whole number (tolerance {LABEL_TOLERANCE:g}); "
                "a label map was interpolated or is a probability map, export whole numbers"
            )
        rounded_voxels = int(np.count_nonzero(rounded != label_zyx))
        label_zyx = rounded
    low, high = int(label_zyx.min()), int(label_zyx.max())
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise InputError(f"{path} holds label {low if low < 0 else high}; labels go from 0 to 65535")
    label_zyx = label_zyx.astype(_label_type(high))
    if allowed is not None:
        found = np.flatnonzero(np.bincount(label_zyx.ravel()))
        stray = sorted(set(found.tolist()) - {0, *allowed})
        if stray:
            declared = ", ".join(str(v) for v in sorted({0, *allowed}))
            raise InputError(
                f"{path} holds label {', '.join(str(v) for v in stray[:5])}, declared are {declared}; "
                "correct the file, or declare the value (convert and evaluate take --labels NAME=VALUE,...)"
            )
    return label_zyx, rounded_voxels


def write_label(path: Path, label_zyx: np.ndarray, geometry: Geometry) -> None:
    """Write a label map of whole numbers atomically and read it back before it takes its name.

    Volumes carry ``geometry``; a picture (``.png``, ``.tif``) has one slice and no geometry. Raises `StageError` where
    the file does not hold what was written, for example because the disk is full.
    """
    if label_zyx.shape != geometry.shape_zyx:
        raise ValueError(f"label of shape {label_zyx.shape} is not on the grid {geometry.shape_zyx}")
    if not (np.issubdtype(label_zyx.dtype, np.integer) or label_zyx.dtype == bool):
        raise ValueError(f"labels must be whole numbers, got {label_zyx.dtype}")
    low, high = int(label_zyx.min()), int(label_zyx.max())
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise ValueError(f"labels must lie in 0 to 65535, got {low} to {high}")
    _write(path, label_zyx.astype(_label_type(high)), geometry)


def write_map(path: Path, map_zyx: np.ndarray, geometry: Geometry) -> None:
    """Write a map of values from 0 to 1, rounded to steps of 1/255, atomically and read back.

    Volumes hold float32 values from 0 to 1; pictures hold 8 bit grey, 255 for 1. `read_map` gives the same float32
    values for both.
    """
    if map_zyx.shape != geometry.shape_zyx:
        raise ValueError(f"map of shape {map_zyx.shape} is not on the grid {geometry.shape_zyx}")
    if not (np.isfinite(map_zyx).all() and map_zyx.min() >= 0 and map_zyx.max() <= 1):
        raise ValueError("a map holds values from 0 to 1")
    steps = np.rint(map_zyx * MAP_LEVELS).astype(np.uint8)
    _write(path, steps if file_ending(path) in PICTURE_ENDINGS else _from_steps(steps), geometry)


def read_map(path: Path) -> tuple[np.ndarray, Geometry]:
    """Read what `write_map` wrote: float32 (Z, Y, X), 0 to 1."""
    array, geometry, _ = _read(path)
    return (_from_steps(array[0]) if array.dtype == np.uint8 else array[0].astype(np.float32)), geometry


def write_image(path: Path, array_czyx: np.ndarray, geometry: Geometry) -> None:
    """Write image values in their own number type, atomically and read back.

    A volume file takes one channel, a picture one or three.
    """
    picture = file_ending(path) in PICTURE_ENDINGS
    if array_czyx.shape[0] != 1 and not picture:
        raise ValueError(f"{path}: a volume file takes one channel, got {array_czyx.shape[0]}")
    _write(path, array_czyx if picture else array_czyx[0], geometry)


def read_stored(path: Path, *, split_fourth_axis: bool = False, indices: bool = False) -> tuple[np.ndarray, Geometry]:
    """Read an image in its own number type as (C, Z, Y, X): for lossless rewriting, `read_volume` is for looking.

    With ``indices`` a palette's indices are the values, as a label map wants it.
    """
    array, geometry, _ = _read(path, split_fourth_axis=split_fourth_axis, indices=indices)
    return array, geometry


def read_stored_as(
    path: Path, policy: ReadPolicy, *, split_fourth_axis: bool = False
) -> tuple[np.ndarray, Geometry, Repairs]:
    """Read an image as `read_stored` does, mended as the policy says, and say what was mended."""
    return _read(path, split_fourth_axis=split_fourth_axis, policy=policy)


def _label_type(high: int) -> type[np.unsignedinteger]:
    return np.uint8 if high <= np.iinfo(np.uint8).max else np.uint16


def _from_steps(steps: np.ndarray) -> np.ndarray:
    return steps.astype(np.float32) / np.float32(MAP_LEVELS)


def _read(
    path: Path, *, split_fourth_axis: bool = False, policy: ReadPolicy = STRICT, indices: bool = False
) -> tuple[np.ndarray, Geometry, Repairs]:
    if file_ending(path) in PICTURE_ENDINGS:
        if (stack := read_tiff_stack(path, indices=indices)) is not None:
            array, spacing = stack
            values, repairs = mend_nonfinite(path, array[None], policy)
            return values, Geometry(shape_zyx=array.shape, spacing_xyz_mm=spacing), repairs
        values, repairs = mend_nonfinite(path, read_picture(path, indices=indices)[:, None], policy)
        return values, Geometry(shape_zyx=(1, values.shape[2], values.shape[3])), repairs
    facts = check_content(path, policy)
    if facts is not None and facts.by_own_rules:
        array, geometry, repairs = read_values(path), facts.geometry, facts.repairs
    else:
        array, geometry, repairs = (*_read_with_simpleitk(path, layers=indices), Repairs())
        _check_placement(path, facts, geometry)
    # Whatever the axes before the last three are called, they count volumes.
    array = array.reshape(-1, *geometry.shape_zyx)
    layered = indices and (policy.one_hot or path.name.lower().endswith(".nrrd"))
    if array.shape[0] != 1 and not split_fourth_axis and not layered:
        raise InputError(
            f"{path} is 4D with {array.shape[0]} volumes; "
            + (
                "a label is one map with a value for each class: if each volume is a class of 0 and 1, convert merges "
                "them with --one-hot"
                if indices
                else "save each channel as a file of its own"
            )
        )
    values, mended = mend_nonfinite(path, array, policy)
    if mended:
        repairs = replace(repairs, nonfinite_voxels=mended.nonfinite_voxels, nonfinite_set_to=mended.nonfinite_set_to)
    return values, geometry, repairs


def _check_placement(path: Path, facts: NiftiFacts | None, geometry: Geometry) -> None:
    if facts is not None and (difference := facts.geometry.mismatch(geometry)):
        raise InputError(
            f"{path} is placed differently by its header and by the library that nnU-Net reads it with "
            f"({difference}); write it anew with your image viewer"
        )


def _unreadable(path: Path, error: RuntimeError) -> InputError:
    text = str(error)
    if "orthonormal" in text:
        return InputError(
            f"{path} has sheared axes, which SimpleITK and nnU-Net cannot hold; resample it onto a straight grid"
        )
    return InputError(f"{path} cannot be read ({text.strip().splitlines()[-1]}); get the file again")


def _read_with_simpleitk(path: Path, *, layers: bool) -> tuple[np.ndarray, Geometry]:
    import SimpleITK

    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError as error:
        raise _unreadable(path, error) from None
    if image.GetNumberOfComponentsPerPixel() != 1:
        if layers and image.GetDimension() == 3 and path.name.lower().endswith(".nrrd") and read_label_table(path):
            return np.moveaxis(SimpleITK.GetArrayFromImage(image), -1, 0), _geometry(image)
        raise InputError(
            f"{path} has {image.GetNumberOfComponentsPerPixel()} values a voxel; export one file a channel"
            + (", or the segmentation as one label map" if path.name.lower().endswith(".seg.nrrd") else "")
        )
    dimension = image.GetDimension()
    array = SimpleITK.GetArrayFromImage(image)
    if np.iscomplexobj(array):
        raise InputError(f"{path} holds complex voxels; export the magnitude")
    if dimension == 4:
        return array, _geometry(image[:, :, :, 0])
    if dimension not in (2, 3):
        raise InputError(f"{path} has {dimension} axes; an image has 3")
    return array, _geometry(image)


def _geometry(image) -> Geometry:  # type: ignore[no-untyped-def]  # SimpleITK has no types
    """Return the grid of an image, or of a reader that has read its header; a fourth axis has no place in it."""
    axes = image.GetDimension()
    if axes not in (2, 3, 4):
        raise InputError(f"an image of {axes} axes was read; an image has 3")
    direction = np.eye(3)
    kept = min(axes, 3)
    direction[:kept, :kept] = np.reshape(image.GetDirection(), (axes, axes))[:kept, :kept]
    size, spacing, origin = (
        (*values[:kept], *padding[kept:])
        for values, padding in (
            (image.GetSize(), (1, 1, 1)),
            (image.GetSpacing(), (1.0, 1.0, 1.0)),
            (image.GetOrigin(), (0.0, 0.0, 0.0)),
        )
    )
    return Geometry(
        shape_zyx=(size[2], size[1], size[0]),
        spacing_xyz_mm=spacing,
        origin_xyz_mm=origin,
        direction=tuple(direction.ravel().tolist()),
    )


def _write(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write (Z, Y, X), or (C, 1, H, W) for a picture, and compare what the file holds with what went in."""
    check_path(path)
    picture = file_ending(path) in PICTURE_ENDINGS
    channels = array if array.ndim == 4 else array[None]
    if picture and channels.shape[1] != 1:
        raise ValueError(f"{path}: a picture takes one slice, got {channels.shape[1]}")
    if not np.isfinite(channels).all():
        raise ValueError(f"{path}: NaN and infinite values are not written")
    problem: str | None = None
    with atomic_path(path) as temporary:
        try:
            if picture:
                write_picture(temporary, channels[:, 0])
            else:
                _write_volume(temporary, array, geometry)
            back, geometry_back, _ = _read(temporary)
        except (InputError, OSError, RuntimeError) as error:
            problem = str(error).strip().splitlines()[-1]
        else:
            if back.dtype.kind != array.dtype.kind or not np.array_equal(back, channels):
                problem = "other voxels came back"
            elif not picture:
                problem = geometry.mismatch(geometry_back)
        if problem:
            raise StageError(f"{path} could not be written whole ({problem}); is the disk full? Nothing was replaced")


def _write_volume(path: Path, array_zyx: np.ndarray, geometry: Geometry) -> None:
    import SimpleITK

    image = SimpleITK.GetImageFromArray(array_zyx)
    image.SetSpacing(geometry.spacing_xyz_mm)
    image.SetOrigin(geometry.origin_xyz_mm)
    image.SetDirection(geometry.direction)
    SimpleITK.WriteImage(image, str(path), True)
