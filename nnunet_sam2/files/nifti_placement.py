"""Where a NIfTI header places its voxels: one placement, or a refusal, or what the user asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nnunet_sam2.errors import InputError
from nnunet_sam2.files.repairs import ReadPolicy, Repairs
from nnunet_sam2.geometry import Geometry

FORM_TOLERANCE_MM = 0.1
"""Distance of a volume's corners by qform and by sform above which the two contradict each other."""

SHEAR_TOLERANCE = 1e-4
"""Largest cosine between two axes that still counts as a right angle; ITK draws its line about here."""

MOST_DEGREES = 5.0
"""Largest turn of an axis by which axes are put at right angles; beyond it a volume needs resampling."""

_SIZE_TOLERANCE = 1e-3
"""Relative difference of the voxel size by sform and by pixdim above which they contradict each other."""

UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""Spatial part of xyzt_units: unknown, metre, millimetre, micrometre."""

_FLIP_XY = np.diag([-1.0, -1.0, 1.0])
"""From NIfTI's patient axes (right, anterior, superior) to SimpleITK's (left, posterior, superior)."""


def placement_of(path: Path, header: Any, shape: tuple[int, ...], policy: ReadPolicy) -> tuple[Geometry, Repairs]:
    """Return the grid in SimpleITK's axes and in mm, and what was mended in it."""
    forms = _forms(path, header)
    lengths = np.array((*shape, 1, 1)[:3], dtype=float)
    if not forms:
        # Neither is set: the voxel size alone, along SimpleITK's axes, as nnU-Net reads it.
        sizes = np.array([v if v > 0 else 1.0 for v in np.asarray(header["pixdim"][1:4], dtype=float)])
        return _geometry(shape, sizes * _unit(header), np.zeros(3), np.eye(3)), Repairs()
    affine, taken = _chosen_form(path, header, forms, lengths, policy)
    # The unit applies to the header's lengths; the origin is a length too.
    matrix, origin = _FLIP_XY @ affine[:3, :3] * _unit(header), _FLIP_XY @ affine[:3, 3] * _unit(header)
    spacing = np.linalg.norm(matrix, axis=0)
    direction = matrix / spacing
    if _shear(affine) > SHEAR_TOLERANCE:
        left, _, right = np.linalg.svd(direction)
        straight = left @ right
        angle = float(np.degrees(np.arccos(np.clip((direction * straight).sum(axis=0), -1, 1))).max())
        if not policy.fix_geometry or angle > MOST_DEGREES:
            way = (
                f"right angles are more than {MOST_DEGREES:g} degrees away: resample it onto a straight grid"
                if angle > MOST_DEGREES
                else "convert takes the nearest right angles with --fix-geometry, or resample it onto a straight grid"
            )
            raise InputError(
                f"{path} has sheared axes ({angle:.3g} degrees from right angles), which SimpleITK and nnU-Net cannot "
                f"hold; {way}"
            )
        # The middle of the volume stays where it is: so its corners move least.
        middle = (lengths - 1) / 2 * spacing
        before = np.eye(4)
        before[:3, :3], before[:3, 3] = direction * spacing, origin
        origin = origin + direction @ middle - straight @ middle
        after = np.eye(4)
        after[:3, :3], after[:3, 3] = straight * spacing, origin
        direction = straight
        taken |= {"angle_degrees": angle, "moved_mm": _corner_distance(before, after, lengths)}
    return _geometry(shape, spacing, origin, direction), Repairs(**taken)


def _geometry(shape: tuple[int, ...], spacing: np.ndarray, origin: np.ndarray, direction: np.ndarray) -> Geometry:
    x, y, z = (*shape, 1, 1)[:3]
    return Geometry(
        shape_zyx=(z, y, x),
        spacing_xyz_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        origin_xyz_mm=(float(origin[0]), float(origin[1]), float(origin[2])),
        direction=tuple(float(v) for v in direction.ravel()),
    )


def _chosen_form(
    path: Path, header: Any, forms: dict[str, np.ndarray], lengths: np.ndarray, policy: ReadPolicy
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the placement to believe; refuse two that contradict each other unless the policy names one."""
    if "sform" not in forms:
        return forms["qform"], {}
    sform = forms["sform"]
    sizes = np.array([v if v > 0 else 1.0 for v in np.asarray(header["pixdim"][1:4], dtype=float)])
    other = forms.get("qform", sform * np.array([*(sizes / np.linalg.norm(sform[:3, :3], axis=0)), 1.0]))
    difference = _corner_distance(sform, other, lengths) * _unit(header)
    if difference <= FORM_TOLERANCE_MM and np.allclose(
        np.linalg.norm(sform[:3, :3], axis=0), sizes, rtol=_SIZE_TOLERANCE, atol=0
    ):
        return (other if "qform" in forms and _shear(sform) > SHEAR_TOLERANCE else sform), {}
    if policy.form is None:
        what = (
            f"a qform and an sform that lie {difference:.3g} mm apart"
            if "qform" in forms
            else f"voxel size {_listed(sizes)} in pixdim and {_listed(np.linalg.norm(sform[:3, :3], axis=0))} in sform"
        )
        raise InputError(
            f"{path} has {what}, so that programs place it differently; write it anew, or say which one is right: "
            "convert takes --form sform or --form qform (pixdim goes with qform)"
        )
    return forms.get(policy.form, other), {"form": policy.form, "form_difference_mm": round(difference, 3)}


def _listed(sizes: np.ndarray) -> str:
    return " x ".join(f"{v:.4g}" for v in sizes)


def _forms(path: Path, header: Any) -> dict[str, np.ndarray]:
    """Return the header's placements that are set, checked: sform first, as it is believed where only it is there."""
    forms = {}
    for name, code in (("sform", "sform_code"), ("qform", "qform_code")):
        if int(header[code]) <= 0:
            continue
        try:
            affine = np.asarray(header.get_sform() if name == "sform" else header.get_qform(), dtype=float)
            sound = bool(np.isfinite(affine).all()) and abs(np.linalg.det(affine[:3, :3])) > 1e-12
        except Exception:  # a quaternion that is none
            sound = False
        if not sound:
            raise InputError(f"{path} has an {name} that is no placement in space; correct the header, or unset it")
        forms[name] = affine
    return forms


def _unit(header: Any) -> float:
    return UNIT_MM[int(header["xyzt_units"]) & 7]


def _shear(affine: np.ndarray) -> float:
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(cosines.T @ cosines - np.eye(3)).max())


def _corner_distance(one: np.ndarray, other: np.ndarray, lengths: np.ndarray) -> float:
    """Measure how far apart two affines put the corners of a volume."""
    corners = np.array([[i, j, k, 1.0] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    corners[:, :3] *= lengths - 1
    return float(np.linalg.norm((corners @ (one - other).T)[:, :3], axis=1).max())
