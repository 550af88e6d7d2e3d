"""A round's own nnU-Net configuration: the images by hard link, segmentations and distrust maps written anew."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.cohort.cohort import Cohort
from nnunet_sam2.errors import InputError
from nnunet_sam2.folders import DatasetFolders
from nnunet_sam2.progress import track
from nnunet_sam2.rounds.nnunet.base import (
    PLANS,
    RoundConfiguration,
    only_writer,
    read_plans,
    remove_remains,
    resolved_configuration,
    write_plans,
)
from nnunet_sam2.rounds.nnunet.cases import (
    IMAGE,
    RECORD,
    Preprocessing,
    load_preprocessing,
    preprocess_map,
    preprocess_segmentation,
    preprocess_unlabelled,
    preprocessed_case,
    save_array,
    unlabelled_folder,
)
from nnunet_sam2.rounds.nnunet.plan import labelled_key, require_unchanged
from nnunet_sam2.storage import atomic_folder, file_hash, read_json, value_hash, write_json
from nnunet_sam2.trainers.settings import SETTINGS_KEY, RoundSettings
from nnunet_sam2.volumes import read_label, read_map


def make_round_configuration(
    folders: DatasetFolders,
    cohort: Cohort,
    *,
    base_configuration: str,
    name: str,
    settings: RoundSettings,
    pseudo_cases: Sequence[str] = (),
    human_cases: Sequence[str] = (),
    labels: Path | None = None,
    confidence: Path | None = None,
    probabilities: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    plans: str = PLANS,
) -> RoundConfiguration:
    """Build the immutable configuration ``name`` (such as ``3d_fullres_r01``) and its data folder.

    ``human_cases`` are those of the pseudo cases whose label a person drew: they count as labelled ones in training.
    ``labels`` holds ``CASE<file_ending>`` of every pseudo case, ``confidence`` (if given) ``CASE<file_ending>`` with
    values 0 to 1, and ``probabilities`` (if given, beside confidence) ``CASE.npz``, which the cases without a human
    label are learnt from where ``settings.soft_targets`` says so. Without pseudo cases this is a round on human labels
    alone. ``settings`` receives the pseudo cases and the confidence folder here. ``overrides`` are configuration keys
    such as `light_configuration` returns.
    The data are what nnU-Net's preprocessor would make of these images and labels, with -1 as background outside the
    image's nonzero region; only the segmentations are computed. Raises `InputError` where ``name`` exists with other
    content.
    """
    pseudo_cases = tuple(sorted(pseudo_cases))
    _check(cohort, base_configuration, name, pseudo_cases, labels)
    identifier = f"{plans}_{name}"
    folder, distrust = folders.preprocessed / identifier, folders.preprocessed / f"{identifier}_conf"
    human = tuple(sorted(human_cases))
    settings = replace(
        settings,
        pseudo_cases=tuple(case for case in pseudo_cases if case not in human),
        human_cases=human,
        confidence_folder=distrust.name if pseudo_cases and confidence else None,
    )
    all_plans = read_plans(folders, plans)
    entry = _as_json(
        {
            "inherits_from": base_configuration,
            "data_identifier": identifier,
            **_without_cascade(resolved_configuration(all_plans, base_configuration)),
            **(overrides or {}),
            SETTINGS_KEY: settings.to_json(),
        }
    )
    inputs = {
        case: _case_files(case, cohort, labels, confidence, None if case in human else probabilities)
        for case in pseudo_cases
    }
    key = value_hash(
        {
            "base": resolved_configuration(all_plans, base_configuration),
            "entry": entry,
            "labelled": labelled_key(cohort),
            "pseudo": {case: [file_hash(path) for path in paths] for case, paths in inputs.items()},
            "images": {case: cohort.case(case).voxel_hash for case in pseudo_cases},
        }
    )
    made = RoundConfiguration(
        name=name, data_folder=folder, confidence_folder=distrust, key=key, pseudo_cases=pseudo_cases
    )
    record = made.record
    if record.is_file():
        known = read_json(record)
        if known["key"] != key:
            raise InputError(
                f"configuration {name} of {folders.name} exists with other labels or settings and rounds are never "
                f"changed; use another name, or remove {record}, {folder} and {distrust} with the models trained on it"
            )
        whole = _is_whole(folder, distrust, cohort, inputs) and known.get("files", {}).items() == _hashes(made).items()
        if whole and all_plans["configurations"].get(name) == entry:
            return made
    if pseudo_cases:
        preprocess_unlabelled(folders, cohort, base_configuration, pseudo_cases, plans=plans)
    with only_writer(folders):
        require_unchanged(folders, base_configuration, plans=plans)
        loaded = load_preprocessing(folders, base_configuration, plans=plans)
        _write_data(made, cohort, folders, unlabelled_folder(folders, base_configuration, plans=plans), inputs, loaded)
        all_plans = read_plans(folders, plans)
        all_plans["configurations"][name] = entry
        write_plans(folders, all_plans, plans)
    labelled = [c.case_id for c in cohort.labelled]
    write_json(record, {"key": key, "labelled": labelled, "pseudo": list(pseudo_cases), "files": _hashes(made)})
    return made


def _check(cohort: Cohort, base: str, name: str, pseudo_cases: Sequence[str], labels: Path | None) -> None:
    if "__" in name or "/" in name or not name or name == base:
        raise InputError(f"configuration name {name!r} does not serve: no '__', no '/', not the base's name")
    if pseudo_cases and labels is None:
        raise InputError("pseudo cases need a folder of labels")
    labelled = {case.case_id for case in cohort.labelled}
    for case in pseudo_cases:
        if case in labelled:
            raise InputError(f"case {case} has a human label; a machine label may not take its place")


def _case_files(
    case_id: str, cohort: Cohort, labels: Path | None, confidence: Path | None, probabilities: Path | None
) -> list[Path]:
    """Return the label file of a pseudo case and, if there are such, its confidence and its probability file."""
    paths = [folder / f"{case_id}{cohort.file_ending}" for folder in (labels, confidence) if folder is not None]
    if probabilities is not None:
        paths.append(probabilities / f"{case_id}.npz")
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} is missing: every pseudo case of a round needs it")
    return paths


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return the value as it is after writing and reading: lists for tuples, so that it can be compared."""
    read: dict[str, Any] = json.loads(json.dumps(value))
    return read


def _without_cascade(base: Mapping[str, Any]) -> dict[str, Any]:
    # With a next stage, nnU-Net's validation would write predictions into a configuration that is not preprocessed.
    return {"next_stage": None} if base.get("next_stage") else {}


def _is_whole(folder: Path, distrust: Path, cohort: Cohort, inputs: Mapping[str, Sequence[Path]]) -> bool:
    cases = [*(case.case_id for case in cohort.labelled), *inputs]
    wanted = {case + end for case in cases for end in (".b2nd", "_seg.b2nd", ".pkl")}
    wanted_distrust = {f"{case}.b2nd" for case, paths in inputs.items() if len(paths) > 1}
    return (
        folder.is_dir()
        and distrust.is_dir()
        and set(os.listdir(folder)) == wanted
        and set(os.listdir(distrust)) == wanted_distrust
    )


def _hashes(made: RoundConfiguration) -> dict[str, str]:
    return {f"{path.parent.name}/{path.name}": file_hash(path) for path in made.hashed_files}


def _write_data(
    made: RoundConfiguration,
    cohort: Cohort,
    folders: DatasetFolders,
    images: Path,
    inputs: Mapping[str, Sequence[Path]],
    loaded: Preprocessing,
) -> None:
    base = folders.preprocessed / loaded.configuration.data_identifier
    for path in (made.data_folder, made.confidence_folder):
        remove_remains(path)
    with atomic_folder(made.data_folder) as folder, atomic_folder(made.confidence_folder) as distrust:
        for case in cohort.labelled:
            for end in (".b2nd", "_seg.b2nd", ".pkl"):
                _link(base / f"{case.case_id}{end}", folder / f"{case.case_id}{end}")
        for case_id, files in track(inputs.items(), what=f"writing labels of {made.name}"):
            _write_pseudo_case(case_id, files, images / case_id, folder, distrust, loaded)


def _write_pseudo_case(
    case_id: str,
    files: Sequence[Path],
    image_folder: Path,
    folder: Path,
    distrust: Path,
    loaded: Preprocessing,
) -> None:
    from nnunet_sam2.trainers.dataset import distrust_from_confidence, write_distrust

    if file_hash(image_folder / IMAGE) != read_json(image_folder / RECORD)["image_hash"]:
        raise InputError(f"{image_folder} was changed after preprocessing; remove it and run again")
    labels = loaded.plans.get_label_manager(loaded.dataset)
    allowed = [*labels.all_labels, *([labels.ignore_label] if labels.has_ignore_label else [])]
    patch_size = loaded.configuration.patch_size
    properties, nonzero_zyx = preprocessed_case(image_folder)
    label_zyx, _ = read_label(files[0], allowed=allowed)
    seg_czyx, locations = preprocess_segmentation(label_zyx, properties, nonzero_zyx, loaded)
    _link(image_folder / IMAGE, folder / f"{case_id}.b2nd")
    save_array(folder / f"{case_id}_seg.b2nd", seg_czyx, patch_size)
    (folder / f"{case_id}.pkl").write_bytes(pickle.dumps({**properties, "class_locations": locations}))
    if len(files) > 1:
        confidence_zyx, _ = read_map(files[1])
        mapped_zyx = preprocess_map(confidence_zyx, properties, loaded)[0]
        soft_czyx = _soft_targets(files[2], properties, loaded) if len(files) > 2 else None
        write_distrust(distrust, case_id, distrust_from_confidence(mapped_zyx), patch_size, soft_czyx=soft_czyx)


def _soft_targets(path: Path, properties: dict[str, Any], loaded: Preprocessing) -> np.ndarray:
    """Return probabilities of the network's channels, background left out, on the preprocessed grid (c, z, y, x)."""
    from nnunet_sam2.labelling.fusion import as_probability
    from nnunet_sam2.support.library import read_probabilities

    prob_czyx = read_probabilities(path)
    labels = loaded.plans.get_label_manager(loaded.dataset)
    channel_of = {int(value): n for n, value in enumerate(labels.all_labels)}
    soft = []
    for wanted in labels.foreground_regions if labels.has_regions else labels.foreground_labels:
        values = wanted if isinstance(wanted, (tuple, list)) else (wanted,)
        prob_zyx = as_probability(prob_czyx[[channel_of[int(value)] for value in values]]).sum(axis=0)
        soft.append(preprocess_map(prob_zyx, properties, loaded)[0])
    return np.stack(soft)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file: nothing writes into a round's folder, and the images are most of its size."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
