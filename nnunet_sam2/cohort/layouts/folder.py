"""Layout ``folder``: ``images/`` and ``labels/`` with the same names; no label file means unlabelled.

Several channels lie side by side as ``CASE_0000``, ``CASE_0001``, or in sub-folders of ``images/``: one a case
(``images/CASE/t1.nii.gz``) or one a channel (``images/t1/CASE.nii.gz``). ``labelsHidden/`` may hold the truth of
unlabelled cases, a ``dataset.json`` with nnU-Net's ``labels`` and ``channel_names`` (or ``modality``) the names.
"""

from __future__ import annotations

from pathlib import Path

from nnunet_sam2.cohort.cohort import HIDDEN_LABELS
from nnunet_sam2.cohort.declared import DATASET_FILE, read_declared
from nnunet_sam2.cohort.labels import table_from_json
from nnunet_sam2.cohort.layouts.file_names import cases_of_files
from nnunet_sam2.cohort.layouts.found import Found, Hints, SourceCase, image_files, match_labels
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.checks import PICTURE_ENDINGS, file_ending, is_image_file

IMAGES, LABELS, TEST = "images", "labels", "test"


def looks_like(source: Path) -> bool:
    """Say whether a folder has this layout."""
    return (source / IMAGES).is_dir()


def find(source: Path, *, channels: tuple[str, ...] | None, test: bool, hints: Hints) -> Found:
    """List the cases of a folder; a test folder may also hold the image files directly."""
    images = source / IMAGES
    if not images.is_dir():
        if not test:
            raise InputError(f"{images} does not exist; put the images there and the labels into {source / LABELS}")
        images = source
    labels = image_files(source / LABELS) if (source / LABELS).is_dir() else {}
    hidden = image_files(source / HIDDEN_LABELS) if (source / HIDDEN_LABELS).is_dir() else {}
    files = image_files(images)
    folders = sorted(
        p
        for p in images.iterdir()
        if p.is_dir() and not p.name.startswith(".") and any(map(is_image_file, p.iterdir()))
    )
    if images == source:
        folders = [p for p in folders if p.name not in (LABELS, HIDDEN_LABELS)]
    if files and folders:
        raise InputError(f"{images} holds both image files and folders of them ({folders[0].name}); keep one kind")
    names: tuple[str, ...] | None = None
    table, order, declared = _declared(source)
    if files:
        known = channels or declared
        counts = hints.counts or ((len(known),) if known else None)
        if known and hints.counts is None and all(file_ending(path) in PICTURE_ENDINGS for path in files.values()):
            counts = (len(known), 1)  # a picture in colour is one file with several channels
        cases = cases_of_files(
            files, counts=counts, labelled=set(labels) | set(hidden), others=hints.others, suffix=hints.suffix
        )
    elif folders:
        cases, names = _by_folder(folders, labelled=set(labels) | set(hidden), wanted=channels)
    else:
        raise InputError(f"{images} holds no image that can be read; known are .nii.gz .nii .mha .nrrd and pictures")
    label_of = match_labels(cases, labels, images)
    hidden_of = match_labels(cases, hidden, images)
    both = sorted(set(label_of) & set(hidden_of))
    if both:
        raise InputError(f"case {both[0]} has a label both in {LABELS}/ and {HIDDEN_LABELS}/; keep one")
    return Found(
        layout="folder",
        cases=tuple(
            SourceCase(
                case_id=case_id,
                images=cases[case_id],
                label=label_of.get(case_id),
                hidden_label=hidden_of.get(case_id),
                test=test,
            )
            for case_id in sorted(cases)
        ),
        channels=names or declared,
        labels=table,
        regions_class_order=order,
    )


def _declared(source: Path):  # type: ignore[no-untyped-def]  # a triple of optional values, unpacked at once
    path = source / DATASET_FILE
    value = read_declared(path)
    if value is None:
        return None, None, None
    table, order = table_from_json(value, str(path)) if "labels" in value else (None, None)
    # The Decathlon's and nnU-Net v1's name for it: a CT that is not called so is normalised as something else.
    key = "modality" if "channel_names" not in value else "channel_names"
    names = value.get(key)
    if names is not None and not (isinstance(names, dict) and all(number.isdecimal() for number in names)):
        raise InputError(f'{path}: {key} counts from "0", as in {{"0": "CT"}}, got {names!r}; correct it')
    channels = tuple(str(names[key]) for key in sorted(names, key=int)) if names else None
    return table, (None if order is None else tuple(order)), channels


def _by_folder(
    folders: list[Path], *, labelled: set[str], wanted: tuple[str, ...] | None
) -> tuple[dict[str, tuple[Path, ...]], tuple[str, ...]]:
    contents = {folder.name: image_files(folder) for folder in folders}
    inside = set().union(*contents.values())
    if labelled & inside and labelled & set(contents):
        raise InputError(f"{folders[0].parent}: labels fit both the folders and the files in them; rename one kind")
    if labelled & inside or (not labelled and wanted and set(wanted) == set(contents)):
        by_case = {stem: {c: files[stem] for c, files in contents.items() if stem in files} for stem in sorted(inside)}
    else:
        by_case = {
            case_id: {_channel_name(stem, case_id): path for stem, path in files.items()}
            for case_id, files in contents.items()
        }
    names = sorted(set().union(*by_case.values()))
    stored = {name.lower(): name for name in names}
    if wanted and {name.lower() for name in wanted} == set(stored):
        names = [stored[name.lower()] for name in wanted]
    for case_id, channels in by_case.items():
        missing = [name for name in names if name not in channels]
        if missing:
            raise InputError(
                f"case {case_id} in {folders[0].parent} lacks channel {missing[0]}, channels are {', '.join(names)}; "
                "add the file or remove the case"
            )
    return {case_id: tuple(channels[name] for name in names) for case_id, channels in by_case.items()}, tuple(names)


def _channel_name(stem: str, case_id: str) -> str:
    """Return what is left of a file's name when the case's own name is taken off (``BraTS1/BraTS1_t1`` -> ``t1``)."""
    return stem[len(case_id) :].lstrip("_-.") or stem if stem.startswith(case_id) else stem
