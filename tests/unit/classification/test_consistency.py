from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.classification.consistency import ConsistencyLoss
from pipeline.errors import ConfigurationError

KINDS = ("kl", "mse", "cosine")
TARGETS = ("largest", "mean")
EVERY = list(product(KINDS, TARGETS))


def logits(classes: int, scales: int = 3, samples: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(classes)
    drawn = torch.randn(scales, samples, classes, generator=generator, dtype=torch.float64)
    return [(2 * each).requires_grad_() for each in drawn]


def gradients(loss: Tensor, given: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, given, allow_unused=True)
    return [torch.zeros_like(z) if g is None else g for z, g in zip(given, found, strict=True)]


@pytest.mark.parametrize(("kind", "target"), EVERY)
@pytest.mark.parametrize("classes", [1, 2, 7])
def test_it_is_zero_where_the_scales_agree_and_positive_where_not(
    kind: str, target: str, classes: int
) -> None:
    loss = ConsistencyLoss(kind, target)
    given = logits(classes)
    assert float(loss([given[0]] * 3).detach()) == pytest.approx(0, abs=1e-12)
    assert float(loss(given).detach()) > 0.01
    assert all(float(g.norm()) > 0 for g in gradients(loss(given), given)[1:])


@pytest.mark.parametrize(("kind", "target"), EVERY)
def test_one_logit_means_what_two_mean_and_is_never_lost(kind: str, target: str) -> None:
    """A softmax over a single logit is 1, so its divergence would be 0 whatever it is."""
    loss, one = ConsistencyLoss(kind, target), logits(1)
    two = [torch.cat([torch.zeros_like(z), z], dim=1) for z in one]
    torch.testing.assert_close(loss(one), loss(two))
    assert float(loss(one).detach()) > 0
    naive = [z.log_softmax(1) for z in one[:2]]
    lost = functional.kl_div(*naive, reduction="batchmean", log_target=True)
    assert float(lost.detach()) == 0


def test_the_divergence_of_one_logit_is_bernoullis() -> None:
    teacher, student = logits(1, scales=2)
    loss = ConsistencyLoss("kl")([teacher, student])
    truth = torch.sigmoid(teacher)
    cross, entropy = (
        functional.binary_cross_entropy_with_logits(z, truth) for z in (student, teacher)
    )
    torch.testing.assert_close(loss, cross - entropy)


@pytest.mark.parametrize(("kind", "target"), EVERY)
def test_a_shift_of_all_logits_changes_nothing(kind: str, target: str) -> None:
    loss, given = ConsistencyLoss(kind, target), logits(4)
    shifted = [z + shift for z, shift in zip(given, (3.0, -7.0, 100.0), strict=True)]
    torch.testing.assert_close(loss(shifted), loss(given))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 4])
def test_the_teacher_gets_no_gradient(kind: str, classes: int) -> None:
    given = logits(classes)
    first, *others = gradients(ConsistencyLoss(kind, "largest")(given), given)
    assert not bool(first.any())
    assert all(bool(g.any()) for g in others)


@pytest.mark.parametrize("kind", KINDS)
def test_agreement_on_the_mean_is_symmetric(kind: str) -> None:
    loss, given = ConsistencyLoss(kind, "mean"), logits(3)
    torch.testing.assert_close(loss(given), loss(given[::-1]))
    found = gradients(loss(given), given)
    turned = gradients(loss(given[::-1]), given)
    torch.testing.assert_close(found, turned)


def test_the_symmetric_divergence_is_jensen_and_shannons() -> None:
    given = logits(6)
    probability = torch.stack([z.softmax(1) for z in given])
    entropy = lambda p: -(p * p.log()).sum(-1)  # noqa: E731
    wanted = (entropy(probability.mean(0)) - entropy(probability).mean(0)).mean()
    torch.testing.assert_close(ConsistencyLoss("kl", "mean")(given), wanted)


@pytest.mark.parametrize(("kind", "target"), EVERY)
@pytest.mark.parametrize("classes", [1, 3])
def test_its_gradient_is_the_numerical_one(kind: str, target: str, classes: int) -> None:
    loss, (teacher, *rest) = ConsistencyLoss(kind, target), logits(classes)
    if target == "largest":
        assert torch.autograd.gradcheck(lambda *z: loss([teacher, *z]), rest)
    else:
        assert torch.autograd.gradcheck(lambda *z: loss(z), (teacher, *rest))


@pytest.mark.parametrize(("kind", "target"), EVERY)
@pytest.mark.parametrize("classes", [1, 3])
def test_it_is_the_mean_over_samples(kind: str, target: str, classes: int) -> None:
    """So that a batch computed in pieces has the loss of the whole."""
    loss, given = ConsistencyLoss(kind, target), logits(classes)
    each = torch.stack([loss([z[i : i + 1] for z in given]) for i in range(5)])
    torch.testing.assert_close(loss(given), each.mean())


@pytest.mark.parametrize(("kind", "target"), EVERY)
def test_sure_predictions_that_disagree_have_a_finite_gradient(kind: str, target: str) -> None:
    """Clamping `sigmoid(z)` in place, against the logarithm of 0, makes the backward pass raise."""
    given = [torch.full((2, 1), value, requires_grad=True) for value in (200.0, -200.0)]
    before = [z.detach().clone() for z in given]
    loss = ConsistencyLoss(kind, target)(given)
    loss.backward()
    assert bool(loss.isfinite())
    assert all(z.grad is None or bool(z.grad.isfinite().all()) for z in given)
    assert all(torch.equal(z, old) for z, old in zip(given, before, strict=True))
    trap = torch.sigmoid(given[0])
    trap = trap.clamp_(1e-6, 1 - 1e-6)
    with pytest.raises(RuntimeError, match="inplace operation"):
        trap.sum().backward()


def test_half_precision_becomes_single() -> None:
    given = [z.detach().bfloat16() for z in logits(3)]
    for kind, target in EVERY:
        found = ConsistencyLoss(kind, target)(given)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, ConsistencyLoss(kind, target)([z.float() for z in given]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "KL"}, "consistency_type must be one of kl, mse, cosine, got 'KL'"),
        ({"target": "best"}, "consistency_target must be one of largest, mean, got 'best'"),
    ],
)
def test_settings_are_checked(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ConsistencyLoss(**settings)


def test_what_is_no_set_of_logits_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="2 scales or more, got 1"):
        ConsistencyLoss()([torch.zeros(2, 3)])
    with pytest.raises(ConfigurationError, match=r"gives \(2, 1, 8, 8\), expected logits \(B, K\)"):
        ConsistencyLoss()([torch.zeros(2, 1, 8, 8)] * 2)
