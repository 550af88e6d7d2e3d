"""The training cases of a round: images that carry their distrust maps along, and who labelled which case.

A map file holds a case's distrust and, for soft targets, the probabilities of the network's foreground channels behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.storage import atomic_path

DISTRUST_MAX = 255
"""Value of a distrust map where a voxel's label is not to be learned from at all; 0 is full trust."""

DISTRUST_ENDING = ".b2nd"


class DistrustedImage:
    """Join a preprocessed image and its maps as more channels, read only where they are cropped.

    nnU-Net's loader asks a case's data for ``shape``, ``ndim``, ``dtype`` and a crop. ``n_maps`` channels follow the
    image's, from 0 to 1: probabilities, if any, and distrust as the last. The loader pads images with 0, which so means
    trust, as in stock training, and background. Channels that ``maps_czyx`` lacks are 0.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, image_czyx: Any, maps_czyx: Any | None, n_maps: int = 1) -> None:
        self._image_czyx = image_czyx
        self._maps_czyx = maps_czyx
        self._n_maps = n_maps
        self.shape = (image_czyx.shape[0] + n_maps, *image_czyx.shape[1:])
        self.ndim = len(self.shape)

    def __getitem__(self, crop: tuple[slice, ...]) -> np.ndarray:
        image_czyx = self._image_czyx[crop]
        n_image = image_czyx.shape[0]
        joined_czyx = np.empty((n_image + self._n_maps, *image_czyx.shape[1:]), dtype=self.dtype)
        joined_czyx[:n_image] = image_czyx
        joined_czyx[n_image:] = 0
        if self._maps_czyx is not None:
            n_read = min(self._n_maps, self._maps_czyx.shape[0])
            inside = (slice(0, n_read), *crop[1:])
            maps_czyx = self._maps_czyx[inside]
            np.divide(maps_czyx[0], DISTRUST_MAX, out=joined_czyx[-1])
            np.divide(maps_czyx[1:], DISTRUST_MAX, out=joined_czyx[n_image : n_image + n_read - 1])
        return joined_czyx


class RoundDataset:
    """Give nnU-Net's loader the cases of a stock dataset, with distrust maps where ``distrust_folder`` is named.

    A case without a map is trusted. ``n_soft`` channels of probabilities are read with the maps; of what is not in
    `soft_identifiers` they are 0, and mean nothing. ``pseudo_identifiers`` and ``pseudo_per_batch`` are for
    `RoundDataLoader`.
    """

    def __init__(
        self,
        stock: Any,
        *,
        pseudo_cases: Sequence[str] = (),
        pseudo_per_batch: float | None = None,
        distrust_folder: Path | None = None,
        n_soft: int = 0,
        repeatable: bool = False,
    ) -> None:
        pseudo = set(pseudo_cases)
        self.stock = stock
        self.identifiers: list[str] = stock.identifiers
        self.labelled_identifiers = [case for case in self.identifiers if case not in pseudo]
        self.pseudo_identifiers = [case for case in self.identifiers if case in pseudo]
        self.pseudo_per_batch = pseudo_per_batch
        self.distrust_folder = distrust_folder
        self.n_maps = 1 + n_soft
        """Channels that follow the image's where there are distrust maps."""
        self.soft_identifiers: frozenset[str] = frozenset()
        if distrust_folder is not None and n_soft:
            self.soft_identifiers = _soft_cases(distrust_folder, self.pseudo_identifiers, n_soft)
        self.repeatable = repeatable

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Open one case: image (with distrust), segmentation, previous stage's segmentation, properties."""
        image_czyx, seg_czyx, previous_czyx, properties = self.stock.load_case(identifier)
        if self.distrust_folder is not None:
            maps_czyx = open_maps(self.distrust_folder, identifier, tuple(image_czyx.shape[1:]))
            image_czyx = DistrustedImage(image_czyx, maps_czyx, self.n_maps)
        return image_czyx, seg_czyx, previous_czyx, properties


def _soft_cases(folder: Path, cases: Sequence[str], n_soft: int) -> frozenset[str]:
    """Return the cases to be learnt from probabilities; refuse maps that were written without."""
    found = [case for case in cases if distrust_path(folder, case).is_file()]
    for path in (distrust_path(folder, case) for case in found):
        channels = blosc2.open(urlpath=str(path), mode="r").shape[0]
        if channels != 1 + n_soft:
            raise InputError(
                f"{path} has {channels - 1} channels of probabilities, soft targets need {n_soft}; make the round "
                "again with soft targets, or train it without (soft_targets false)"
            )
    return frozenset(found)


def distrust_path(folder: Path, case_id: str) -> Path:
    """Return the file of a case's distrust map."""
    return folder / f"{case_id}{DISTRUST_ENDING}"


def open_maps(folder: Path, case_id: str, shape_zyx: tuple[int, ...]) -> Any | None:
    """Open a case's maps, uint8 (distrust and probabilities, z, y, x), without reading; None where it has none."""
    path = distrust_path(folder, case_id)
    if not path.is_file():
        return None
    maps_czyx = blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1})
    if tuple(maps_czyx.shape[1:]) != shape_zyx or maps_czyx.dtype != np.uint8:
        raise InputError(
            f"distrust map {path} is {maps_czyx.dtype} {tuple(maps_czyx.shape)}, its preprocessed image needs "
            f"uint8 {(1, *shape_zyx)}; remove the round's configuration and make it again"
        )
    return maps_czyx


def distrust_from_confidence(confidence: np.ndarray) -> np.ndarray:
    """Turn confidence (0 to 1, any shape) into distrust (uint8, 0 trusted, 255 ignored)."""
    return np.rint((1 - np.clip(confidence, 0, 1)) * DISTRUST_MAX).astype(np.uint8)


def write_distrust(
    folder: Path,
    case_id: str,
    distrust_zyx: np.ndarray,
    patch_size: Sequence[int],
    *,
    soft_czyx: np.ndarray | None = None,
) -> Path:
    """Write a distrust map (uint8, z, y, x on the preprocessed grid) in blocks that suit the patch size.

    ``soft_czyx`` are probabilities (0 to 1) of the network's channels, without the background, to be learnt from.
    """
    path = distrust_path(folder, case_id)
    maps_czyx = np.ascontiguousarray(distrust_zyx[None], dtype=np.uint8)
    if soft_czyx is not None:
        steps_czyx = np.rint(soft_czyx.clip(0, 1) * DISTRUST_MAX).astype(np.uint8)
        maps_czyx = np.concatenate((maps_czyx, steps_czyx))
    write_blosc(path, maps_czyx, patch_size)
    return path


def write_blosc(path: Path, array_czyx: np.ndarray, patch_size: Sequence[int]) -> None:
    """Write an array as nnU-Net stores it (blosc2, chunks fitting the patch), atomically, the same bytes every time.

    Raises `StageError` where it cannot be written or reads back differently.
    """
    blocks, chunks = comp_blosc2_params(array_czyx.shape, tuple(patch_size), array_czyx.itemsize)
    with atomic_path(path) as temporary:
        try:
            blosc2.asarray(
                array_czyx,
                urlpath=str(temporary),
                chunks=chunks,
                blocks=blocks,
                cparams={"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1},
            )
            back = blosc2.open(urlpath=str(temporary), mode="r", dparams={"nthreads": 1})
            # Chunk by chunk: a large volume is not held twice.
            whole = all(
                back[:, z : z + chunks[1]].tobytes() == array_czyx[:, z : z + chunks[1]].tobytes()
                for z in range(0, array_czyx.shape[1], chunks[1])
            )
        except RuntimeError:  # blosc2 does not say which
            whole = False
        if not whole:
            raise StageError(f"{path} could not be written whole: No space left on device, or the disk is damaged")
