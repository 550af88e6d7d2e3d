"""How many bytes a stage writes, estimated before it starts, and the refusal where the disk has fewer."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_sam2.cohort.cohort import Case, Cohort
from nnunet_sam2.errors import StageError
from nnunet_sam2.geometry import choose_slice_axis, view_axes
from nnunet_sam2.machine import nearest_existing
from nnunet_sam2.orientation import turn_to

# Bytes a voxel of the image's own grid; above what runs on hippocampus, chaos_t2_mr and acdc wrote (label 0.02,
# confidence 0.8, a channel's probabilities 0.1) and above what untrained networks make (confidence 1.3, probabilities
# 0.9), which compresses worst.
LABEL, CONFIDENCE, PROBABILITY = 0.05, 1.5, 1.0
# Bytes a voxel of nnU-Net's preprocessed grid: float32 images hardly shrink, label maps and distrust do.
IMAGE, SEGMENTATION, DISTRUST = 4.0, 0.3, 0.5
LOCATIONS = 10_000 * 4 * 8
"""Bytes a case and class: nnU-Net keeps the coordinates of up to 10,000 voxels of each class."""

CHECKPOINTS = 3
"""Checkpoints of a training that lie on the disk at once: the best, the latest, and the one that is being written."""

TRAINING_EXTRAS = 4 * 2**20
"""Bytes of a training's log, plot and plans."""

EMBEDDING = 8
"""Bytes a pixel at model size: three feature maps in half precision (strides 4, 8, 16 with 32, 64, 256 channels)."""

LOOKS = {"auto": 3}
"""Times that a strategy encodes a slice at most: ``auto`` also takes close-ups with two margins."""

EMBEDDINGS_AT_MOST = 50 * 2**30
"""Bytes that `EmbeddingCache` keeps on disk."""

RESERVE = 64 * 2**20
"""Bytes that stay free: ledger, logs, the report, and what other programs write meanwhile."""

GPU_PARAMETERS, CPU_PARAMETERS = 102_000_000, 6_000_000
"""Weights of the network as long as there are no plans to count them in: nnU-Net's largest, and the light one."""

_FEATURES = "features_per_stage"


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """Hold the numbers that the bytes of a run's stages follow from."""

    labelled_voxels: int
    unlabelled_voxels: int
    held_out_voxels: int
    """Voxels of the fold's validation cases, which the student predicts as well."""
    labelled_cases: int
    unlabelled_cases: int
    slices: int
    """Slices of all labelled and unlabelled cases, along every axis that SAM 2 may look along."""
    channels: int
    classes: int
    growth: float = 1.0
    """Voxels of nnU-Net's preprocessed grid for one of the image's own."""
    parameters: int = GPU_PARAMETERS
    copies: int = 3
    """Values that a checkpoint holds for each weight: itself, what the optimizer keeps (SGD one, AdamW two), a mean."""
    soft_targets: bool = False


def run_size(
    cohort: Cohort,
    *,
    validation_ids: tuple[str, ...] = (),
    plans: Mapping[str, Any] | None = None,
    configuration: str = "",
    overrides: Mapping[str, Any] | None = None,
    light: bool = False,
    averaged: bool = False,
    soft_targets: bool = False,
) -> RunSize:
    """Measure a run; with nnU-Net's ``plans`` by its grid and network, before there are any by careful guesses.

    ``overrides`` are those of `light_configuration`, ``light`` says whether the network is the CPU profile's,
    ``averaged`` whether its weights are averaged, ``soft_targets`` whether the fused probabilities are learnt from.
    """
    cases = (*cohort.labelled, *cohort.unlabelled)
    growth, parameters = 1.0, CPU_PARAMETERS if light else GPU_PARAMETERS
    if plans is not None:
        entry = {**plans["configurations"][configuration], **(overrides or {})}
        own = sum(_voxels(case) for case in cases)
        growth = sum(_voxels(case) * _growth(case, entry.get("spacing", ())) for case in cases) / max(own, 1)
        parameters = count_parameters(entry.get("architecture", {}).get("arch_kwargs", {})) or parameters
    return RunSize(
        labelled_voxels=sum(_voxels(case) for case in cohort.labelled),
        unlabelled_voxels=sum(_voxels(case) for case in cohort.unlabelled),
        held_out_voxels=sum(_voxels(cohort.case(case_id)) for case_id in validation_ids),
        labelled_cases=len(cohort.labelled),
        unlabelled_cases=len(cohort.unlabelled),
        slices=sum(_slices(case) for case in cases),
        channels=len(cohort.channels),
        classes=len(cohort.class_values),
        growth=growth,
        parameters=parameters,
        copies=(3 if light else 2) + averaged,
        soft_targets=soft_targets,
    )


def stage_bytes(stage: str, size: RunSize) -> int:
    """Return how many bytes a stage leaves on the disk at most, by its name in the ledger (``r01/train``).

    What lies there only while the stage works counts as well. Embeddings, which are kept where there is room, do not:
    see `embedding_bytes`. A stage without files of its own needs none.
    """
    labels = LABEL + CONFIDENCE + PROBABILITY * (size.classes + 1)
    fused = labels if size.soft_targets else LABEL + CONFIDENCE
    maps = DISTRUST * (1 + size.classes * size.soft_targets)
    grid = size.growth * (size.labelled_voxels + size.unlabelled_voxels)
    cases = size.labelled_cases + size.unlabelled_cases
    needed = {
        "plan": grid * (IMAGE * size.channels + SEGMENTATION) + cases * size.classes * LOCATIONS,
        "sam2_quality": labels * size.labelled_voxels,
        "sam2": labels * size.unlabelled_voxels,
        "refine": labels * (size.unlabelled_voxels + size.held_out_voxels),
        "data": size.growth * size.unlabelled_voxels * (SEGMENTATION + maps)
        + size.unlabelled_cases * size.classes * LOCATIONS,
        "train": CHECKPOINTS * checkpoint_bytes(size) + TRAINING_EXTRAS + LABEL * size.held_out_voxels,
        "predict": (LABEL + PROBABILITY * (size.classes + 1)) * (size.unlabelled_voxels + size.held_out_voxels),
        "fuse": fused * size.unlabelled_voxels,
        "labels": fused * size.unlabelled_voxels,
    }
    return math.ceil(needed.get(stage.rsplit("/", 1)[-1], 0.0))


def checkpoint_bytes(size: RunSize) -> int:
    """Return the bytes of one nnU-Net checkpoint: float32 weights and what the optimizer keeps of each."""
    return 4 * size.parameters * size.copies


def embedding_bytes(size: RunSize, image_size: int, *, looks: int = 1) -> int:
    """Return the bytes of all slices' SAM 2 features as `EmbeddingCache` keeps them, up to its limit.

    ``looks`` is how often a strategy looks at a slice: once, or again from nearer (`LOOKS`).
    """
    return min(EMBEDDINGS_AT_MOST, looks * EMBEDDING * image_size**2 * size.slices)


def count_parameters(kwargs: Mapping[str, Any]) -> int:
    """Count the weights of nnU-Net's U-Net from the architecture in its plans; 0 where it is none that is known here.

    Convolutions only: norms and biases are a thousandth of them.
    """
    features, kernels = kwargs.get(_FEATURES), kwargs.get("kernel_sizes")
    if not features or not kernels:
        return 0
    down = kwargs.get("n_conv_per_stage") or kwargs.get("n_blocks_per_stage") or 2
    up = kwargs.get("n_conv_per_stage_decoder") or 2
    doubled = 2 if "n_blocks_per_stage" in kwargs else 1  # a residual block holds two convolutions
    total, before = 0, features[0]
    for stage, width in enumerate(features):
        repeats = doubled * (down if isinstance(down, int) else down[stage])
        total += math.prod(kernels[stage]) * width * (before + (repeats - 1) * width)
        before = width
    for stage in range(len(features) - 1):
        width, repeats = features[stage], up if isinstance(up, int) else up[stage]
        stride = kwargs["strides"][stage + 1] if kwargs.get("strides") else [2] * len(kernels[stage])
        total += math.prod([stride] if isinstance(stride, int) else stride) * features[stage + 1] * width
        total += math.prod(kernels[stage]) * width * (2 * width + (repeats - 1) * width)
    return total


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the file system that ``folder``, which need not exist yet, will lie on."""
    return shutil.disk_usage(nearest_existing(folder)).free


def require_room(folder: Path, needed: int, *, what: str) -> None:
    """Raise `StageError` where fewer than ``needed`` bytes and a reserve are free; nothing has been written then."""
    free = free_bytes(folder)
    if needed and free < needed + RESERVE:
        raise StageError(
            f"{what} writes up to {readable(needed)} and needs {readable(RESERVE)} to spare, but only {readable(free)} "
            f"are free where {folder} lies; make room and give the same command again (nothing of it was written)"
        )


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files under a folder, or of a file; 0 where there is none."""
    found = 0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):  # another process may remove what was just listed
            found += path.stat().st_size if path.is_file() else 0
    return found


def readable(count: float) -> str:
    """Write a number of bytes for people: ``1.5 GB``."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _voxels(case: Case) -> int:
    return math.prod(case.geometry.shape_zyx)


def _slices(case: Case) -> int:
    geometry = turn_to(case.geometry).geometry(case.geometry)
    return sum(geometry.shape_zyx[axis] for axis in view_axes(geometry, choose_slice_axis(geometry)))


def _growth(case: Case, target_mm: Any) -> float:
    """Return by how much nnU-Net's resampling multiplies a case's voxels; 2D resamples in the plane alone."""
    own = sorted(case.geometry.spacing_xyz_mm, reverse=True)
    if len(target_mm) == 2:
        own = own[1:]
    return math.prod(own) / math.prod(target_mm) if len(own) == len(target_mm) else 1.0
