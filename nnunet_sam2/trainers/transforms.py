"""Distrust maps through nnU-Net's augmentation: moved with the image, left alone by what changes intensities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms


class TakeDistrustOut(BasicTransform):
    """Make the image's last channel a regression target, which spatial transforms move and all others leave."""

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Split ``image`` (channels first) into ``image`` and ``regression_target``."""
        data_dict["image"], data_dict["regression_target"] = data_dict["image"][:-1], data_dict["image"][-1:]
        return data_dict


class PutDistrustBack(BasicTransform):
    """Make the regression target the image's last channel again: nnU-Net's loader hands on images only."""

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Join ``image`` and ``regression_target``."""
        data_dict["image"] = torch.cat((data_dict["image"], data_dict.pop("regression_target")))
        return data_dict


def carry_distrust(transforms: BasicTransform) -> BasicTransform:
    """Wrap transforms so that the image's last channel is moved like the image and otherwise kept."""
    return ComposeTransforms([TakeDistrustOut(), transforms, PutDistrustBack()])


def make_repeatable(transforms: BasicTransform) -> None:
    """Take timing out of ``transforms``, in place.

    nnU-Net's blur times two ways of computing and takes the faster one; they round differently, so that the same
    seed would give other images on a busy machine.
    """
    for transform in _walk(transforms):
        if isinstance(transform, GaussianBlurTransform):
            transform.benchmark = False


def _walk(transform: BasicTransform) -> Iterator[BasicTransform]:
    yield transform
    inner = [*getattr(transform, "transforms", ()), getattr(transform, "transform", None)]
    for part in inner:
        if isinstance(part, BasicTransform):
            yield from _walk(part)
