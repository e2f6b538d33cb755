from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import ConfigurationError
from pipeline.inference.averages import Activation, Average, Domain, normalised_weights


def logits(seed: int, *shape: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(
        shape or (2, 3, 4, 5), generator=torch.Generator().manual_seed(seed)
    )


def averaged(members: list[Any], weights: list[float], **settings: Any) -> Any:
    average = Average(**settings)
    for member, weight in zip(members, weights, strict=True):
        average.add(member, weight)
    return average.logits()


@given(count=st.integers(1, 6), seed=st.integers(0, 99), data=st.data())
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_probability_mean_is_the_brute_force_mean(
    activation: Activation, count: int, seed: int, data: st.DataObject
) -> None:
    drawn = data.draw(st.lists(st.floats(0.01, 1), min_size=count, max_size=count))
    weights = normalised_weights(drawn, count)
    members = [logits(seed + n) for n in range(count)]
    found = averaged(members, weights, activation=activation)
    act = torch.sigmoid if activation == "sigmoid" else lambda z: torch.softmax(z, 1)
    expected = sum(w * act(m.double()) for m, w in zip(members, weights, strict=True))
    torch.testing.assert_close(act(found.double()), expected, rtol=1e-5, atol=1e-7)


def test_logit_mean_is_the_plain_mean() -> None:
    members = [logits(n) for n in range(3)]
    found = averaged(members, [0.5, 0.25, 0.25], domain="logit")
    expected = 0.5 * members[0] + 0.25 * members[1] + 0.25 * members[2]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [1e-3, 1.0, 20.0, 80.0])
def test_mean_of_equal_logits_is_that_logit_however_certain(size: float) -> None:
    member = torch.tensor([-size, 0.0, size]).reshape(1, 1, 3)
    found = averaged([member] * 4, [0.25] * 4)
    torch.testing.assert_close(found, member, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_certain_predictions_give_finite_logits(activation: Activation, dtype: torch.dtype) -> None:
    member = torch.tensor([-6e4, 6e4, math.inf, -math.inf], dtype=dtype).reshape(1, 2, 2)
    if activation == "softmax":  # of several infinities of one sign there is none
        member = member.clamp(-6e4, 6e4)
    found = averaged([member, member], [0.5, 0.5], activation=activation)
    assert found.isfinite().all()
    least = math.log(torch.finfo(found.dtype).tiny)
    assert float(found.min()) == pytest.approx(least, rel=1e-6)


def test_nan_is_not_hidden() -> None:
    member = torch.tensor([[[math.nan, 0.0]]])
    found = averaged([member, torch.zeros(1, 1, 2)], [0.5, 0.5])
    assert found.isnan().tolist() == [[[True, False]]]


@pytest.mark.parametrize("domain", ["probability", "logit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_average_of_half_precision_is_that_of_its_values_in_float32(
    dtype: torch.dtype, domain: Domain
) -> None:
    members = [logits(n).to(dtype) for n in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        found = averaged(members, [1 / 3] * 3, domain=domain)
    assert found.dtype == torch.float32
    expected = averaged([member.double() for member in members], [1 / 3] * 3, domain=domain)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("domain", ["probability", "logit"])
def test_predictions_are_not_written_to(domain: Domain) -> None:
    members = [logits(n) for n in range(2)]
    before = [member.clone() for member in members]
    averaged(members, [0.5, 0.5], domain=domain)
    assert all(map(torch.equal, members, before))


def test_memory_does_not_grow_with_the_number_of_predictions() -> None:
    average = Average()
    for seed in range(5):
        average.add(logits(seed), 0.2)
        assert sum(total.numel() for sums in average._sums for total in sums) == 2 * 120


@pytest.mark.parametrize("form", [tuple, list, dict])
def test_several_outputs_are_averaged_each_for_itself(form: type) -> None:
    first, second = [logits(n) for n in range(2)], [logits(n, 2, 1, 7) for n in range(2, 4)]
    members: list[Any] = [
        {"a": a, "b": b} if form is dict else form([a, b])
        for a, b in zip(first, second, strict=True)
    ]
    found = averaged(members, [0.5, 0.5])
    assert isinstance(found, dict if form is dict else tuple)
    tensors = list(found.values()) if form is dict else found
    assert torch.equal(tensors[0], averaged(first, [0.5, 0.5]))
    assert torch.equal(tensors[1], averaged(second, [0.5, 0.5]))


def test_predictions_of_different_shapes_are_refused() -> None:
    average = Average()
    average.add(torch.zeros(1, 1, 4, 6), 0.5)
    with pytest.raises(ConfigurationError, match=r"shape \[1, 1, 6, 4\] .* \[1, 1, 4, 6\]"):
        average.add(torch.zeros(1, 1, 6, 4), 0.5)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9).filter(any))
def test_weights_have_the_sum_1_and_keep_their_ratios(weights: list[float]) -> None:
    found = normalised_weights(weights, len(weights))
    assert sum(found) == pytest.approx(1)
    assert found == pytest.approx([weight / sum(weights) for weight in weights])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], "2 weights for 3 predictions"),
        ([1, -1, 1], r"at least 0 and not all 0, got \[1, -1, 1\]"),
        ([0, 0, 0], "not all 0"),
        ([1, math.nan, 1], "finite"),
        ([1, math.inf, 1], "finite"),
    ],
)
def test_weights_that_make_no_mean_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        normalised_weights(weights, 3)


@pytest.mark.parametrize("settings", [{"domain": "logits"}, {"activation": "relu"}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"must be .*, got 'logits'|got 'relu'"):
        Average(**settings)
