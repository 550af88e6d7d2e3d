"""A volume as frames at model size, and the way back to its own grid.

Shape letters: N frames, H W pixels of a slice in the volume, S model size in pixels, K classes or objects.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nnunet_sam2.errors import InputError
from nnunet_sam2.geometry import Geometry, choose_slice_axis
from nnunet_sam2.planes import intensity_window, overlap_matrix, resize

if TYPE_CHECKING:
    import torch

    from nnunet_sam2.volumes import Volume

MASK_THRESHOLD = 0.5
"""Covered part of a model pixel from which on it belongs to a resized mask."""

_PREPROCESSING_VERSION = 1


class Frames:
    """Show a volume to SAM 2 slice by slice: windowed, three channels, square, values from 0 to 1.

    Slices are rendered when asked for. The aspect ratio is not kept: every slice fills the square, so that model
    pixel and voxel are related by one scale factor an axis (as in SSL-MedSAM2).
    """

    def __init__(
        self,
        *,
        array_czyx: np.ndarray,
        geometry: Geometry,
        size: int,
        slice_axis: int,
        channels: tuple[int, int, int],
        windows: Sequence[tuple[float, float]],
        calibrated: bool = False,
    ) -> None:
        if size < 16 or size % 16:
            raise InputError(f"frame size {size} is not a positive multiple of 16")
        if slice_axis not in (0, 1, 2):
            raise InputError(f"slice axis {slice_axis} is not one of 0, 1, 2 (array order z, y, x)")
        if array_czyx.ndim != 4 or array_czyx.shape[1:] != geometry.shape_zyx:
            raise ValueError(f"array_czyx has shape {array_czyx.shape}, the geometry {geometry.shape_zyx}")
        if any(not 0 <= c < array_czyx.shape[0] for c in channels):
            raise InputError(f"channels {channels} asked for, but the volume has {array_czyx.shape[0]}")
        self.geometry = geometry
        self.size = size
        self.slice_axis = slice_axis
        self.channels = channels
        self.windows = tuple((float(low), float(high)) for low, high in windows)
        self.calibrated = calibrated
        self._array_cnhw = np.moveaxis(array_czyx, slice_axis + 1, 1)
        self._key: str | None = None

    @classmethod
    def from_volume(
        cls,
        volume: Volume,
        *,
        size: int,
        slice_axis: int | None = None,
        channels: tuple[int, int, int] | None = None,
        windows: Mapping[int, tuple[float, float]] | None = None,
        lower_percentile: float = 0.5,
        upper_percentile: float = 99.5,
    ) -> Frames:
        """Make the frames of a volume.

        ``slice_axis`` defaults to `choose_slice_axis`. ``channels`` names the volume's channels that become red, green
        and blue, by default `default_channels`. Intensities are clipped, a channel at a time, to its window in
        ``windows``, else to percentiles of the whole volume's voxels above its minimum (the minimum is the background
        of MR; in slices alone the percentiles would make the contrast jump from frame to frame). Frames whose channels
        all have a window are ``calibrated``: equal values mean the same in every volume.
        """
        array_czyx = np.asarray(volume.array_czyx)
        if channels is None:
            channels = default_channels(array_czyx.shape[0])
        given = windows or {}
        used = sorted(set(channels) & set(range(array_czyx.shape[0])))
        windows_c = [(0.0, 1.0)] * array_czyx.shape[0]
        for channel in used:
            windows_c[channel] = (
                given[channel]
                if channel in given
                else intensity_window(array_czyx[channel], lower_percentile, upper_percentile)
            )
        return cls(
            array_czyx=array_czyx,
            geometry=volume.geometry,
            size=size,
            slice_axis=choose_slice_axis(volume.geometry) if slice_axis is None else slice_axis,
            channels=channels,
            windows=windows_c,
            calibrated=all(channel in given for channel in used),
        )

    @classmethod
    def from_images(cls, images_n3ss: np.ndarray) -> Frames:
        """Take ready-made images (N, 3, S, S) with values from 0 to 1, such as augmented support slices, for frames."""
        images = np.asarray(images_n3ss, dtype=np.float32)
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images_n3ss must be (N, 3, S, S), got {images.shape}")
        return cls(
            array_czyx=np.moveaxis(images, 1, 0),
            geometry=Geometry(shape_zyx=(images.shape[0], images.shape[2], images.shape[3])),
            size=int(images.shape[2]),
            slice_axis=0,
            channels=(0, 1, 2),
            windows=[(0.0, 1.0)] * 3,
        )

    def along(self, slice_axis: int) -> Frames:
        """Return the same volume sliced along another axis, with the same intensity windows."""
        return Frames(
            array_czyx=np.moveaxis(self._array_cnhw, 1, self.slice_axis + 1),
            geometry=self.geometry,
            size=self.size,
            slice_axis=slice_axis,
            channels=self.channels,
            windows=self.windows,
            calibrated=self.calibrated,
        )

    def remapped(self, curves: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> Frames:
        """Return the same volume with other intensities: windowed values (0 to 1) go along a curve for each channel.

        A curve is (from, to), ``from`` ascending; between its points values are interpolated. Voxels at the window's
        lower end, which are the background, stay there.
        """
        array_cnhw = np.zeros(self._array_cnhw.shape, np.float32)
        for channel, (source, target) in curves.items():
            for index in range(len(self)):
                plane = self._windowed(channel, index)
                array_cnhw[channel, index] = np.where(plane > 0, np.interp(plane, source, target), 0.0)
        return Frames(
            array_czyx=np.moveaxis(array_cnhw, 1, self.slice_axis + 1),
            geometry=self.geometry,
            size=self.size,
            slice_axis=self.slice_axis,
            channels=self.channels,
            windows=[(0.0, 1.0)] * len(array_cnhw),
        )

    def values(self, channel: int, *, at_most: int = 2**18) -> np.ndarray:
        """Return windowed intensities (0 to 1) above the background, at most so many, spread over the volume."""
        step = max(1, round(len(self) * self._array_cnhw[0, 0].size / at_most))
        planes = [self._windowed(channel, index).ravel() for index in range(len(self))]
        values = np.concatenate(planes)[::step]
        return np.asarray(values[values > 0])

    def cropped(self, start_zyx: tuple[int, int, int], stop_zyx: tuple[int, int, int]) -> Frames:
        """Return a part of the volume, sliced alike and with the same intensity windows; it fills the whole frame."""
        array_czyx = np.moveaxis(self._array_cnhw, 1, self.slice_axis + 1)
        (z0, y0, x0), (z1, y1, x1) = start_zyx, stop_zyx
        return Frames(
            array_czyx=array_czyx[:, z0:z1, y0:y1, x0:x1],
            geometry=self.geometry.cropped(start_zyx, stop_zyx),
            size=self.size,
            slice_axis=self.slice_axis,
            channels=self.channels,
            windows=self.windows,
            calibrated=self.calibrated,
        )

    def __len__(self) -> int:
        return int(self._array_cnhw.shape[1])

    @property
    def slice_shape_hw(self) -> tuple[int, int]:
        """Return a slice's shape in voxels."""
        return int(self._array_cnhw.shape[2]), int(self._array_cnhw.shape[3])

    @property
    def key(self) -> str:
        """Return a hash of all that decides the frames' pixels: voxels, slice axis, windows, channels, size."""
        if self._key is None:
            settings = {
                "version": _PREPROCESSING_VERSION,
                "size": self.size,
                "channels": self.channels,
                "windows": [self.windows[c] for c in self.channels],
                "shape_nhw": [len(self), *self.slice_shape_hw],
            }
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
            for channel in sorted(set(self.channels)):
                for image_hw in self._array_cnhw[channel]:
                    digest.update(np.ascontiguousarray(image_hw, dtype="<f4").tobytes())
            self._key = digest.hexdigest()
        return self._key

    def image(self, index: int) -> np.ndarray:
        """Render frame ``index`` as (3, S, S) float32, 0 to 1 (bilinear, antialiased where it shrinks)."""
        planes = {c: self._windowed(c, index) for c in sorted(set(self.channels))}
        resized = {c: resize(plane[None], (self.size, self.size))[0] for c, plane in planes.items()}
        return np.clip(np.stack([resized[c] for c in self.channels]), 0.0, 1.0)

    def plane(self, index: int) -> np.ndarray:
        """Return a slice's windowed intensities (0 to 1) on its own grid, the mean of what SAM 2 is shown, (H, W)."""
        return np.asarray(np.mean([self._windowed(channel, index) for channel in self.channels], axis=0), np.float32)

    def slices_first(self, array_zyx: np.ndarray) -> np.ndarray:
        """View an array on the volume's grid as (N, H, W)."""
        if array_zyx.shape != self.geometry.shape_zyx:
            raise ValueError(f"array has shape {array_zyx.shape}, the volume {self.geometry.shape_zyx}")
        return np.moveaxis(array_zyx, self.slice_axis, 0)

    def slices_back(self, array_knhw: np.ndarray) -> np.ndarray:
        """Turn maps on the slices, (K, N, H, W), into the volume's axis order, (K, Z, Y, X): undoes `slices_first`."""
        return np.ascontiguousarray(np.moveaxis(array_knhw, 1, self.slice_axis + 1))

    def masks_to_model(self, mask_zyx: np.ndarray) -> np.ndarray:
        """Resize a mask on the volume's grid to (N, S, S) bool; see `vanished_slices` for what gets lost."""
        mask_nhw = self.slices_first(np.asarray(mask_zyx, dtype=bool))
        out = np.zeros((len(self), self.size, self.size), dtype=bool)
        for index in np.flatnonzero(mask_nhw.any(axis=(1, 2))):
            plane = resize(mask_nhw[index][None].astype(np.float32), (self.size, self.size))[0]
            out[index] = plane >= MASK_THRESHOLD
        return out

    def vanished_slices(self, mask_zyx: np.ndarray, model_nss: np.ndarray | None = None) -> tuple[int, ...]:
        """Return the frames on which a mask has voxels but no pixel at model size.

        ``model_nss`` is the result of `masks_to_model` where the caller has it already.
        """
        before = self.slices_first(np.asarray(mask_zyx, dtype=bool)).any(axis=(1, 2))
        resized = self.masks_to_model(mask_zyx) if model_nss is None else model_nss
        return tuple(int(i) for i in np.flatnonzero(before & ~resized.any(axis=(1, 2))))

    def soft_cells(self, label_zyx: np.ndarray, values: Sequence[int], cell: int) -> np.ndarray:
        """Compute which part of each cell's area every label value covers: (N, K, S/cell, S/cell) float32, exact.

        ``cell`` is the side of a cell in model pixels, e.g. 16 for one location of the coarsest embedding.
        """
        if cell < 1 or self.size % cell:
            raise ValueError(f"cell {cell} does not divide the frame size {self.size}")
        grid = self.size // cell
        height, width = self.slice_shape_hw
        rows_gh, columns_gw = overlap_matrix(height, grid), overlap_matrix(width, grid)
        label_nhw = self.slices_first(label_zyx)
        out = np.zeros((len(self), len(values), grid, grid), dtype=np.float32)
        for k, value in enumerate(values):
            member_nhw = label_nhw == value
            for n in np.flatnonzero(member_nhw.any(axis=(1, 2))):
                out[n, k] = rows_gh @ member_nhw[n].astype(np.float32) @ columns_gw.T
        return out

    def to_volume(self, prob: np.ndarray | torch.Tensor | Iterable[np.ndarray | torch.Tensor]) -> np.ndarray:
        """Bring maps of the frames back to the volume's grid: (K, Z, Y, X) float32, bilinear.

        ``prob`` is (K, N, h, w) or yields (K, h, w) for each frame in order; h and w are any size that fills the
        frame.
        """
        import torch

        per_frame: Iterable[np.ndarray | torch.Tensor]
        if isinstance(prob, (np.ndarray, torch.Tensor)):
            if prob.ndim != 4 or prob.shape[1] != len(self):
                raise ValueError(f"maps must be (K, {len(self)}, h, w), got {tuple(prob.shape)}")
            per_frame = [prob[:, n] for n in range(len(self))]
        else:
            per_frame = prob
        out_knhw: np.ndarray | None = None
        count = 0
        for count, plane in enumerate(per_frame, start=1):
            plane_khw = _as_float32(plane)
            if out_knhw is None:
                out_knhw = np.zeros((plane_khw.shape[0], len(self), *self.slice_shape_hw), dtype=np.float32)
            if count > len(self):
                break
            out_knhw[:, count - 1] = resize(plane_khw, self.slice_shape_hw)
        if out_knhw is None or count != len(self):
            raise ValueError(f"the volume has {len(self)} frames, maps came for {count}")
        return self.slices_back(out_knhw)

    def _windowed(self, channel: int, index: int) -> np.ndarray:
        low, high = self.windows[channel]
        plane = np.asarray(self._array_cnhw[channel, index], dtype=np.float32)
        if high <= low:
            return np.zeros_like(plane)
        return np.asarray((np.clip(plane, low, high) - low) / np.float32(high - low), dtype=np.float32)


def default_channels(count: int) -> tuple[int, int, int]:
    """Return which of a volume's channels become red, green and blue: the first ones; of two, the first comes again."""
    return {1: (0, 0, 0), 2: (0, 1, 0)}.get(count, (0, 1, 2))


def _as_float32(plane: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(plane, np.ndarray):
        return plane.astype(np.float32, copy=False)
    return np.asarray(plane.detach().float().cpu().numpy())
