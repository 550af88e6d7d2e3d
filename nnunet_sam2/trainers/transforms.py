"""Distrust and probabilities in nnU-Net's augmentation: moved with the image, left alone where intensities change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms


class TakeDistrustOut(BasicTransform):
    """Make the image's last channels a regression target, which spatial transforms move and all others leave."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.channels = channels

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Split ``image`` (channels first) into ``image`` and ``regression_target``."""
        image, n = data_dict["image"], self.channels
        data_dict["image"], data_dict["regression_target"] = image[:-n], image[-n:]
        return data_dict


class PutDistrustBack(BasicTransform):
    """Make the regression target the image's last channels again: nnU-Net's loader hands on images only."""

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Join ``image`` and ``regression_target``."""
        data_dict["image"] = torch.cat((data_dict["image"], data_dict.pop("regression_target")))
        return data_dict


def carry_distrust(transforms: BasicTransform, channels: int = 1) -> BasicTransform:
    """Wrap transforms so that the image's last channels are moved like the image and otherwise kept."""
    return ComposeTransforms([TakeDistrustOut(channels), transforms, PutDistrustBack()])


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
