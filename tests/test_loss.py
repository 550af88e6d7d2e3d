"""The weighted loss: nnU-Net's at full confidence, nnU-Net's ignore label at none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_sam2.errors import InputError
from nnunet_sam2.trainers.loss import ConfidenceLoss, at_scale, soft_dice

IGNORE = 3


def stock_loss(kind: str, *, ignore: bool, batch_dice: bool = False) -> torch.nn.Module:
    """Build the losses that nnUNetTrainer._build_loss builds."""
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "ddp": False}
    if kind == "regions":
        return DC_and_BCE_loss(
            {}, {**dice, "do_bg": True}, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss
        )
    return DC_and_CE_loss(
        {**dice, "do_bg": False}, {}, ignore_label=IGNORE if ignore else None, dice_class=MemoryEfficientSoftDiceLoss
    )


def example(kind: str, *, ignore: bool, shape: tuple[int, ...] = (5, 8, 6)) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw logits and a target in nnU-Net's form."""
    generator = torch.Generator().manual_seed(3)
    heads = 2 if kind == "regions" else 3
    logits = torch.randn((2, heads, *shape), generator=generator, requires_grad=True)
    labels = torch.randint(0, 4 if ignore else 3, (2, 1, *shape), generator=generator).to(torch.int16)
    if kind == "labels":
        return logits, labels
    regions = [(labels == 1) | (labels == 2), labels == 2, *([labels == IGNORE] if ignore else [])]
    return logits, torch.cat(regions, dim=1)


def value_and_gradient(loss: torch.Tensor, logits: torch.Tensor) -> tuple[float, torch.Tensor]:
    return float(loss.detach()), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("kind", ["labels", "regions"])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("shape", [(5, 8, 6), (8, 6)])
def test_full_confidence_is_stock(kind: str, ignore: bool, batch_dice: bool, shape: tuple[int, ...]) -> None:
    stock = stock_loss(kind, ignore=ignore, batch_dice=batch_dice)
    logits, target = example(kind, ignore=ignore, shape=shape)
    expected, expected_gradient = value_and_gradient(stock(logits, target), logits)
    ours = ConfidenceLoss(stock)
    assert value_and_gradient(ours(logits, target), logits)[0] == expected
    with ours.weighted_by(torch.ones((2, 1, *shape))):
        value, gradient = value_and_gradient(ours(logits, target), logits)
    assert value == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_no_confidence_is_nnunets_ignore_label(kind: str) -> None:
    logits, with_ignored = example(kind, ignore=True)
    expected, expected_gradient = value_and_gradient(stock_loss(kind, ignore=True)(logits, with_ignored), logits)
    if kind == "labels":
        ignored = with_ignored == IGNORE
        target = torch.where(ignored, 1, with_ignored)
    else:
        ignored, target = with_ignored[:, -1:], with_ignored[:, :-1]
    ours = ConfidenceLoss(stock_loss(kind, ignore=False))
    with ours.weighted_by(1 - ignored.float()):
        value, gradient = value_and_gradient(ours(logits, target), logits)
    if kind == "regions":
        # stock's cross-entropy with an ignore label is a sum over regions, without one a mean over them
        dice = ours.stock.dc(logits, target, loss_mask=1 - ignored.float()).item()
        assert value - dice == pytest.approx((expected - dice) / 2, abs=1e-6)
    else:
        assert value == pytest.approx(expected, abs=1e-6)
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-7, rtol=1e-5)
    assert not gradient[ignored.expand_as(gradient)].any()


def test_a_distrusted_voxel_pulls_less() -> None:
    logits, target = example("labels", ignore=False)
    ours = ConfidenceLoss(stock_loss("labels", ignore=False))
    pulls = []
    for confidence in (1.0, 0.5, 0.0):
        weights = torch.ones((2, 1, 5, 8, 6))
        weights[0, 0, 2, 3, 4] = confidence
        with ours.weighted_by(weights):
            pulls.append(value_and_gradient(ours(logits, target), logits)[1][0, :, 2, 3, 4].abs().sum().item())
    assert pulls[0] > pulls[1] > pulls[2] == 0


def test_all_scales_of_deep_supervision_are_weighted() -> None:
    stock = stock_loss("labels", ignore=False)
    factors = np.array([4 / 7, 2 / 7, 1 / 7, 0])
    scales = [(8, 8, 8), (4, 4, 4), (2, 2, 2), (1, 1, 1)]
    pairs = [example("labels", ignore=False, shape=scale) for scale in scales]
    outputs, targets = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    ours = ConfidenceLoss(DeepSupervisionWrapper(stock, factors))
    expected = ours(outputs, targets)
    with ours.weighted_by(torch.ones((2, 1, 8, 8, 8))):
        torch.testing.assert_close(ours(outputs, targets), expected, atol=1e-6, rtol=0)
    confidence = torch.rand((2, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    single = ConfidenceLoss(stock)
    slow = torch.zeros(())
    for factor, output, target, scale in zip(factors[:3], outputs, targets, scales, strict=False):
        step = 8 // scale[0]
        blocks = confidence.reshape(2, 1, scale[0], step, scale[1], step, scale[2], step).mean((3, 5, 7))
        with single.weighted_by(blocks):
            slow = slow + float(factor) * single(output, target)
    with ours.weighted_by(confidence):
        torch.testing.assert_close(ours(outputs, targets), slow, atol=1e-6, rtol=0)


def test_a_batch_without_any_confidence_has_no_gradient_and_no_nan() -> None:
    logits, target = example("labels", ignore=False)
    ours = ConfidenceLoss(stock_loss("labels", ignore=False))
    with ours.weighted_by(torch.zeros((2, 1, 5, 8, 6))):
        value, gradient = value_and_gradient(ours(logits, target), logits)
    assert np.isfinite(value)
    assert not gradient.any()


def test_confidence_is_averaged_to_a_coarser_scale() -> None:
    confidence = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]]])
    assert at_scale(confidence, torch.Size((1, 1))).item() == 0.75
    assert at_scale(confidence, torch.Size((2, 2))) is confidence


def one_hot(kind: str, target: torch.Tensor) -> torch.Tensor:
    """Return a target as probabilities; ignored voxels become background."""
    if kind == "regions":
        return target[:, :2].float()
    return torch.nn.functional.one_hot(torch.where(target == IGNORE, 0, target)[:, 0].long(), 3).movedim(-1, 1).float()


@pytest.mark.parametrize("kind", ["labels", "regions"])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("shape", [(5, 8, 6), (8, 6)])
def test_one_hot_soft_targets_are_stock(kind: str, ignore: bool, batch_dice: bool, shape: tuple[int, ...]) -> None:
    stock = stock_loss(kind, ignore=ignore, batch_dice=batch_dice)
    logits, target = example(kind, ignore=ignore, shape=shape)
    expected, expected_gradient = value_and_gradient(stock(logits, target), logits)
    ours = ConfidenceLoss(stock)
    with ours.weighted_by(None, soft=one_hot(kind, target)):
        value, gradient = value_and_gradient(ours(logits, target), logits)
    assert value == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", ["labels", "regions"])
@pytest.mark.parametrize("annotated", [None, [[True, True, True], [True, False, True]]])
def test_one_hot_soft_targets_with_confidence_are_the_weighted_loss_at_all_scales(
    kind: str, annotated: list[list[bool]] | None
) -> None:
    ours = ConfidenceLoss(DeepSupervisionWrapper(stock_loss(kind, ignore=False), (4 / 7, 2 / 7, 1 / 7, 0)))
    shapes = [(8, 8, 8), (4, 4, 4), (2, 4, 2), (1, 1, 1)]
    outputs = [example(kind, ignore=False, shape=shape)[0] for shape in shapes]
    finest = example(kind, ignore=False, shape=shapes[0])[1]
    annotated_bc = None if annotated is None else torch.tensor(annotated)[:, -outputs[0].shape[1] :]
    if annotated_bc is not None:  # labels hold no class that was not annotated
        finest = finest * annotated_bc.reshape(2, -1, 1, 1, 1) if kind == "regions" else finest.where(finest != 1, 0)
    targets = [at_nearest(finest, shape) for shape in shapes]
    confidence = torch.rand((2, 1, *shapes[0]), generator=torch.Generator().manual_seed(0))
    with ours.weighted_by(confidence, annotated_bc):
        expected = value_and_gradient(ours(outputs, targets), outputs[1])
    with ours.weighted_by(confidence, annotated_bc, soft=one_hot(kind, finest)):
        value, gradient = value_and_gradient(ours(outputs, targets), outputs[1])
    assert value == pytest.approx(expected[0], abs=1e-6)
    torch.testing.assert_close(gradient, expected[1], atol=1e-7, rtol=1e-5)


def at_nearest(target: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Bring a target to a coarser scale as nnU-Net does."""
    return torch.nn.functional.interpolate(target.float(), shape, mode="nearest-exact").to(target.dtype)


@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_the_soft_loss_is_lowest_where_the_network_says_what_the_target_says(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn((2, 2 if kind == "regions" else 3, 8, 6), generator=generator)
    soft = logits.sigmoid() if kind == "regions" else logits.softmax(dim=1)
    ours = ConfidenceLoss(stock_loss(kind, ignore=False))
    target = torch.zeros((2, 2 if kind == "regions" else 1, 8, 6), dtype=torch.int16)
    losses = []
    for sharpness in (0.5, 1.0, 3.0):
        with ours.weighted_by(torch.ones((2, 1, 8, 6)), soft=soft):
            losses.append(float(ours(logits * sharpness, target)))
    assert losses[1] < min(losses[0], losses[2])
    dice = soft_dice(ours.stock.dc, logits, soft, torch.rand((2, 1, 8, 6), generator=generator))
    assert float(dice) == pytest.approx(-1, abs=1e-6)


def test_another_loss_is_refused() -> None:
    ours = ConfidenceLoss(torch.nn.MSELoss())
    with ours.weighted_by(torch.ones((1, 1, 2, 2))), pytest.raises(InputError, match="MSELoss"):
        ours(torch.ones((1, 1, 2, 2)), torch.ones((1, 1, 2, 2)))
