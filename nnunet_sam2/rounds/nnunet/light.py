"""A lighter network for the CPU: fewer features, a smaller patch, a small batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np

from nnunet_sam2.rounds.nnunet.base import resolved_configuration
from nnunet_sam2.trainers.settings import RoundSettings

FIRST_FEATURES, MOST_FEATURES = 16, 128
BATCH_3D = 2
LONGEST_SIDE_2D = 256
"""A slice of usual size is seen whole: what sees a part of it draws organs where others lie, far from any."""
PIXELS_2D, BATCHES_2D = 10 * 128 * 128, (4, 10)
MOST_VOXELS_3D = 128 * 1024
"""About 0.7 CPU-seconds a training step with two such patches; nnU-Net's own 3D patches take 10 times that."""

_MIN_FEATURE_MAP = 4
_NO_LIMIT = 999999


def light_configuration(plans: Mapping[str, Any], base_configuration: str) -> dict[str, Any]:
    """Return overrides of ``base_configuration`` with which it trains on a CPU.

    Features double from 16 to at most 128; 2D: patch of at most 256 x 256, in batches of 4 to 10 patches, about
    `PIXELS_2D`; 3D: patch of at most 128 Ki voxels, batch 2. A smaller patch gets the pooling that nnU-Net's planner
    would choose for it.
    """
    base = resolved_configuration(dict(plans), base_configuration)
    flat = len(base["patch_size"]) == 2
    architecture = deepcopy(base["architecture"])
    patch = list(base["patch_size"])
    small = _small_patch_2d(base) if flat else _small_patch_3d(base)
    if small != patch:
        _, strides, kernels, padded, _ = _topology(base["spacing"], small)
        patch = [int(n) for n in padded]
        _set_stages(architecture["arch_kwargs"], strides, kernels)
    kwargs = architecture["arch_kwargs"]
    kwargs["features_per_stage"] = [min(FIRST_FEATURES * 2**i, MOST_FEATURES) for i in range(kwargs["n_stages"])]
    batch = int(np.clip(round(PIXELS_2D / (patch[0] * patch[-1])), *BATCHES_2D)) if flat else BATCH_3D
    return {"patch_size": patch, "batch_size": batch, "architecture": architecture}


def light_settings(plans: Mapping[str, Any], base_configuration: str) -> RoundSettings:
    """Return the schedule that goes with `light_configuration`: 600 iterations in 3D, 400 in 2D.

    AdamW and no mirroring: in so few iterations, stochastic gradient descent with mirroring tells an organ from its
    surroundings but not its parts from each other.
    """
    flat = len(resolved_configuration(dict(plans), base_configuration)["patch_size"]) == 2
    return RoundSettings(
        num_epochs=10,
        num_iterations_per_epoch=40 if flat else 60,
        num_val_iterations_per_epoch=2,
        save_every=1,
        optimizer="adamw",
        initial_lr=1e-3,
        mirroring=False,
        cpu_precision="auto",
        sequential_validation=True,
    )


def _small_patch_2d(base: Mapping[str, Any]) -> list[int]:
    return [min(int(n), LONGEST_SIDE_2D) for n in base["patch_size"]]


def _small_patch_3d(base: Mapping[str, Any]) -> list[int]:
    """Shrink the axis that covers most of the median image until the patch is small, as nnU-Net's planner does."""
    patch = [int(n) for n in base["patch_size"]]
    median = base["median_image_size_in_voxels"]
    while patch[0] * patch[1] * patch[2] > MOST_VOXELS_3D:
        axis = max(range(3), key=lambda i: (patch[i] / median[i], i))
        step = int(_topology(base["spacing"], patch)[4][axis])
        shorter = list(patch)
        shorter[axis] -= step
        # A shorter side may need fewer poolings: then the step was longer than it has to be.
        patch[axis] -= int(_topology(base["spacing"], shorter)[4][axis])
        patch = [int(n) for n in _topology(base["spacing"], patch)[3]]
    return patch


def _topology(spacing: Sequence[float], patch: Sequence[int]) -> tuple[Any, ...]:
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    return tuple(get_pool_and_conv_props(spacing, patch, _MIN_FEATURE_MAP, _NO_LIMIT))


def _set_stages(kwargs: dict[str, Any], strides: Sequence[Any], kernels: Sequence[Any]) -> None:
    stages = len(strides)
    kwargs["n_stages"] = stages
    kwargs["strides"] = [list(map(int, s)) for s in strides]
    kwargs["kernel_sizes"] = [list(map(int, k)) for k in kernels]
    for name in ("n_conv_per_stage", "n_blocks_per_stage"):
        if isinstance(kwargs.get(name), (list, tuple)):
            kwargs[name] = list(kwargs[name])[:stages]
    if isinstance(kwargs.get("n_conv_per_stage_decoder"), (list, tuple)):
        kwargs["n_conv_per_stage_decoder"] = list(kwargs["n_conv_per_stage_decoder"])[: stages - 1]
