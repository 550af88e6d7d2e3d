"""Source layouts: how a folder on disk says which image is which case, and where its label is."""

from __future__ import annotations

from pathlib import Path

from nnunet_sam2.cohort.layouts import folder, images2d, msd
from nnunet_sam2.cohort.layouts.found import Found, Hints, SourceCase
from nnunet_sam2.errors import InputError
from nnunet_sam2.files.checks import check_path, readable

__all__ = ["LAYOUTS", "Found", "Hints", "SourceCase", "detect", "find"]

LAYOUTS = {"folder": folder.find, "msd": msd.find, "images2d": images2d.find}


def detect(source: Path) -> str:
    """Name the layout of a source folder; raise `InputError` where it looks like none."""
    if not source.is_dir():
        raise InputError(f"{source} is not a folder; name the folder that holds images/ and labels/")
    if msd.looks_like(source):
        return "msd"
    if images2d.looks_like(source):
        return "images2d"
    if folder.looks_like(source):
        return "folder"
    raise InputError(
        f"{source} has no images/ folder (with labels/ beside it) and no imagesTr/ with dataset.json; "
        "arrange it like one of these"
    )


def find(
    source: Path,
    layout: str,
    *,
    channels: tuple[str, ...] | None = None,
    test: bool = False,
    hints: Hints | None = None,
) -> Found:
    """List a source's cases. ``test`` says that the folder holds test cases: labels may be missing throughout."""
    check_path(source)
    with readable(source):
        name = detect(source) if layout == "auto" else layout
        if name not in LAYOUTS:
            raise InputError(f"unknown layout {name!r}; known: auto, {', '.join(LAYOUTS)}")
        if not source.is_dir():
            raise InputError(f"{source} is not a folder; name the folder that holds images/ and labels/")
        return LAYOUTS[name](source, channels=channels, test=test, hints=hints or Hints())
