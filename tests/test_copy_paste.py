"""Copy-paste within a batch: who exchanges with whom, the box, and all scales, labels and confidence along with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

from nnunet_sam2.trainers.copy_paste import box_at_scale, draw_box, exchange, partners


@pytest.mark.parametrize(
    ("pseudo", "expected"),
    [
        ([True, False], [1, 0]),
        ([False, False, True, True], [2, 3, 0, 1]),
        ([False, True, False, False, False], [1, 0, 3, 2, 4]),
        ([True, True, True], [1, 0, 2]),
        ([False], [0]),
    ],
)
def test_labelled_samples_go_with_pseudo_labelled_ones_first(pseudo: list[bool], expected: list[int]) -> None:
    assert partners(pseudo) == expected


def test_samples_that_were_annotated_for_different_classes_are_not_mixed() -> None:
    annotated_bc = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    assert partners([False, True, False, True], annotated_bc) == [2, 3, 0, 1]
    assert partners([False, True], annotated_bc[:2]) == [0, 1]


def test_the_box_has_two_thirds_of_each_side_and_lies_anywhere() -> None:
    np.random.seed(0)
    boxes = [draw_box((12, 9, 1)) for _ in range(200)]
    assert {tuple(side.stop - side.start for side in box) for box in boxes} == {(8, 6, 1)}
    assert [{box[axis].start for box in boxes} for axis in range(3)] == [set(range(5)), set(range(4)), {0}]
    np.random.seed(0)
    assert draw_box((12, 9, 1)) == boxes[0]


@pytest.mark.parametrize("shape", [(16, 24), (6, 20, 28)])
def test_every_scale_has_the_labels_that_nnunet_would_take_from_the_pasted_finest_one(shape: tuple[int, ...]) -> None:
    scales = [[1.0] * len(shape), [0.5] * len(shape), [0.5] + [0.25] * (len(shape) - 1)]
    downsample = DownsampleSegForDSTransform(scales)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (3, 1, *shape), generator=generator).to(torch.int16)
    for seed in range(20):
        np.random.seed(seed)
        box = draw_box(shape)
        finest = [sample.clone() for sample in labels]
        inside = (slice(None), *box)
        finest[0][inside], finest[2][inside] = labels[2][inside], labels[0][inside]
        expected = [torch.stack(scale) for scale in zip(*map(downsample._apply_to_segmentation, finest), strict=True)]
        pasted = [torch.stack(s) for s in zip(*map(downsample._apply_to_segmentation, labels), strict=True)]
        exchange([labels.clone(), *pasted], [2, 1, 0], box)
        for own, other in zip(pasted, expected, strict=True):
            assert torch.equal(own, other)


def test_image_label_and_confidence_are_exchanged_together_and_the_rest_stays() -> None:
    image = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 3, 6, 6).clone()
    label, confidence = image[:, :1].to(torch.int16), image[:, :1].clone()
    box = (slice(1, 5), slice(0, 4))
    exchange([image, label, confidence], [1, 0], box)
    inside = torch.zeros((6, 6), dtype=torch.bool)
    inside[box] = True
    for tensor in (image, label, confidence):
        for sample in (0, 1):
            assert (tensor[sample][:, inside] == 1 - sample).all()
            assert (tensor[sample][:, ~inside] == sample).all()


def test_a_sample_without_a_partner_keeps_everything() -> None:
    image = torch.randn(3, 1, 8, 8)
    before = image.clone()
    exchange([image], [1, 0, 2], draw_box((8, 8)))
    assert torch.equal(image[2], before[2])
    assert not torch.equal(image[:2], before[:2])


def test_a_box_between_the_voxels_of_a_coarse_scale_is_empty_there() -> None:
    box = box_at_scale((slice(0, 1), slice(0, 6)), (8, 8), (2, 2))
    assert (box[0].stop - box[0].start, box[1]) == (0, slice(0, 1))
