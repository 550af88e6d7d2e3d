"""Layout ``msd``: a task of the Medical Segmentation Decathlon (``dataset.json``, ``imagesTr``, 4D for channels).

``imagesUn/`` may hold more unlabelled images; ``labelsTs/`` the truth of test images. A raw dataset of nnU-Net v2
(``channel_names``, ``CASE_0000``) is read as well.
"""

from __future__ import annotations

from pathlib import Path

from nnunet_sam2.cohort import cohort as names
from nnunet_sam2.cohort.declared import DATASET_FILE, is_declared, read_declared
from nnunet_sam2.cohort.labels import table_from_json
from nnunet_sam2.cohort.layouts.found import Found, Hints, SourceCase, image_files, match_labels
from nnunet_sam2.errors import InputError


def looks_like(source: Path) -> bool:
    """Say whether a folder has this layout."""
    return (source / names.LABELLED_IMAGES).is_dir() and is_declared(source / DATASET_FILE)


def find(source: Path, *, channels: tuple[str, ...] | None, test: bool, hints: Hints) -> Found:
    """List the cases of ``imagesTr``, ``imagesUn`` and ``imagesTs``; in ``imagesTr`` a label may be missing."""
    path = source / DATASET_FILE
    value = read_declared(path)
    if value is None:
        raise InputError(f"{path} does not exist; it comes with the task, unpack the archive whole")
    v2 = isinstance(value.get("channel_names"), dict)
    table_of_channels = value.get("channel_names") if v2 else value.get("modality")
    if not isinstance(table_of_channels, dict) or not all(str(k).isdecimal() for k in table_of_channels):
        raise InputError(f'{path} names no channels; it needs "modality": {{"0": "MRI"}}')
    found_channels = tuple(str(table_of_channels[key]) for key in sorted(table_of_channels, key=int))
    table, order = table_from_json(value, str(path))
    cases: list[SourceCase] = []
    for images_name, labels_name, is_test in (
        (names.LABELLED_IMAGES, names.LABELS, False),
        (names.UNLABELLED_IMAGES, names.HIDDEN_LABELS, False),
        (names.TEST_IMAGES, names.TEST_LABELS, True),
    ):
        if not (source / images_name).is_dir():
            continue
        files = image_files(source / images_name)
        images = _channels_v2(files, len(found_channels)) if v2 else {stem: (p,) for stem, p in files.items()}
        labels = image_files(source / labels_name) if (source / labels_name).is_dir() else {}
        label_of = match_labels(images, labels, source / images_name)
        hidden = images_name == names.UNLABELLED_IMAGES
        for case_id in sorted(images):
            cases.append(
                SourceCase(
                    case_id=case_id,
                    images=images[case_id],
                    label=None if hidden else label_of.get(case_id),
                    hidden_label=label_of.get(case_id) if hidden else None,
                    test=is_test or test,
                    split_fourth_axis=not v2,
                )
            )
    if not v2:
        _check_list(value, {case.case_id: case for case in cases}, path)
    if not cases:
        raise InputError(f"{source / names.LABELLED_IMAGES} holds no image; unpack the archive whole")
    return Found(
        layout="msd",
        cases=tuple(cases),
        channels=found_channels,
        labels=table,
        regions_class_order=None if order is None else tuple(order),
    )


def _channels_v2(files: dict[str, Path], count: int) -> dict[str, tuple[Path, ...]]:
    grouped: dict[str, dict[int, Path]] = {}
    for stem, path in files.items():
        if len(stem) < 6 or stem[-5] != "_" or not stem[-4:].isdecimal():
            raise InputError(f"{path} has no channel suffix; name it {stem}_0000")
        grouped.setdefault(stem[:-5], {})[int(stem[-4:])] = path
    for case_id, channels in grouped.items():
        if sorted(channels) != list(range(count)):
            raise InputError(
                f"case {case_id} in {next(iter(channels.values())).parent} has channels {sorted(channels)}, "
                f"dataset.json names {count}; add the missing file or remove the case"
            )
    return {case_id: tuple(path for _, path in sorted(channels.items())) for case_id, channels in grouped.items()}


def _check_list(value: dict[str, object], cases: dict[str, SourceCase], path: Path) -> None:
    """Refuse a task whose list of training pairs names files that are not there: an archive unpacked in part."""
    training = value.get("training")
    for entry in training if isinstance(training, list) else []:
        name = Path(str(entry.get("image") if isinstance(entry, dict) else entry)).name
        case_id = name.removesuffix(".gz").removesuffix(".nii")
        if case_id not in cases:
            raise InputError(f"{path} lists training image {name}, which is not there; unpack the archive whole")
        if cases[case_id].label is None:
            raise InputError(f"{path} lists a label for {name}, which is not in {names.LABELS}/; unpack it whole")
