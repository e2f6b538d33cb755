from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from torch.nn import functional

from pipeline.classification.losses import ClassificationLoss, balanced_weights, two_class_logits
from pipeline.errors import ConfigurationError

COUNTS = [50, 20, 5, 25]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"class_weights": balanced_weights([30, 10])},
    {"logit_adjustment": 1.0, "class_counts": [30, 10]},
    {
        "label_smoothing": 0.2,
        "class_weights": [1.0, 3.0],
        "logit_adjustment": 0.5,
        "class_counts": [3, 1],
    },
]


def drawn(classes: int = 4, samples: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    logits = 2 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, max(classes, 2), (samples,), generator=generator)


def test_without_settings_it_is_cross_entropy() -> None:
    logits, target = drawn()
    torch.testing.assert_close(
        ClassificationLoss()(logits, target), functional.cross_entropy(logits, target)
    )


def test_of_one_logit_it_is_binary_cross_entropy() -> None:
    logits, target = drawn(1)
    expected = nn.BCEWithLogitsLoss()(logits[:, 0], target.double())
    torch.testing.assert_close(ClassificationLoss()(logits, target), expected)


def test_smoothing_one_logit_smooths_the_target() -> None:
    logits, target = drawn(1)
    expected = nn.BCEWithLogitsLoss()(logits[:, 0], target.double() * 0.8 + 0.1)
    torch.testing.assert_close(ClassificationLoss(0.2)(logits, target), expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_one_logit_has_the_loss_and_gradient_of_the_two_that_mean_the_same(
    settings: dict[str, Any],
) -> None:
    logits, target = drawn(1)
    logits.requires_grad_()
    loss = ClassificationLoss(**settings)
    two = (two_class_logits(logits) + 2.0).detach().requires_grad_()
    one, other = loss(logits, target), loss(two, target)
    torch.testing.assert_close(one, other)
    (gradient,), (of_two,) = (torch.autograd.grad(v, x) for v, x in ((one, logits), (other, two)))
    torch.testing.assert_close(gradient[:, 0], of_two[:, 1])


def test_extreme_logits_have_a_finite_loss_and_gradient() -> None:
    for logits in (torch.tensor([[1e4], [-1e4]]), torch.tensor([[1e4, 0, 0], [0, -1e4, 0]])):
        logits.requires_grad_()
        loss = ClassificationLoss(0.1)(logits, torch.tensor([0, 1]))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logits.grad).all()


def test_weights_weigh_the_mean_over_the_batch() -> None:
    logits, target = drawn()
    weights = balanced_weights(COUNTS)
    share = torch.tensor(weights, dtype=torch.float64)[target]
    each = functional.cross_entropy(logits, target, reduction="none")
    expected = (share * each).sum() / share.sum()
    torch.testing.assert_close(ClassificationLoss(class_weights=weights)(logits, target), expected)


def test_adjustment_adds_the_log_of_the_prior() -> None:
    logits, target = drawn()
    prior = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    found = ClassificationLoss(logit_adjustment=0.7, class_counts=COUNTS)(logits, target)
    torch.testing.assert_close(found, functional.cross_entropy(logits + 0.7 * prior.log(), target))


def test_logits_that_know_nothing_have_no_gradient_under_adjustment() -> None:
    """On a set with these counts, equal logits are what logit adjustment makes of no evidence."""
    logits = torch.zeros(sum(COUNTS), 4, dtype=torch.float64, requires_grad=True)
    target = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    ClassificationLoss(logit_adjustment=1.0, class_counts=COUNTS)(logits, target).backward()
    torch.testing.assert_close(logits.grad.sum(0), torch.zeros(4, dtype=torch.float64))


def test_balanced_weights_give_each_class_the_same_share() -> None:
    weights = balanced_weights(COUNTS)
    shares = [weight * count for weight, count in zip(weights, COUNTS, strict=True)]
    assert shares == pytest.approx([25.0] * 4)
    half = balanced_weights(COUNTS, power=0.5)
    assert half[2] / half[0] == pytest.approx(math.sqrt(10))
    assert balanced_weights(COUNTS, power=0) == pytest.approx([1.0] * 4)
    assert balanced_weights([4, 0])[1] == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("column", [False, True])
def test_any_integer_target_will_do_as_row_or_column(dtype: torch.dtype, column: bool) -> None:
    logits, target = drawn()
    given = target.to(dtype)[:, None] if column else target.to(dtype)
    expected = ClassificationLoss()(logits, target)
    torch.testing.assert_close(ClassificationLoss()(logits, MetaTensor(given)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_single(dtype: torch.dtype) -> None:
    logits, target = drawn()
    loss = ClassificationLoss(0.1, COUNTS, 1.0, COUNTS)(logits.to(dtype), target)
    assert loss.dtype == torch.float32
    expected = ClassificationLoss(0.1, COUNTS, 1.0, COUNTS)(logits.to(dtype).double(), target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_has_no_state() -> None:
    assert not ClassificationLoss(0.1, COUNTS, 1.0, COUNTS).state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"class_weights": [1, -1]}, r"class_weights must be finite.*got \[1, -1\]"),
        ({"class_weights": [0, 0]}, "not all 0"),
        ({"logit_adjustment": -1}, "logit_adjustment must be 0 or more, got -1"),
        ({"logit_adjustment": 1}, "logit_adjustment needs class_counts"),
        ({"logit_adjustment": 1, "class_counts": [3, 0, 1]}, "no training sample of class 1"),
        ({"logit_adjustment": 1, "class_counts": [0, 0]}, "class_counts must be numbers"),
    ],
    ids=range(7),
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ClassificationLoss(**settings)


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(3, 2), torch.zeros(3)),
        (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.long)),
        (torch.zeros(3, 2, 4), torch.zeros(3, dtype=torch.long)),
    ],
    ids=range(4),
)
def test_shapes_and_types_that_do_not_fit_are_told(
    logits: torch.Tensor, target: torch.Tensor
) -> None:
    with pytest.raises(ConfigurationError, match=r"expected \(B, K\) and class numbers"):
        ClassificationLoss()(logits, target)


def test_settings_for_another_number_of_classes_are_told() -> None:
    logits, target = drawn(3)
    with pytest.raises(ConfigurationError, match="class_weights has 4 entries and the network 3"):
        ClassificationLoss(class_weights=COUNTS)(logits, target)
    with pytest.raises(ConfigurationError, match="class_counts has 4 entries"):
        ClassificationLoss(logit_adjustment=1, class_counts=COUNTS)(logits, target)
    with pytest.raises(ConfigurationError, match=r"power must be in \[0, 1\]"):
        balanced_weights(COUNTS, power=2)
