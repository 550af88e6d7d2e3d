"""The lighter network and schedule of the CPU profile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nnunet_sam2.errors import InputError
from nnunet_sam2.rounds.nnunet.light import MOST_VOXELS_3D, light_configuration, light_settings


def plans(patch: list[int], spacing: list[float], median: list[float]) -> dict[str, Any]:
    """Make plans as nnU-Net's planner would for this patch size."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    _, strides, kernels, padded, _ = get_pool_and_conv_props(spacing, patch, 4, 999999)
    stages = len(strides)
    dimensions = len(patch)
    arguments = {
        "n_stages": stages,
        "features_per_stage": [min(32 * 2**i, 320) for i in range(stages)],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": [list(k) for k in kernels],
        "strides": [list(s) for s in strides],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    configuration = {
        "batch_size": 27,
        "patch_size": [int(n) for n in padded],
        "spacing": spacing,
        "median_image_size_in_voxels": median,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": arguments,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return {"dataset_name": "Dataset001_A", "configurations": {"base": configuration}}


def forward(overrides: dict[str, Any]) -> tuple[int, ...]:
    """Run the network once on one patch and return the shape of its answer."""
    import torch
    from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    architecture = overrides["architecture"]
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        3,
        deep_supervision=False,
    )
    assert any(isinstance(m, convert_dim_to_conv_op(len(overrides["patch_size"]))) for m in network.modules())
    with torch.inference_mode():
        return tuple(network(torch.zeros(1, 1, *overrides["patch_size"])).shape)


def test_a_small_3d_patch_is_kept_with_fewer_features_and_batch_two() -> None:
    made = plans([40, 56, 40], [1.0, 1.0, 1.0], [36.0, 50.0, 35.0])
    light = light_configuration(made, "base")
    assert light["patch_size"] == [40, 56, 40]
    assert light["batch_size"] == 2
    assert light["architecture"]["arch_kwargs"]["features_per_stage"] == [16, 32, 64, 128]
    assert made["configurations"]["base"]["architecture"]["arch_kwargs"]["features_per_stage"][0] == 32


@pytest.mark.parametrize(
    ("patch", "spacing", "median"),
    [
        ([128, 128, 128], [1.0, 1.0, 1.0], [300.0, 250.0, 250.0]),
        ([36, 224, 256], [7.7, 1.25, 1.25], [36.0, 256.0, 256.0]),
        ([16, 320, 320], [8.0, 0.6, 0.6], [20.0, 320.0, 320.0]),
    ],
)
def test_a_large_3d_patch_shrinks_and_its_network_still_fits(
    patch: list[int], spacing: list[float], median: list[float]
) -> None:
    light = light_configuration(plans(patch, spacing, median), "base")
    assert np.prod(light["patch_size"]) <= MOST_VOXELS_3D
    assert np.prod(light["patch_size"]) > MOST_VOXELS_3D / 4
    assert forward(light) == (1, 3, *light["patch_size"])


@pytest.mark.parametrize(
    ("planned", "patch", "batch"),
    [([960, 96], [256, 96], 7), ([256, 224], [256, 224], 4), ([64, 64], [64, 64], 10)],
)
def test_a_2d_patch_has_at_most_256_pixels_a_side_and_its_batch_about_as_many_pixels(
    planned: list[int], patch: list[int], batch: int
) -> None:
    light = light_configuration(plans(planned, [1.0, 1.0], [float(n) for n in planned]), "base")
    assert (light["patch_size"], light["batch_size"]) == (patch, batch)
    assert forward(light) == (1, 3, *patch)


def test_the_light_schedule_is_600_iterations_in_3d_and_400_in_2d() -> None:
    solid = light_settings(plans([40, 56, 40], [1.0, 1.0, 1.0], [36.0, 50.0, 35.0]), "base")
    flat = light_settings(plans([128, 128], [1.0, 1.0], [128.0, 128.0]), "base")
    assert solid.num_epochs * solid.num_iterations_per_epoch == 600
    assert flat.num_epochs * flat.num_iterations_per_epoch == 400
    assert (solid.optimizer, solid.initial_lr, solid.mirroring) == ("adamw", 1e-3, False)


def test_an_unknown_configuration_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match="no 3d_lowres, only: base"):
        light_configuration(plans([40, 56, 40], [1.0, 1.0, 1.0], [36.0, 50.0, 35.0]), "3d_lowres")
