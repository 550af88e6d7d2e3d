"""A generated 3D cohort of abdomen-like volumes, for the demo and the tests: real enough to be hard.

Two organs (a large lobed one, a bean with a rind) lie in a body with fat, muscle, spine, vessels and bowel-like blobs
of the organs' own intensities. Subjects differ in anatomy (size, place, smooth deformation), in contrast (tissue
intensities, gamma) and in acquisition (spacing, bias field, Rician noise).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from nnunet_sam2.cohort.cohort import HIDDEN_LABELS
from nnunet_sam2.errors import InputError
from nnunet_sam2.geometry import Geometry
from nnunet_sam2.storage import atomic_folder, write_json
from nnunet_sam2.volumes import write_image, write_label

DEFAULT_SHAPE_ZYX = (24, 64, 64)
LARGE_ORGAN, SMALL_ORGAN = 1, 2
LABELS = {"background": 0, "large_organ": LARGE_ORGAN, "small_organ": SMALL_ORGAN}

_FIELD_OF_VIEW_ZYX_MM = (96.0, 112.0, 112.0)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Hold everything drawn for one subject; coordinates run from -1 to 1 along (z, y, x)."""

    spacing_zyx_mm: tuple[float, float, float]
    body_radii_yx: tuple[float, float]
    large_centre_zyx: tuple[float, float, float]
    large_radii_zyx: tuple[float, float, float]
    lobe_shift_zyx: tuple[float, float, float]
    lobe_scale: float
    small_centre_zyx: tuple[float, float, float]
    small_radii_zyx: tuple[float, float, float]
    small_tilt: float
    blobs_zyxr: tuple[tuple[float, float, float, float], ...]
    """Distractors: centre and radius each."""
    blob_tissues: tuple[float, ...]
    """Each distractor's place between muscle (0) and the bean's rind (1) in intensity."""
    tissue: dict[str, float]
    """Mean intensity of each tissue before gamma, 0 to 1."""
    gamma: float
    scale: float
    bias_strength: float
    noise: float
    texture: float
    deformation: float
    field_seed: int


def draw_subject(rng: np.random.Generator, *, shape_zyx: tuple[int, int, int] = DEFAULT_SHAPE_ZYX) -> Subject:
    """Draw one subject's anatomy, contrast and acquisition."""

    def around(centre: Sequence[float], spread: float) -> tuple[float, float, float]:
        z, y, x = (float(c + spread * rng.uniform(-1, 1)) for c in centre)
        return z, y, x

    def scaled(radii: Sequence[float], spread: float) -> tuple[float, float, float]:
        common = 1 + spread * rng.uniform(-1, 1)
        z, y, x = (float(r * common * (1 + 0.6 * spread * rng.uniform(-1, 1))) for r in radii)
        return z, y, x

    size = 1 + 0.08 * rng.uniform(-1, 1)
    spacing = [round(float(size * f / n), 3) for f, n in zip(_FIELD_OF_VIEW_ZYX_MM, shape_zyx, strict=True)]
    muscle = rng.uniform(0.26, 0.38)
    large = muscle + rng.uniform(0.10, 0.20)
    rind = large + rng.uniform(0.12, 0.24)
    blob_count = int(rng.integers(9, 14))
    blobs: list[tuple[float, float, float, float]] = []
    while len(blobs) < blob_count:
        z, y, x = rng.uniform(-0.9, 0.9), rng.uniform(-0.55, 0.55), rng.uniform(-0.75, 0.75)
        blobs.append((float(z), float(y), float(x), float(rng.uniform(0.07, 0.19))))
    return Subject(
        spacing_zyx_mm=(spacing[0], spacing[1], spacing[2]),
        body_radii_yx=(float(rng.uniform(0.70, 0.84)), float(rng.uniform(0.84, 0.95))),
        large_centre_zyx=around((-0.15, -0.12, -0.38), 0.09),
        large_radii_zyx=scaled((0.66, 0.42, 0.36), 0.16),
        lobe_shift_zyx=around((-0.15, -0.22, 0.30), 0.08),
        lobe_scale=float(rng.uniform(0.45, 0.70)),
        small_centre_zyx=around((0.18, 0.26, 0.36), 0.08),
        small_radii_zyx=scaled((0.50, 0.22, 0.17), 0.18),
        small_tilt=float(rng.uniform(0.1, 0.7)),
        blobs_zyxr=tuple(blobs),
        blob_tissues=tuple(float(v) for v in rng.uniform(0.1, 1.05, blob_count)),
        tissue={
            "air": 0.02,
            "fat": float(rng.uniform(0.55, 0.95)),
            "muscle": float(muscle),
            "large": float(large),
            "rind": float(rind),
            "core": float(large + rng.uniform(-0.02, 0.10)),
            "spine": float(rng.uniform(0.12, 0.75)),
            "vessel": float(rng.uniform(0.10, 0.95)),
        },
        gamma=float(rng.uniform(0.75, 1.3)),
        scale=float(rng.uniform(400, 1400)),
        bias_strength=float(rng.uniform(0.12, 0.30)),
        noise=float(rng.uniform(0.025, 0.045)),
        texture=float(rng.uniform(0.02, 0.04)),
        deformation=float(rng.uniform(0.06, 0.10)),
        field_seed=int(rng.integers(2**31)),
    )


def render(subject: Subject, *, shape_zyx: tuple[int, int, int] = DEFAULT_SHAPE_ZYX) -> tuple[np.ndarray, np.ndarray]:
    """Render a subject as image (int16) and label map (uint8), both (Z, Y, X)."""
    rng = np.random.default_rng(subject.field_seed)
    axes = [np.linspace(-1, 1, n) for n in shape_zyx]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    shift = np.stack([_smooth_field(rng, shape_zyx, 0.30) for _ in range(3)])
    z, y, x = grid + subject.deformation * shift
    tissue = subject.tissue

    body = _ellipse(y, x, subject.body_radii_yx)
    inner = _ellipse(y, x, (subject.body_radii_yx[0] - 0.12, subject.body_radii_yx[1] - 0.10))
    large = _large_organ(subject, z, y, x) & (inner < 1)
    bean, depth = _small_organ(subject, z, y, x)
    bean &= inner < 1
    large &= ~bean

    image = np.full(shape_zyx, tissue["air"])
    image[body < 1] = tissue["fat"]
    image[inner < 1] = tissue["muscle"]
    for (bz, by, bx, radius), mix in zip(subject.blobs_zyxr, subject.blob_tissues, strict=True):
        blob = ((z - bz) / (1.6 * radius)) ** 2 + ((y - by) / radius) ** 2 + ((x - bx) / radius) ** 2 < 1
        image[blob & (inner < 1)] = tissue["muscle"] + mix * (tissue["rind"] - tissue["muscle"])
    spine = ((y - 0.48) / 0.17) ** 2 + (x / 0.19) ** 2 < 1
    image[spine] = tissue["spine"]
    image[((y - 0.48) / 0.05) ** 2 + (x / 0.06) ** 2 < 1] = tissue["fat"]
    vessel = ((y - 0.20 - 0.05 * np.sin(3 * z)) / 0.07) ** 2 + ((x + 0.06) / 0.07) ** 2 < 1
    image[vessel] = tissue["vessel"]
    image[large] = tissue["large"]
    inside_vessel = ((y + 0.10 + 0.25 * z) / 0.05) ** 2 + ((x + 0.35 + 0.15 * y) / 0.05) ** 2 < 1
    image[large & inside_vessel] = 0.5 * (tissue["vessel"] + tissue["large"])
    image[bean] = tissue["rind"]
    image[bean & (depth < 0.45)] = tissue["core"]

    # Half a voxel of blur is the partial volume effect at borders.
    image = ndimage.gaussian_filter(image, (0.4, 0.6, 0.6))
    texture = ndimage.gaussian_filter(rng.standard_normal(shape_zyx), (0.5, 1.2, 1.2))
    image = image * (1 + subject.texture * texture / texture.std())
    image = np.clip(image, 0, None) ** subject.gamma
    image = image * np.exp(subject.bias_strength * _smooth_field(rng, shape_zyx, 0.5))
    real, imaginary = subject.noise * rng.standard_normal((2, *shape_zyx))
    image = np.hypot(image + real, imaginary) * subject.scale

    label = np.zeros(shape_zyx, np.uint8)
    label[large] = LARGE_ORGAN
    label[bean] = SMALL_ORGAN
    return np.rint(np.clip(image, 0, np.iinfo(np.int16).max)).astype(np.int16), label


def write_generated_cohort(
    folder: Path,
    *,
    seed: int = 0,
    n_labelled: int = 3,
    n_unlabelled: int = 8,
    n_test: int = 4,
    shape_zyx: tuple[int, int, int] = DEFAULT_SHAPE_ZYX,
) -> Path:
    """Write a cohort in the ``folder`` layout and return ``folder``.

    ``images/`` and ``labels/`` hold the subjects, ``labelsHidden/`` the truth of the unlabelled ones (for scoring raw
    labels, nothing else reads it), ``test/`` the test subjects. The same arguments give the same bytes.
    """
    if n_labelled < 1 or n_unlabelled < 0 or n_test < 0:
        raise InputError("a generated cohort needs at least 1 labelled case and no negative numbers")
    if min(shape_zyx) < 8:
        raise InputError(f"a generated volume needs at least 8 voxels along each axis, got {shape_zyx}")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; name a new folder for the generated cohort")
    with atomic_folder(folder) as temporary:
        for index in range(n_labelled + n_unlabelled + n_test):
            # A subject depends on the seed and its number alone, not on how many there are of each role.
            subject = draw_subject(np.random.default_rng([seed, index]), shape_zyx=shape_zyx)
            image, label = render(subject, shape_zyx=shape_zyx)
            dz, dy, dx = subject.spacing_zyx_mm
            geometry = Geometry(shape_zyx=shape_zyx, spacing_xyz_mm=(dx, dy, dz), origin_xyz_mm=(-dx * 32, -dy * 32, 0))
            test = index >= n_labelled + n_unlabelled
            base = temporary / "test" if test else temporary
            labels = "labels" if test or index < n_labelled else HIDDEN_LABELS
            name = f"subject_{index:03d}.nii.gz"
            write_image(base / "images" / name, image[None], geometry)
            write_label(base / labels / name, label, geometry)
        write_json(temporary / "dataset.json", {"channel_names": {"0": "MR"}, "labels": LABELS})
    return folder


def _ellipse(y: np.ndarray, x: np.ndarray, radii_yx: tuple[float, float]) -> np.ndarray:
    return np.abs(y / radii_yx[0]) ** 2.4 + np.abs(x / radii_yx[1]) ** 2.4


def _large_organ(subject: Subject, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    (cz, cy, cx), (rz, ry, rx) = subject.large_centre_zyx, subject.large_radii_zyx
    main = ((z - cz) / rz) ** 2 + ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2
    (sz, sy, sx), scale = subject.lobe_shift_zyx, subject.lobe_scale
    lobe = ((z - cz - sz) / (rz * scale)) ** 2 + ((y - cy - sy) / (ry * scale)) ** 2 + ((x - cx - sx) / rx) ** 2
    notch = ((z - cz) / rz) ** 2 + ((y - cy - 0.9 * ry) / (0.45 * ry)) ** 2 + ((x - cx - 0.7 * rx) / (0.8 * rx)) ** 2
    return ((main < 1) | (lobe < 1)) & (notch > 1)


def _small_organ(subject: Subject, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bean and, at each voxel, how deep it lies: 0 in the middle, 1 at the rind's outside."""
    (cz, cy, cx), (rz, ry, rx) = subject.small_centre_zyx, subject.small_radii_zyx
    tilt = subject.small_tilt
    v, u = y - cy, x - cx
    v, u = v * np.cos(tilt) - u * np.sin(tilt), v * np.sin(tilt) + u * np.cos(tilt)
    u = u + 0.12 * ((z - cz) / rz) ** 2
    depth = ((z - cz) / rz) ** 2 + (v / ry) ** 2 + (u / rx) ** 2
    hilum = ((z - cz) / (0.40 * rz)) ** 2 + (v / (0.45 * ry)) ** 2 + ((u + 0.95 * rx) / (0.55 * rx)) ** 2
    return (depth < 1) & (hilum > 1), depth


def _smooth_field(rng: np.random.Generator, shape_zyx: tuple[int, int, int], width: float) -> np.ndarray:
    """Draw a smooth field with standard deviation 1; ``width`` is a fraction of half the field of view."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape_zyx), [width * n / 2 for n in shape_zyx], mode="nearest")
    field -= field.mean()
    return np.asarray(field / field.std())


def main() -> None:
    """Write a generated cohort: ``python -m nnunet_sam2.cohort.generated FOLDER``."""
    parser = argparse.ArgumentParser(prog="python -m nnunet_sam2.cohort.generated", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labelled", type=int, default=3)
    parser.add_argument("--unlabelled", type=int, default=8)
    parser.add_argument("--test", type=int, default=4)
    parser.add_argument("--shape", type=int, nargs=3, default=DEFAULT_SHAPE_ZYX, metavar=("Z", "Y", "X"))
    args = parser.parse_args()
    try:
        write_generated_cohort(
            args.folder,
            seed=args.seed,
            n_labelled=args.labelled,
            n_unlabelled=args.unlabelled,
            n_test=args.test,
            shape_zyx=tuple(args.shape),
        )
    except InputError as error:
        raise SystemExit(f"{error}") from None


if __name__ == "__main__":
    main()
