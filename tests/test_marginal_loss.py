"""The loss of partly annotated cases: silent on what nobody annotated, nnU-Net's own on all else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from test_loss import example, stock_loss, value_and_gradient

from nnunet_sam2.trainers.loss import ConfidenceLoss, merged_with_background


def _three_classes(shape: tuple[int, ...] = (5, 8, 6)) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of background and three classes; the second sample's label never shows class 2."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn((2, 4, *shape), generator=generator, requires_grad=True)
    target = torch.randint(0, 4, (2, 1, *shape), generator=generator).to(torch.int16)
    target[1][target[1] == 2] = 0
    return logits, target


ONE_OPEN = torch.tensor([[True] * 4, [True, True, False, True]])


@pytest.mark.parametrize("kind", ["labels", "regions"])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_fully_annotated_cases_have_nnunets_loss(kind: str, ignore: bool, batch_dice: bool) -> None:
    stock = stock_loss(kind, ignore=ignore, batch_dice=batch_dice)
    logits, target = example(kind, ignore=ignore)
    expected, expected_gradient = value_and_gradient(stock(logits, target), logits)
    ours = ConfidenceLoss(stock)
    with ours.weighted_by(None, None):
        value, gradient = value_and_gradient(ours(logits, target), logits)
    assert value == expected
    assert torch.equal(gradient, expected_gradient)
    with ours.weighted_by(None, torch.ones(logits.shape[:2], dtype=torch.bool)):
        value, gradient = value_and_gradient(ours(logits, target), logits)
    assert value == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-7, rtol=1e-5)


def test_background_and_open_classes_are_one_class() -> None:
    logits, _ = _three_classes()
    before, after = logits.softmax(dim=1), merged_with_background(logits, ONE_OPEN).softmax(dim=1)
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1, 0], before[1, 0] + before[1, 2])
    torch.testing.assert_close(after[1, [1, 3]], before[1, [1, 3]])
    assert not after[1, 2].any()


@pytest.mark.parametrize("batch_dice", [False, True])
def test_the_loss_is_that_of_fewer_classes_where_one_was_annotated_nowhere(batch_dice: bool) -> None:
    logits, target = _three_classes()
    target = torch.where(target == 2, 0, target)
    ours = ConfidenceLoss(stock_loss("labels", ignore=False, batch_dice=batch_dice))
    with ours.weighted_by(None, torch.tensor([[True, True, False, True]] * 2)):
        value = float(ours(logits, target).detach())
    # The twin: a network of three outputs, whose background has both probabilities.
    fewer = torch.stack([logits[:, [0, 2]].logsumexp(dim=1), logits[:, 1], logits[:, 3]], dim=1)
    twin = stock_loss("labels", ignore=False, batch_dice=batch_dice)
    assert value == pytest.approx(float(twin(fewer, torch.where(target == 3, 2, target)).detach()), abs=1e-6)


def test_nothing_tells_an_open_class_from_the_background() -> None:
    logits, target = _three_classes()
    ours = ConfidenceLoss(stock_loss("labels", ignore=False))
    with ours.weighted_by(None, ONE_OPEN):
        loss = ours(logits, target)
        (gradient,) = torch.autograd.grad(loss, logits)
    # A pull on the sum of two probabilities is the same for both, measured by the probabilities.
    probability = logits.softmax(dim=1).detach()
    pull = gradient / probability
    torch.testing.assert_close(pull[1, 0], pull[1, 2], atol=1e-6, rtol=1e-3)
    assert not torch.allclose(pull[0, 0], pull[0, 2], atol=1e-6, rtol=1e-3)
    exchanged = logits.detach().clone()
    exchanged[1, [0, 2]] = exchanged[1, [2, 0]]
    with ours.weighted_by(None, ONE_OPEN):
        assert float(ours(exchanged, target).detach()) == pytest.approx(float(loss.detach()), abs=1e-6)
    assert float(ours(exchanged, target).detach()) != pytest.approx(float(ours(logits, target).detach()), abs=1e-3)


def test_a_region_that_was_not_annotated_has_no_gradient() -> None:
    logits, target = example("regions", ignore=False)
    ours = ConfidenceLoss(stock_loss("regions", ignore=False))
    with ours.weighted_by(None, torch.tensor([[True, True], [True, False]])):
        value, gradient = value_and_gradient(ours(logits, target), logits)
    assert not gradient[1, 1].any()
    assert gradient[1, 0].any()
    # Dice and cross-entropy are means over the three pairs of case and region that were annotated.
    dice = [
        ours.stock.dc(logits[b : b + 1, c : c + 1], target[b : b + 1, c : c + 1]) for b, c in ((0, 0), (0, 1), (1, 0))
    ]
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    expected = torch.stack(dice).mean() + (entropy[0].sum() + entropy[1, 0].sum()) / (3 * entropy[0, 0].numel())
    assert value == pytest.approx(float(expected.detach()), abs=1e-6)


def test_confidence_and_every_scale_of_deep_supervision_go_with_it() -> None:
    stock, factors = stock_loss("labels", ignore=False), np.array([2 / 3, 1 / 3, 0])
    pairs = [_three_classes((n, n, n)) for n in (8, 4, 2)]
    confidence = torch.rand((2, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    single, slow = ConfidenceLoss(stock), torch.zeros(())
    for factor, (output, target), weights in zip(
        factors[:2], pairs, (confidence, torch.nn.functional.avg_pool3d(confidence, 2)), strict=False
    ):
        with single.weighted_by(weights, ONE_OPEN):
            slow = slow + float(factor) * single(output, target)
    ours = ConfidenceLoss(DeepSupervisionWrapper(stock, factors))
    outputs, targets = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    with ours.weighted_by(confidence, ONE_OPEN):
        torch.testing.assert_close(ours(outputs, targets), slow, atol=1e-6, rtol=0)
    with ours.weighted_by(confidence):
        assert float(ours(outputs, targets).detach()) != pytest.approx(float(slow.detach()), abs=1e-3)


def test_half_precision_stays_finite() -> None:
    logits, target = _three_classes()
    ours = ConfidenceLoss(stock_loss("labels", ignore=False))
    with ours.weighted_by(None, ONE_OPEN):
        assert np.isfinite(float(ours((200 * logits).half(), target).detach()))
