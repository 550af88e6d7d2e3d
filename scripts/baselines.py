"""Labels without learning: the mask of the support slice that looks most like the query's, as it is or registered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nnunet_sam2.frames import Frames
from nnunet_sam2.planes import resize
from nnunet_sam2.support.cases import Query, Support

SIZE = 128
"""Side of the square at which slices are compared."""


class NoEmbeddings:
    """Stand for the embeddings of a case that only baselines look at: they read none."""

    key = "none"

    def __len__(self) -> int:
        return 0

    def top(self, index: int) -> torch.Tensor:
        """Refuse."""
        raise RuntimeError("a baseline read an embedding")

    def high(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse."""
        raise RuntimeError("a baseline read an embedding")


class CopyBaseline:
    """Label each query slice with the labels of the best-matching support slice, by normalised correlation.

    With ``registered`` the support slice is first brought onto the query's by an affine map (SimpleITK, correlation).
    """

    def __init__(self, supports: Sequence[Support], *, registered: bool) -> None:
        self._registered = registered
        self._images = np.concatenate([_slices(support.frames) for support in supports])
        self._unit = _unit(self._images)
        self._labels = np.concatenate(
            [
                [_nearest(plane, (SIZE, SIZE)) for plane in support.frames.slices_first(support.label_zyx)]
                for support in supports
            ]
        )

    def label(self, query: Query) -> np.ndarray:
        """Return the query's label map on its own grid, (Z, Y, X) uint8."""
        images = _slices(query.frames)
        best = (_unit(images) @ self._unit.T).argmax(axis=1)
        planes = []
        for image, match in zip(images, best, strict=True):
            label = self._labels[match]
            if self._registered and label.any():
                label = _moved(image, self._images[match], label)
            planes.append(_nearest(label, query.frames.slice_shape_hw))
        return np.asarray(np.moveaxis(np.stack(planes), 0, query.frames.slice_axis))


def _slices(frames: Frames) -> np.ndarray:
    # The first channel alone: a match needs no colour.
    return np.concatenate([resize(frames.image(n)[:1], (SIZE, SIZE)) for n in range(len(frames))])


def _unit(images_nss: np.ndarray) -> np.ndarray:
    rows = images_nss.reshape(len(images_nss), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6))


def _nearest(plane_hw: np.ndarray, shape_hw: tuple[int, int]) -> np.ndarray:
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(plane_hw.shape, shape_hw, strict=True)
    )
    return np.asarray(plane_hw[rows][:, columns], dtype=np.uint8)


def _moved(fixed_ss: np.ndarray, moving_ss: np.ndarray, label_ss: np.ndarray) -> np.ndarray:
    import SimpleITK as sitk  # noqa: N813

    fixed, moving = sitk.GetImageFromArray(fixed_ss), sitk.GetImageFromArray(moving_ss)
    start = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.AffineTransform(2), sitk.CenteredTransformInitializerFilter.GEOMETRY
    )
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0, minStep=1e-3, numberOfIterations=60, gradientMagnitudeTolerance=1e-6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2])
    method.SetSmoothingSigmasPerLevel([2, 1])
    method.SetInitialTransform(start, inPlace=False)
    try:
        transform = method.Execute(fixed, moving)
    except RuntimeError:
        # A flat slice gives no gradient to follow: the copy stays where it is.
        return label_ss
    moved = sitk.Resample(sitk.GetImageFromArray(label_ss), fixed, transform, sitk.sitkNearestNeighbor, 0)
    return np.asarray(sitk.GetArrayFromImage(moved), dtype=np.uint8)
