"""Labels by deformable registration of whole volumes, as users make them today, from the support that fits best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813

from nnunet_sam2.frames import Frames
from nnunet_sam2.support.cases import Query, Support

_POINTS = 64
"""Points along the longest side that registrations look at."""
_MESH = 8
"""Cells of the B-spline's control grid along each side."""


@dataclass(frozen=True, kw_only=True)
class _Fit:
    mismatch: float
    transform: Any
    support: Support


class DeformableBaseline:
    """Register every support to the query and take the labels of the one that is most like it then.

    SimpleITK: centres of mass, an affine map and cubic B-splines, all by Mattes' mutual information, coarse to fine.
    """

    def __init__(self, supports: Sequence[Support]) -> None:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        self._supports = [(support, _coarse(_volume(support.frames))) for support in supports]

    def label(self, query: Query) -> np.ndarray:
        """Return the query's label map on its own grid, (Z, Y, X) uint8."""
        whole = _volume(query.frames)
        fixed = _coarse(whole)
        fits = [_registered(fixed, moving, support) for support, moving in self._supports]
        best = min(fits, key=lambda fit: fit.mismatch)
        label = sitk.GetImageFromArray(best.support.frames.slices_first(best.support.label_zyx).astype(np.uint8))
        label.SetSpacing(_volume(best.support.frames).GetSpacing())
        moved = sitk.GetArrayFromImage(sitk.Resample(label, whole, best.transform, sitk.sitkNearestNeighbor, 0))
        return np.asarray(np.moveaxis(moved, 0, query.frames.slice_axis))


def _volume(frames: Frames) -> Any:
    image = sitk.GetImageFromArray(np.stack([frames.plane(n) for n in range(len(frames))]).astype(np.float32))
    along = frames.slice_axis
    spacing_zyx = list(frames.geometry.spacing_zyx_mm)
    image.SetSpacing([*[mm for axis, mm in enumerate(spacing_zyx) if axis != along][::-1], spacing_zyx[along]])
    return image


def _coarse(image: Any) -> Any:
    extent = np.array(image.GetSize()) * np.array(image.GetSpacing())
    spacing = np.maximum(extent.max() / _POINTS, image.GetSpacing())
    size = [int(n) for n in np.maximum(1, np.round(extent / spacing))]
    smooth = sitk.SmoothingRecursiveGaussian(image, [0.5 * float(mm) for mm in spacing])
    return sitk.Resample(
        smooth, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), [float(mm) for mm in spacing]
    )


def _method(start: Any, shrink: Sequence[int], smooth: Sequence[float]) -> Any:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(0.25)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel(list(shrink))
    method.SetSmoothingSigmasPerLevel(list(smooth))
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetInitialTransform(start, inPlace=True)
    return method


def _registered(fixed: Any, moving: Any, support: Support) -> _Fit:
    start = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.AffineTransform(3), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    affine = sitk.AffineTransform(start)
    method = _method(affine, [4, 2], [2, 1])
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0, minStep=1e-3, numberOfIterations=100, gradientMagnitudeTolerance=1e-6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.Execute(fixed, moving)
    spline = sitk.BSplineTransformInitializer(fixed, [min(_MESH, n) for n in fixed.GetSize()], order=3)
    method = _method(spline, [4, 2], [2, 1])
    method.SetMovingInitialTransform(affine)
    method.SetOptimizerAsLBFGSB(
        gradientConvergenceTolerance=1e-5, numberOfIterations=50, maximumNumberOfFunctionEvaluations=50
    )
    method.Execute(fixed, moving)
    # Transforms of a composite are applied from the last one to the first.
    return _Fit(
        mismatch=float(method.GetMetricValue()),
        transform=sitk.CompositeTransform([affine, spline]),
        support=support,
    )
