"""TIFF stacks of ImageJ and Fiji that say how large their voxels are: volumes, though their ending is a picture's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.errors import InputError
from nnunet_sam2.files.tiff_layout import check_tiff

TIFF_ENDINGS = (".tif", ".tiff")
_UNIT_MM = {
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 10.0),
    **dict.fromkeys(("um", "\u00b5m", "\u03bcm", "micron", "microns", "micrometer"), 1e-3),
    **dict.fromkeys(("inch", "in"), 25.4),
}
_LEAST_MM3 = 1e-11
_MIN_IS_WHITE, _PALETTE = 0, 3


def read_stack(path: Path, *, indices: bool = False) -> tuple[np.ndarray, tuple[float, float, float]] | None:
    """Read a grey TIFF of several pages as (Z, Y, X) with its voxel size in mm, (x, y, z); None for one page.

    The voxel size is ImageJ's: ``unit`` and ``spacing`` in its description, and the pixels a unit of the resolution
    tags. Raises `InputError` for a stack that does not tell it, or that has channels or times.
    """
    import tifffile

    pages = check_tiff(path)
    with tifffile.TiffFile(path) as file:
        told: Mapping[str, Any] = file.imagej_metadata or {}
        images = int(told.get("images", 1))
        if max(pages, images) == 1:
            return None
        spacing = _voxel_size(told, file.pages[0].tags)
        if spacing is None:
            raise InputError(
                f"{path} has {max(pages, images)} pages and no voxel size; set it in ImageJ (Image > Properties) and "
                "save it again, or convert it to .nii.gz first"
            )
        if math.prod(spacing) < _LEAST_MM3:
            raise InputError(
                f"{path} has voxels of {' x '.join(f'{v:g}' for v in spacing)} mm, too small for a NIfTI header's "
                "numbers; give the size in another unit, as if micrometres were millimetres"
            )
        first = file.pages[0]
        colours = first.samplesperpixel > 1 or first.photometric in (_MIN_IS_WHITE, *(() if indices else (_PALETTE,)))
        if images != pages or int(told.get("channels", 1)) > 1 or int(told.get("frames", 1)) > 1 or colours:
            raise InputError(
                f"{path} is a stack of {pages} pages with several channels, times or colours; save one grey stack of "
                "slices a file (ImageJ: Image > Color > Split Channels)"
            )
        array = np.stack([page.asarray() for page in file.pages])
    if array.ndim != 3:
        raise InputError(f"{path} is a stack of shape {array.shape}; save one grey stack of slices a file")
    return array, spacing


def _voxel_size(told: Mapping[str, Any], tags: Any) -> tuple[float, float, float] | None:
    # ImageJ writes the micro sign as its escape.
    unit = str(told.get("unit", "")).strip().lower().replace("\\u00b5", "u")
    scale = _UNIT_MM.get(unit)
    try:
        sizes = [tags[name].value[1] / tags[name].value[0] for name in ("XResolution", "YResolution")]
        sizes.append(float(told["spacing"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError):
        return None
    if scale is None or not all(math.isfinite(size) and size > 0 for size in sizes):
        return None
    x, y, z = (float(f"{size * scale:.9g}") for size in sizes)
    return x, y, z
