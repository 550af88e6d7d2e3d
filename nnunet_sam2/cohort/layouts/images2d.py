"""Layout ``images2d``: pictures (PNG, PGM, TIFF, BMP) in ``images/`` and ``labels/``, grey or RGB."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nnunet_sam2.cohort.layouts import folder
from nnunet_sam2.cohort.layouts.found import Found, Hints
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.checks import LOSSY_ENDINGS, PICTURE_ENDINGS, file_ending, is_image_file


def looks_like(source: Path) -> bool:
    """Say whether ``images/`` holds pictures and nothing else that is an image."""
    images = source / folder.IMAGES
    if not images.is_dir():
        return False
    files = [p for p in images.rglob("*") if is_image_file(p)]
    return bool(files) and all(file_ending(p) in PICTURE_ENDINGS for p in files)


def find(source: Path, *, channels: tuple[str, ...] | None, test: bool, hints: Hints) -> Found:
    """List the pictures of a folder; sorted into cases as in layout ``folder``."""
    found = folder.find(source, channels=channels, test=test, hints=hints)
    for case in found.cases:
        for path in (*case.images, *filter(None, (case.label, case.hidden_label))):
            if file_ending(path) not in PICTURE_ENDINGS:
                raise InputError(f"{path} is no picture; a dataset is either of pictures or of volumes, separate them")
        for path in filter(None, (case.label, case.hidden_label)):
            if file_ending(path) in LOSSY_ENDINGS:
                raise InputError(f"{path} is a JPEG, which changes label values; save the label map as PNG")
    return dataclasses.replace(found, layout="images2d")
