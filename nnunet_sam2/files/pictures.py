"""Two-dimensional pictures (PNG, PGM, TIFF, BMP): reading without loss of bits, writing what nnU-Net reads."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nnunet_sam2.errors import InputError
from nnunet_sam2.files.checks import check_file, file_ending
from nnunet_sam2.files.stacks import TIFF_ENDINGS, read_stack
from nnunet_sam2.files.tiff_layout import check_tiff

_T = TypeVar("_T")

_ORIENTATION = 0x0112
"""EXIF's tag of the turn, 1 for none."""
_PALETTE = 3
"""TIFF's photometric interpretation of a palette."""
_LOSSLESS = (1, 5, 8, 32773, 32946)
"""TIFF's compressions that each reader has and that keep every value: none, LZW, deflate, PackBits."""


def read_picture(path: Path, *, indices: bool = False) -> np.ndarray:
    """Read a picture as (C, H, W) in its own number type; C is 1 (grey) or 3 (RGB).

    A palette's colours are the values of an image, its ``indices`` those of a label map. An alpha channel is dropped
    where it is opaque and refused otherwise.
    """
    reader = _read_tiff if file_ending(path) in TIFF_ENDINGS else _read_other
    array: np.ndarray = _heard(path, lambda: reader(path, indices))
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        raise InputError(f"{path} has shape {array.shape}; a picture has two axes, and colours as a third")
    colours = array.shape[-1]
    if colours == 1:
        return np.ascontiguousarray(array[..., 0][None])
    if colours in (2, 4):
        alpha = array[..., -1]
        opaque = np.iinfo(alpha.dtype).max if np.issubdtype(alpha.dtype, np.integer) else 1
        if not (alpha == opaque).all():
            raise InputError(f"{path} has a transparent part; save it without alpha channel")
        array = array[..., :-1]
        colours -= 1
    if colours not in (1, 3):
        raise InputError(f"{path} has {array.shape[-1]} values a pixel (or pages); save it as grey or RGB, one page")
    return np.ascontiguousarray(np.moveaxis(array, -1, 0))


def read_tiff_stack(path: Path, *, indices: bool) -> tuple[np.ndarray, tuple[float, float, float]] | None:
    """Read a TIFF file of several pages as `files.stacks.read_stack` does, refused where its reader complains."""
    if file_ending(path) not in TIFF_ENDINGS:
        return None
    return _heard(path, lambda: read_stack(path, indices=indices))


def _heard(path: Path, read: Callable[[], _T]) -> _T:
    """Read a picture and refuse it where its reader fails or complains."""
    check_file(path)
    complaints: list[str] = []
    try:
        with _listening(complaints):
            found = read()
    except InputError:
        raise
    except Exception as error:  # readers raise many kinds for a damaged file
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be read as a picture ({told}); get the file again") from None
    if complaints:
        # It gives pixels all the same, and often others than the next reader does.
        raise InputError(f"{path} is damaged: its reader complains ({complaints[0]}); get the file again")
    return found


def write_picture(path: Path, array_chw: np.ndarray) -> None:
    """Write (C, H, W), C 1 or 3, as PNG (8 bit, or 16 bit grey) or TIFF (any of nnU-Net's); same bytes each time."""
    array = array_chw[0] if array_chw.shape[0] == 1 else np.ascontiguousarray(np.moveaxis(array_chw, 0, -1))
    ending = file_ending(path)
    if ending in TIFF_ENDINGS:
        import tifffile

        kind: dict[str, Any] = {"photometric": "rgb" if array.ndim == 3 else "minisblack"}
        tifffile.imwrite(path, array, compression="zlib", metadata=None, software=False, **kind)
        return
    if ending != ".png" or not picture_fits_png(array_chw):
        raise ValueError(f"{path}: {array_chw.dtype} with {array_chw.shape[0]} channels cannot be written here")
    from PIL import Image

    Image.fromarray(array).save(path, format="PNG", compress_level=6)


def picture_fits_png(array_chw: np.ndarray) -> bool:
    """Say whether nnU-Net's PNG reader gives these values back: 8 bit grey or RGB, or 16 bit grey."""
    return array_chw.dtype == np.uint8 or (array_chw.dtype == np.uint16 and array_chw.shape[0] == 1)


@contextmanager
def _listening(complaints: list[str]) -> Iterator[None]:
    """Collect what the readers log or warn of while a picture is read; none of it reaches the user as it is."""
    handler = _Collector(complaints)
    loggers = [logging.getLogger(name) for name in ("tifffile", "PIL")]
    kept = [(logger.propagate, logger.level, logger.disabled) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate, logger.disabled = False, False
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
        complaints += [str(one.message).splitlines()[0] for one in warned if _is_of_the_file(one)]
    finally:
        for logger, (propagate, level, disabled) in zip(loggers, kept, strict=True):
            logger.removeHandler(handler)
            logger.propagate, logger.disabled = propagate, disabled
            logger.setLevel(level)


def _is_of_the_file(warning: warnings.WarningMessage) -> bool:
    from PIL import Image

    about_code = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)
    return not issubclass(warning.category, (*about_code, Image.DecompressionBombWarning))


class _Collector(logging.Handler):
    def __init__(self, complaints: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.complaints = complaints

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().strip() or record.levelname
        self.complaints.append(text.splitlines()[0][:200])


def _read_tiff(path: Path, indices: bool) -> np.ndarray:
    import tifffile

    pages = check_tiff(path)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        if pages > 1:
            raise InputError(f"{path} has {pages} pages; a picture has one")
        array = page.asarray()
        _ask_a_second_reader(path, page, array)
        photometric = getattr(page, "photometric", None)
        if photometric is not None and int(photometric) == _PALETTE and not indices:
            raise InputError(f"{path} holds the numbers of a palette, no intensities; save it as grey or RGB")
        if array.ndim == 3 and getattr(page, "planarconfig", 1) == 2:
            array = np.moveaxis(array, 0, -1)
        if photometric is not None and int(photometric) == 0 and array.dtype != bool:
            if array.dtype != np.uint8:
                raise InputError(
                    f"{path} counts its greys from white, which programs read in two ways beyond 8 bits; save it with "
                    "0 as black"
                )
            array = np.iinfo(array.dtype).max - array  # 0 is white in this file
        return np.asarray(array)


def _ask_a_second_reader(path: Path, page: Any, array: np.ndarray) -> None:
    """Refuse a file that Pillow reads otherwise; what it cannot read, and what decoders round, is not asked for."""
    from PIL import Image, UnidentifiedImageError, features

    lossless = page.compression in _LOSSLESS and (page.compression == 1 or features.check("libtiff"))
    kept = page.bitspersample == 8 or (page.samplesperpixel == 1 and page.bitspersample in (16, 32))
    if not lossless or not kept or page.photometric not in (1, 2, 3):
        return
    try:
        opened = Image.open(path)
    except UnidentifiedImageError:
        return
    with opened as image:
        other = np.asarray(image)
    if page.planarconfig == 2 and array.ndim == 3:
        array = np.moveaxis(array, 0, -1)
    same = other.shape == array.shape and np.array_equal(
        other.astype(array.dtype), array, equal_nan=array.dtype.kind == "f"
    )
    if not same:
        raise InputError(f"{path} is damaged: two readers find other pixels in it; get the file again, or save it anew")


def _read_other(path: Path, indices: bool) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        if image.getexif().get(_ORIENTATION, 1) > 1:
            raise InputError(
                f"{path} is to be turned when it is shown (EXIF), which not all programs do; save it upright"
            )
        if image.format == "PNG" and _png_is_deep_colour(path):
            # Pillow cuts 16 bit colour to 8 without a word.
            import SimpleITK

            return np.asarray(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))))
        if image.mode == "1":
            return np.asarray(image).astype(np.uint8)
        if image.mode == "P" and not indices:
            colours = np.asarray(image.convert("RGBA"))
            return colours[..., [0, 3]] if (colours[..., :3] == colours[..., :1]).all() else colours
        if image.mode in ("L", "P", "RGB", "RGBA", "LA", "F"):
            return np.asarray(image)
        if image.mode.startswith("I"):
            array = np.asarray(image)
            if array.min() < 0 or array.max() > np.iinfo(np.uint16).max:
                raise InputError(f"{path} has grey values outside 0 to 65535; save it as 16 bit")
            return array.astype(np.uint16)
        raise InputError(f"{path} is a picture of mode {image.mode}; save it as grey or RGB")


def _png_is_deep_colour(path: Path) -> bool:
    with path.open("rb") as handle:
        head = handle.read(26)
    return head[24] == 16 and head[25] in (2, 6)
