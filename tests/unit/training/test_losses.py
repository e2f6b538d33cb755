from __future__ import annotations

from functools import partial

import monai.losses
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from pipeline.errors import ConfigurationError
from pipeline.training.losses import (
    BCELoss,
    DiceBCELoss,
    DiceClDiceLoss,
    DiceFocalLoss,
    DiceLoss,
    FocalLoss,
    SoftClDiceLoss,
    soft_skeleton,
)

LOSSES = {
    "dice": DiceLoss,
    "dice_squared": partial(DiceLoss, squared=True),
    "dice_per_sample": partial(DiceLoss, per_sample=True),
    "bce": BCELoss,
    "focal": FocalLoss,
    "focal_balanced": partial(FocalLoss, alpha=0.25, gamma=1.5),
    "cldice": SoftClDiceLoss,
    "cldice_per_sample": partial(SoftClDiceLoss, per_sample=True),
    "dice_bce": DiceBCELoss,
    "dice_focal": DiceFocalLoss,
    "dice_cldice": DiceClDiceLoss,
}
SUMS = {
    "dice_bce": (DiceBCELoss, "lambda_dice", "lambda_bce"),
    "dice_focal": (DiceFocalLoss, "lambda_dice", "lambda_focal"),
    "dice_cldice": (DiceClDiceLoss, "lambda_dice", "lambda_cldice"),
}
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())
every_sum = pytest.mark.parametrize(("make", "first", "second"), SUMS.values(), ids=SUMS.keys())
two_and_three_axes = pytest.mark.parametrize("size", [(18, 20), (6, 8, 10)], ids=["2d", "3d"])


def case(size: tuple[int, ...] = (18, 20), channels: int = 1, seed: int = 0):
    """Return random logits, a label of connected lines, and a mask with a hole in every image."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, channels, *size)
    logits = 2 * torch.randn(shape, generator=generator)
    label = torch.zeros(shape)
    label[..., 3:6, :] = 1
    label[1, ..., 7:9] = 1
    mask = (torch.rand((2, 1, *size), generator=generator) > 0.3).float()
    return logits, label, mask


def value_and_gradient(loss: nn.Module, logits: torch.Tensor, *rest: torch.Tensor | None):
    logits = logits.clone().requires_grad_()
    value = loss(logits, *rest)
    value.backward()
    return value.detach(), logits.grad


def assert_same(one, other) -> None:
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


@every_loss
@two_and_three_axes
def test_what_lies_outside_the_mask_changes_neither_loss_nor_gradient(make, size):
    logits, label, mask = case(size)
    inside = mask.bool()
    other_logits = torch.where(inside, logits, torch.full_like(logits, 37.0))
    other_label = torch.where(inside, label, 1 - label)
    expected = value_and_gradient(make(), logits, label, mask)
    assert_same(value_and_gradient(make(), other_logits, other_label, mask), expected)
    assert expected[1].masked_fill(inside, 0).count_nonzero() == 0
    assert expected[1].count_nonzero() > 0


@every_loss
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_not_even_a_value_that_is_not_finite_gets_in_from_outside(make, poison):
    logits, label, mask = case()
    poisoned = torch.where(mask.bool(), logits, torch.full_like(logits, poison))
    expected = value_and_gradient(make(), logits, label, mask)
    assert_same(value_and_gradient(make(), poisoned, label, mask), expected)


@every_loss
def test_an_ignored_label_means_what_a_mask_means(make):
    logits, label, mask = case()
    ignored = torch.where(mask.bool(), label, torch.full_like(label, 255))
    expected = value_and_gradient(make(), logits, label, mask)
    assert_same(value_and_gradient(make(), logits, ignored), expected)
    of_integers = value_and_gradient(make(), logits, ignored.to(torch.uint8))
    assert_same(of_integers, expected)
    two = torch.where(mask.bool(), label, torch.full_like(label, 2))
    assert_same(value_and_gradient(make(ignore_label=2), logits, two), expected)


@every_loss
def test_a_pixel_counts_where_mask_and_label_agree(make):
    logits, label, mask = case()
    other = case(seed=1)[2]
    ignored = torch.where(other.bool(), label, torch.full_like(label, 255))
    expected = value_and_gradient(make(), logits, label, mask * other)
    assert_same(value_and_gradient(make(), logits, ignored, mask), expected)


@every_loss
@two_and_three_axes
def test_a_mask_of_ones_is_no_mask(make, size):
    logits, label, mask = case(size)
    expected = value_and_gradient(make(), logits, label)
    assert_same(value_and_gradient(make(), logits, label, torch.ones_like(mask)), expected)


@every_loss
@two_and_three_axes
def test_a_rectangular_mask_is_a_crop(make, size):
    logits, label, _ = case(size)
    mask = torch.zeros_like(label)
    window = (..., slice(2, 5), slice(1, 9))
    mask[window] = 1
    whole, gradient = value_and_gradient(make(), logits, label, mask)
    cropped, of_crop = value_and_gradient(make(), logits[window], label[window])
    torch.testing.assert_close(whole, cropped)
    torch.testing.assert_close(gradient[window], of_crop)


@every_loss
@two_and_three_axes
def test_the_perfect_prediction_is_the_minimum(make, size):
    logits, label, mask = case(size)
    perfect = make()(100 * (label - 0.5), label, mask)
    # The centre line of a wide vessel is inside it, so clDice is perfect too.
    torch.testing.assert_close(perfect, torch.tensor(0.0), rtol=0, atol=1e-5)
    assert make()(logits, label, mask) > 0.01
    assert make()(100 * (0.5 - label), label, mask) > 0.3


@every_loss
@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("target", ["lines", "empty", "full"])
@pytest.mark.parametrize("masked", ["some", "all", "nothing"])
def test_loss_and_gradient_are_finite(make, scale, target, masked):
    logits, label, mask = case()
    label = {"lines": label, "empty": 0 * label, "full": torch.ones_like(label)}[target]
    mask = {"some": mask, "all": torch.ones_like(mask), "nothing": 0 * mask}[masked]
    value, gradient = value_and_gradient(make(), scale * logits.sign(), label, mask)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


@every_loss
def test_nothing_that_counts_is_no_loss_and_no_gradient(make):
    logits, label, mask = case()
    value, gradient = value_and_gradient(make(), logits, label, 0 * mask)
    torch.testing.assert_close(value, torch.tensor(0.0), rtol=0, atol=1e-6)
    assert gradient.count_nonzero() == 0


@every_loss
def test_gradient_agrees_with_finite_differences(make):
    logits, label, mask = case((5, 6))
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: make()(x, label, mask), (logits,), atol=1e-6)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_single_precision(make, dtype):
    logits, label, mask = case()
    half = logits.to(dtype)
    value = make()(half, label, mask)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, make()(half.float(), label, mask))


@every_sum
def test_the_weighted_sum_is_linear_in_its_weights(make, first, second):
    logits, label, mask = case()
    parts = [
        value_and_gradient(make(**{first: 1 - one, second: one}), logits, label, mask)
        for one in (0, 1)
    ]
    whole = value_and_gradient(make(**{first: 0.3, second: 2.5}), logits, label, mask)
    for both, left, right in zip(whole, *parts, strict=True):
        torch.testing.assert_close(both, 0.3 * left + 2.5 * right)


@two_and_three_axes
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_dice_equals_monai(size, squared, per_sample):
    logits, label, mask = case(size, channels=2)
    theirs = monai.losses.DiceLoss(
        sigmoid=True, squared_pred=squared, batch=not per_sample, smooth_nr=0.5, smooth_dr=0.5
    )
    ours = DiceLoss(0.5, squared, per_sample)
    expected = value_and_gradient(theirs, logits, label)
    for one, other in zip(value_and_gradient(ours, logits, label), expected, strict=True):
        torch.testing.assert_close(one, other)
    masked = monai.losses.MaskedDiceLoss(
        sigmoid=True, squared_pred=squared, batch=not per_sample, smooth_nr=0.5, smooth_dr=0.5
    )
    torch.testing.assert_close(ours(logits, label, mask), masked(logits, label, mask))


@two_and_three_axes
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_dice_focal_equals_monai(size, alpha):
    logits, label, _ = case(size)
    weights = {"lambda_dice": 0.7, "lambda_focal": 1.3, "gamma": 1.5, "alpha": alpha}
    theirs = monai.losses.DiceFocalLoss(
        sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0, **weights
    )
    expected = value_and_gradient(theirs, logits, label)
    ours = value_and_gradient(DiceFocalLoss(**weights), logits, label)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


@two_and_three_axes
@pytest.mark.parametrize("iterations", [0, 3])
def test_soft_cldice_equals_monai(size, iterations):
    logits, label, _ = case(size, channels=2)
    # MONAI adds `smooth` to the sum of precision and sensitivity, which is never near 0.
    theirs = monai.losses.SoftclDiceLoss(iter_=iterations, sigmoid=True, smooth=1e-12)
    expected = value_and_gradient(theirs, logits, label)
    ours = value_and_gradient(SoftClDiceLoss(iterations, per_sample=True), logits, label)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_dice_and_cldice_equal_monai():
    logits, label, _ = case()
    theirs = monai.losses.SoftDiceclDiceLoss(alpha=0.25, sigmoid=True, smooth=1e-12)
    ours = DiceClDiceLoss(0.75, 0.25, per_sample=True)
    torch.testing.assert_close(ours(logits, label), theirs(logits, label))


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_is_cross_entropy_times_the_error_to_the_power_of_gamma(gamma):
    logits, label, mask = case()
    error = (torch.sigmoid(logits) - label).abs()
    values = error**gamma * -torch.log(1 - error)
    torch.testing.assert_close(FocalLoss(gamma)(logits, label, mask), values[mask > 0].mean())


def test_cross_entropy_is_the_mean_over_counted_pixels():
    logits, label, mask = case()
    counted = mask > 0
    expected = nn.functional.binary_cross_entropy_with_logits(logits[counted], label[counted])
    torch.testing.assert_close(BCELoss()(logits, label, mask), expected)


def test_pooled_dice_by_hand():
    logits = torch.tensor([[[[9e9, -9e9]]], [[[9e9, 9e9]]]])
    label = torch.tensor([[[[1.0, 0.0]]], [[[1.0, 255.0]]]])
    # Three pixels count: found 1, 0, 1 of 1, 0, 1.
    torch.testing.assert_close(DiceLoss()(logits, label), torch.tensor(0.0))
    # Four count: overlap 2, areas 3 and 2, one pixel of smoothing.
    zeroed = label.masked_fill(label == 255, 0)
    torch.testing.assert_close(DiceLoss()(logits, zeroed), torch.tensor(1 - 5 / 6))
    # The first image is perfect, the second has overlap 1, areas 2 and 1.
    per_sample = DiceLoss(per_sample=True)(logits, zeroed)
    torch.testing.assert_close(per_sample, torch.tensor((0 + 1 - 3 / 4) / 2))


def test_the_skeleton_of_a_bar_is_its_centre_line_up_to_the_edge_of_the_mask():
    bar = torch.zeros(1, 1, 9, 20)
    bar[..., 3:6, :] = 1
    counts = torch.zeros(1, 1, 9, 20, dtype=torch.bool)
    counts[..., 2:18] = True
    expected = torch.zeros_like(bar)
    expected[..., 4, 2:18] = 1
    skeleton = soft_skeleton(bar.masked_fill(~counts, 0), 3, counts)
    torch.testing.assert_close(skeleton, expected)


def test_cldice_sees_a_gap_that_dice_hardly_sees():
    label = torch.zeros(1, 1, 21, 60)
    label[..., 8:13, :] = 1
    thinner, broken = label.clone(), label.clone()
    thinner[..., 8, :] = 0  # 60 pixels lost, still connected
    broken[..., 28:32] = 0  # 20 pixels lost
    dice, cldice = DiceLoss(), SoftClDiceLoss()

    def of(loss: nn.Module, found: torch.Tensor) -> float:
        return float(loss(100 * (found - 0.5), label))

    assert of(dice, broken) < of(dice, thinner)
    assert of(cldice, broken) > of(cldice, thinner)


@every_loss
def test_metadata_of_monai_tensors_makes_no_difference(make):
    logits, label, mask = case()
    value = make()(MetaTensor(logits), MetaTensor(label), MetaTensor(mask))
    assert type(value) is torch.Tensor
    torch.testing.assert_close(value, make()(logits, label, mask))


@every_loss
def test_shapes_that_disagree_are_named(make):
    logits, label, mask = case()
    with pytest.raises(ConfigurationError, match=r"gives \(2, 1, 18, 20\) .* has \(2, 1, 18, 19\)"):
        make()(logits, label[..., 1:])
    with pytest.raises(ConfigurationError, match=r"mask must be \(2, 1, 18, 20\), got \(1, 1, 18"):
        make()(logits, label, mask[:1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(DiceLoss, smooth=0), r"smooth must be positive and finite, got 0\.0"),
        (partial(DiceLoss, ignore_label=1), "ignore_label must be None or neither class"),
        (partial(DiceBCELoss, lambda_dice=-1), "lambda_dice must be zero or positive"),
        (partial(DiceBCELoss, lambda_bce=float("nan")), "lambda_bce .* got nan"),
        (partial(DiceBCELoss, 0, 0), "weights of dice, bce are all 0"),
        (partial(FocalLoss, alpha=2), r"alpha must be in \[0, 1\]"),
        (partial(SoftClDiceLoss, iterations=-1), "iterations must be an integer >= 0"),
    ],
    ids=["smooth", "ignore_label", "negative", "nan", "all_zero", "alpha", "iterations"],
)
def test_a_wrong_setting_is_named(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
