"""Preprocessing of unlabelled images, once, and of their labels, every round: equal to nnU-Net's own to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.progress import track
from nnunet_sam2.rounds.nnunet.base import PLANS, only_writer, read_plans, require_trainable, resolved_configuration
from nnunet_sam2.storage import (
    atomic_folder,
    file_hash,
    read_json,
    remove_temporary_files,
    value_hash,
    write_json,
    write_stream,
)
from nnunet_sam2.trainers.discovery import require_nnunet

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

IMAGE, PROPERTIES, NONZERO, RECORD = "image.b2nd", "properties.json", "nonzero.npz", "record.json"
_FREE_KEYS = ("batch_size", "batch_dice", "architecture", "nnunet_sam2", "next_stage")
"""Keys of a plans configuration that preprocessing does not depend on."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Hold what nnU-Net preprocesses with: its plans, one configuration, the label table."""

    plans: PlansManager
    configuration: ConfigurationManager
    dataset: dict[str, Any]


def load_preprocessing(folders: DatasetFolders, configuration: str, *, plans: str = PLANS) -> Preprocessing:
    """Load a configuration; raise `InputError` where its preprocessor is one whose steps are not known here."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    value = read_plans(folders, plans)
    require_trainable(value, configuration)
    manager = PlansManager(value)
    loaded = Preprocessing(
        plans=manager,
        configuration=manager.get_configuration(configuration),
        dataset=read_json(folders.preprocessed / "dataset.json"),
    )
    if loaded.configuration.preprocessor_class.run_case_npy is not DefaultPreprocessor.run_case_npy:
        name = loaded.configuration.preprocessor_name
        raise InputError(f"plans {plans} use the preprocessor {name}; rounds need DefaultPreprocessor: plan with it")
    return loaded


def unlabelled_folder(folders: DatasetFolders, configuration: str, *, plans: str = PLANS) -> Path:
    """Return the folder of the preprocessed unlabelled images, beside nnU-Net's own."""
    identifier = resolved_configuration(read_plans(folders, plans), configuration)["data_identifier"]
    return folders.preprocessed / f"{identifier}_un"


def preprocess_unlabelled(
    folders: DatasetFolders,
    cohort: Cohort,
    configuration: str,
    case_ids: Sequence[str],
    *,
    plans: str = PLANS,
) -> Path:
    """Preprocess the images of unlabelled cases once and return their folder, with one folder a case in it.

    The plans' fingerprint is that of the labelled cases.
    """
    folder = unlabelled_folder(folders, configuration, plans=plans)
    with only_writer(folders):
        _preprocess_missing(folders, cohort, configuration, case_ids, folder, plans)
    return folder


def is_preprocessed(case_folder: Path, key: str) -> bool:
    """Say whether a case's folder is whole and was made from the same image and plans."""
    record = case_folder / RECORD
    return record.is_file() and (case_folder / PROPERTIES).is_file() and read_json(record)["key"] == key


def preprocessed_case(case_folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Return nnU-Net's properties of a preprocessed case and its mask of nonzero voxels (z, y, x), cropped."""
    properties: dict[str, Any] = read_json(case_folder / PROPERTIES)
    with np.load(case_folder / NONZERO, allow_pickle=False) as packed:
        shape = tuple(int(n) for n in packed["shape"])
        mask = np.unpackbits(packed["bits"], count=int(np.prod(shape))).reshape(shape).astype(bool)
    return properties, mask


def preprocess_segmentation(
    label_zyx: np.ndarray, properties: dict[str, Any], nonzero_zyx: np.ndarray, loaded: Preprocessing
) -> tuple[np.ndarray, dict[Any, Any]]:
    """Do to a label map what nnU-Net's preprocessor does beside an image that it has preprocessed already.

    ``label_zyx`` lies on the raw image's grid, ``nonzero_zyx`` is the image's filled nonzero mask within the crop.
    Returns the segmentation (1, z, y, x) int16, -1 outside the mask, and ``class_locations``. Follows
    ``DefaultPreprocessor.run_case_npy`` and ``crop_to_nonzero`` of nnunetv2 2.8, to which it is bit-identical.
    """
    from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice

    preprocessor = loaded.configuration.preprocessor_class(verbose=False)
    # nnU-Net's readers give float32 label maps, and resampling keeps the type.
    seg = label_zyx.astype(np.float32)[None].transpose([0, *(i + 1 for i in loaded.plans.transpose_forward)])
    _require_shape(seg.shape[1:], properties)
    crop = (slice(None), *bounding_box_to_slice(properties["bbox_used_for_cropping"]))
    seg = seg[crop].copy()
    seg[(seg == 0) & ~nonzero_zyx[None]] = -1
    new_shape, spacing, target = _grids(properties, loaded)
    seg = loaded.configuration.resampling_fn_seg(seg, new_shape, spacing, target)
    labels = loaded.plans.get_label_manager(loaded.dataset)
    wanted = list(labels.foreground_regions if labels.has_regions else labels.foreground_labels)
    if labels.has_ignore_label:
        wanted.append([-1, *labels.all_labels])
    locations = preprocessor._sample_foreground_locations(seg, wanted, verbose=False)
    seg = preprocessor.modify_seg_fn(seg, loaded.plans, loaded.dataset, loaded.configuration)
    return np.ascontiguousarray(seg.astype(np.int16)), locations


def preprocess_map(map_zyx: np.ndarray, properties: dict[str, Any], loaded: Preprocessing) -> np.ndarray:
    """Bring a smooth map, such as a confidence, from the raw image's grid to the preprocessed one: (1, z, y, x).

    Uses the plans' resampling of probabilities (linear in plane, nearest across thick slices), which keeps its range.
    """
    from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice

    value = map_zyx.astype(np.float32)[None].transpose([0, *(i + 1 for i in loaded.plans.transpose_forward)])
    _require_shape(value.shape[1:], properties)
    crop = (slice(None), *bounding_box_to_slice(properties["bbox_used_for_cropping"]))
    value = value[crop]
    new_shape, spacing, target = _grids(properties, loaded)
    return np.asarray(loaded.configuration.resampling_fn_probabilities(value, new_shape, spacing, target), np.float32)


def save_array(path: Path, array_czyx: np.ndarray, patch_size: Sequence[int]) -> None:
    """Write an array as nnU-Net stores it (blosc2, chunks fitting the patch), atomically, the same bytes every time."""
    from nnunet_sam2.trainers.dataset import write_blosc

    write_blosc(path, np.ascontiguousarray(array_czyx), patch_size)


def _preprocess_missing(
    folders: DatasetFolders,
    cohort: Cohort,
    configuration: str,
    case_ids: Sequence[str],
    folder: Path,
    plans: str,
) -> None:
    loaded = load_preprocessing(folders, configuration, plans=plans)
    keys = {case_id: _image_key(cohort.case(case_id), loaded) for case_id in case_ids}
    todo = [case_id for case_id in case_ids if not is_preprocessed(folder / case_id, keys[case_id])]
    if not todo:
        return
    remove_temporary_files(folder)
    jobs = [([str(p) for p in cohort.image_paths(cohort.case(c))], folder / c, keys[c]) for c in todo]
    for images, target, key in track(jobs, what=f"preprocessing {len(todo)} unlabelled cases"):
        _preprocess_image(images, target, key, loaded)


def _preprocess_image(images: list[str], target: Path, key: str, loaded: Preprocessing) -> None:
    from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice
    from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask

    reader = loaded.plans.image_reader_writer_class()
    raw_czyx, properties = reader.read_images(images)
    preprocessor = loaded.configuration.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case_npy(
        raw_czyx, None, properties, loaded.plans, loaded.configuration, loaded.dataset
    )
    transposed = raw_czyx.astype(np.float32).transpose([0, *(i + 1 for i in loaded.plans.transpose_forward)])
    nonzero = create_nonzero_mask(transposed)[bounding_box_to_slice(properties["bbox_used_for_cropping"])]
    with atomic_folder(target) as folder:
        save_array(folder / IMAGE, data.astype(np.float32, copy=False), loaded.configuration.patch_size)
        write_json(folder / PROPERTIES, _plain(properties))
        bits, lengths = np.packbits(nonzero), np.array(nonzero.shape)
        write_stream(folder / NONZERO, lambda stream: np.savez(stream, bits=bits, shape=lengths))
        write_json(folder / RECORD, {"key": key, "image_hash": file_hash(folder / IMAGE)})


def _plain(value: Any) -> Any:
    """Return nnU-Net's properties as a JSON value: a pickle could do more than hold them."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _image_key(case: Case, loaded: Preprocessing) -> str:
    configuration = {k: v for k, v in loaded.configuration.configuration.items() if k not in _FREE_KEYS}
    return value_hash(
        {
            "voxels": case.voxel_hash,
            "geometry": case.geometry.to_json(),
            "configuration": configuration,
            "transpose": loaded.plans.transpose_forward,
            "reader": loaded.plans.plans["image_reader_writer"],
            "intensities": loaded.plans.foreground_intensity_properties_per_channel,
            "nnunetv2": require_nnunet(),
        }
    )


def _require_shape(shape_zyx: Sequence[int], properties: dict[str, Any]) -> None:
    wanted = tuple(properties["shape_before_cropping"])
    if tuple(shape_zyx) != wanted:
        raise InputError(
            f"a map of shape {tuple(shape_zyx)} does not lie on its image's grid {wanted} (nnU-Net's axes)"
        )


def _grids(properties: dict[str, Any], loaded: Preprocessing) -> tuple[np.ndarray, list[float], list[float]]:
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

    shape = properties["shape_after_cropping_and_before_resampling"]
    spacing = [properties["spacing"][i] for i in loaded.plans.transpose_forward]
    target = list(loaded.configuration.spacing)
    if len(target) < len(shape):
        target = [spacing[0], *target]
    return compute_new_shape(shape, spacing, target), spacing, target
