"""Random anatomies, and subjects that are deformations of one: label volumes made of implicit shapes.

Coordinates run from -1 to 1 along (z, y, x) of the anatomy's own space; a view says which part of it a volume shows.
The idea of training on label volumes drawn at random, deformed and painted is SynthSeg's and SynthMorph's
(arXiv 2107.09559, 2004.10282); the shapes here are the project's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

BACKGROUND = 0
_WAVES = 3
"""Plane waves that roughen a surface."""
_DISPLACEMENT_GRID = (4, 5, 5)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """Hold an ellipsoid whose surface is roughened by plane waves; very long radii make it a tube or a slab."""

    label: int
    centre_zyx: np.ndarray
    radii_zyx: np.ndarray
    axes_33: np.ndarray
    """Rows are the directions of the radii."""
    waves_w3: np.ndarray
    phases_w: np.ndarray
    roughness: float
    wander_yx: np.ndarray
    """How far the centre moves in the plane along z, as the amplitude of a half wave."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Anatomy:
    """Hold shapes in painting order: a later one covers those before it."""

    shapes: tuple[Shape, ...]
    partition_w3: np.ndarray | None
    """Waves of a field whose level sets divide the body into tissues, or None."""
    partition_labels: tuple[int, ...]
    n_labels: int
    view_centre_zyx: np.ndarray
    view_half_zyx: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """Hold one individual of an anatomy: its own shapes, smooth displacement and view."""

    anatomy: Anatomy
    displacement_3zyx: np.ndarray
    view_centre_zyx: np.ndarray
    view_half_zyx: np.ndarray
    tilt_33: np.ndarray


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw an anatomy with 6 to 30 structures: organs, pairs, rinds with cores, tubes, layers, tissue of no shape."""
    shapes: list[Shape] = []
    label = 0
    has_body = rng.random() < 0.75
    if has_body:
        label += 1
        body = _ellipsoid(rng, label, centre=np.zeros(3), radii=np.array([4.0, *rng.uniform(0.6, 1.0, 2)]), rough=0.05)
        shapes.append(body)
        if rng.random() < 0.6:
            label += 1
            shapes.append(replace(body, label=label, radii_zyx=body.radii_zyx * rng.uniform(0.8, 0.95)))
    partition, partition_labels = None, ()
    if rng.random() < 0.5:
        count = int(rng.integers(2, 6))
        partition_labels = tuple(range(label + 1, label + 1 + count))
        label += count
        partition = rng.normal(0, rng.uniform(1.5, 5.0), (4, 3))
    for _ in range(int(rng.integers(5, 16))):
        kind = rng.choice(["organ", "pair", "rind", "tube", "tiny"], p=[0.35, 0.2, 0.2, 0.15, 0.1])
        centre = rng.uniform([-0.8, -0.65, -0.65], [0.8, 0.65, 0.65])
        size = float(np.exp(rng.uniform(np.log(0.1), np.log(0.5))))
        radii = size * np.exp(rng.normal(0, 0.25, 3))
        label += 1
        if kind == "tube":
            radii = np.array([rng.choice([0.6, 6.0]), *np.full(2, rng.uniform(0.04, 0.15)) * rng.uniform(0.8, 1.3, 2)])
            shapes.append(
                replace(_ellipsoid(rng, label, centre=centre, radii=radii, rough=0.0), wander_yx=rng.normal(0, 0.12, 2))
            )
        elif kind == "tiny":
            shapes.append(_ellipsoid(rng, label, centre=centre, radii=radii * 0.0 + rng.uniform(0.03, 0.09), rough=0.2))
        else:
            organ = _ellipsoid(rng, label, centre=centre, radii=radii, rough=rng.uniform(0.0, 0.45))
            shapes.append(organ)
            if kind == "rind":
                label += 1
                shift = rng.normal(0, 0.08, 3) * radii
                shapes.append(
                    replace(organ, label=label, radii_zyx=radii * rng.uniform(0.45, 0.85), centre_zyx=centre + shift)
                )
            if kind == "pair":
                # The two sides of a body are two structures: a label must not jump across.
                label += 1
                mirror = np.array([1.0, 1.0, -1.0])
                shapes.append(
                    replace(
                        organ,
                        label=label,
                        centre_zyx=centre * mirror,
                        axes_33=organ.axes_33 * mirror,
                        waves_w3=organ.waves_w3 * mirror,
                    )
                )
    half = np.array([1.0, 1.0, 1.0])
    middle = np.zeros(3)
    if rng.random() < 0.55:
        target = shapes[int(rng.integers(1 if has_body else 0, len(shapes)))]
        middle = np.clip(target.centre_zyx, -0.7, 0.7) + rng.normal(0, 0.1, 3)
        half = np.exp(rng.uniform(np.log(0.25), np.log(0.9))) * np.exp(rng.normal(0, 0.15, 3))
    return Anatomy(
        shapes=tuple(shapes),
        partition_w3=partition,
        partition_labels=partition_labels,
        n_labels=label + 1,
        view_centre_zyx=middle,
        view_half_zyx=half,
    )


def draw_subject(anatomy: Anatomy, rng: np.random.Generator) -> Subject:
    """Draw an individual: every structure moved, scaled and reshaped, all of them displaced, the view shifted."""
    spread = rng.uniform(0.3, 1.3)
    zoom = anatomy.view_half_zyx
    shapes = []
    for shape in anatomy.shapes:
        if len(shapes) > 2 and rng.random() < 0.03:
            continue
        shapes.append(
            replace(
                shape,
                centre_zyx=shape.centre_zyx + rng.normal(0, 0.05 * spread, 3) * np.sqrt(zoom),
                radii_zyx=shape.radii_zyx * np.exp(rng.normal(0, 0.06 * spread) + rng.normal(0, 0.08 * spread, 3)),
                phases_w=shape.phases_w + rng.normal(0, 0.5 * spread, _WAVES),
            )
        )
    angle = rng.normal(0, 0.06 * spread)
    tilt = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    return Subject(
        anatomy=replace(anatomy, shapes=tuple(shapes)),
        displacement_3zyx=rng.normal(0, 0.07 * spread, (3, *_DISPLACEMENT_GRID)) * zoom[:, None, None, None],
        view_centre_zyx=anatomy.view_centre_zyx + rng.normal(0, 0.07 * spread, 3) * zoom,
        view_half_zyx=zoom * np.exp(rng.normal(0, 0.07 * spread, 3)),
        tilt_33=tilt,
    )


def render_labels(subject: Subject, shape_zyx: tuple[int, int, int]) -> np.ndarray:
    """Render a subject's label volume, (Z, Y, X) uint8, over the whole of its view."""
    points_3zyx = _points(subject, shape_zyx)
    anatomy = subject.anatomy
    labels_zyx = np.zeros(shape_zyx, np.uint8)
    for number, shape in enumerate(anatomy.shapes):
        labels_zyx[_inside(shape, points_3zyx)] = shape.label
        if number == 0 and anatomy.partition_w3 is not None:
            tissue = _partition(anatomy, points_3zyx)
            everywhere = anatomy.shapes[0].radii_zyx[0] < 2.0
            where = np.ones(shape_zyx, bool) if everywhere else labels_zyx > 0
            labels_zyx[where] = tissue[where]
    return labels_zyx


def _points(subject: Subject, shape_zyx: tuple[int, int, int]) -> np.ndarray:
    lines = [(np.arange(n) + 0.5) / n * 2 - 1 if n > 1 else np.zeros(1) for n in shape_zyx]
    grid = np.stack(np.meshgrid(*lines, indexing="ij")).astype(np.float32)
    moved = np.einsum("ij,jzyx->izyx", subject.tilt_33.astype(np.float32), grid, optimize=True)
    scaled = moved * subject.view_half_zyx[:, None, None, None].astype(np.float32)
    # The displacement is read where the voxel lies, so that thick slices cut the same smooth field.
    index = [(line + 1) / 2 * (n - 1) for line, n in zip(lines, _DISPLACEMENT_GRID, strict=True)]
    where = np.stack(np.meshgrid(*index, indexing="ij"))
    coarse = 2 if min(shape_zyx[1:]) >= 64 else 1
    near = where[:, :, ::coarse, ::coarse]
    out = np.empty_like(grid)
    for axis, component in enumerate(subject.displacement_3zyx):
        field = ndimage.map_coordinates(component, near, order=3, mode="nearest", output=np.float32)
        if coarse > 1:
            field = field.repeat(coarse, 1).repeat(coarse, 2)[:, : shape_zyx[1], : shape_zyx[2]]
            field = ndimage.uniform_filter(field, size=(1, 3, 3), mode="nearest")
        out[axis] = scaled[axis] + field + subject.view_centre_zyx[axis]
    return out


def _inside(shape: Shape, points_3zyx: np.ndarray) -> np.ndarray:
    z, y, x = (points_3zyx[axis] - np.float32(shape.centre_zyx[axis]) for axis in range(3))
    if shape.wander_yx.any():
        bend = np.sin(z * np.float32(np.pi))
        y, x = y - bend * np.float32(shape.wander_yx[0]), x - bend * np.float32(shape.wander_yx[1])
    scaled = (shape.axes_33 / shape.radii_zyx[:, None]).astype(np.float32)
    distance = np.zeros_like(z)
    for a, b, c in scaled:
        distance += (a * z + b * y + c * x) ** 2
    if shape.roughness:
        # Only the neighbourhood of the surface needs the waves.
        near = distance < (1 + shape.roughness) * 1.5
        wave = np.zeros(int(near.sum()), np.float32)
        for (a, b, c), phase in zip(shape.waves_w3.astype(np.float32), shape.phases_w.astype(np.float32), strict=True):
            wave += np.sin(a * z[near] + b * y[near] + c * x[near] + phase)
        distance[near] += np.float32(shape.roughness / _WAVES * 1.5) * wave
    return np.asarray(distance < 1)


def _partition(anatomy: Anatomy, points_3zyx: np.ndarray) -> np.ndarray:
    if anatomy.partition_w3 is None:
        raise ValueError("an anatomy without a partition")
    z, y, x = points_3zyx
    field = np.zeros_like(z)
    for number, (a, b, c) in enumerate(anatomy.partition_w3.astype(np.float32)):
        field += np.sin(a * z + b * y + c * x + np.float32(number * 1.7))
    count = len(anatomy.partition_labels)
    level = np.clip(((field + 2.5) / 5.0 * count).astype(np.int64), 0, count - 1)
    return np.asarray(anatomy.partition_labels, np.uint8)[level]


def _ellipsoid(rng: np.random.Generator, label: int, *, centre: np.ndarray, radii: np.ndarray, rough: float) -> Shape:
    turn = rng.normal(0, 1, (3, 3))
    axes, _ = np.linalg.qr(turn)
    if radii.max() > 0.55:
        # Long shapes run along z, as bodies and great vessels do.
        angle = rng.uniform(0, 2 * np.pi)
        axes = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    size = float(np.min(radii))
    return Shape(
        label=label,
        centre_zyx=np.asarray(centre, float),
        radii_zyx=np.asarray(radii, float),
        axes_33=axes,
        waves_w3=rng.normal(0, 2.2 / max(size, 0.05), (_WAVES, 3)),
        phases_w=rng.uniform(0, 2 * np.pi, _WAVES),
        roughness=float(rough),
        wander_yx=np.zeros(2),
    )
