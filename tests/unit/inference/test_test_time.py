from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch import Tensor, nn

from pipeline.errors import ConfigurationError
from pipeline.inference.averages import Activation, Domain
from pipeline.inference.test_time import FlipsAndTurns, orientations

PLANES = {2: [(0, 1)], 3: [(0, 1), (0, 2), (1, 2)]}


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def convolution(dimensions: int, seed: int = 0) -> nn.Module:
    """A network that knows directions: random kernels, borders and a bias."""
    torch.manual_seed(seed)
    layer = nn.Conv2d if dimensions == 2 else nn.Conv3d
    layers = nn.Sequential(layer(1, 4, 3, padding=1), nn.Tanh(), layer(4, 2, 3, padding=1))
    return layers.requires_grad_(False).eval()


def stepped(values: Tensor, step: int | tuple[int, int]) -> Tensor:
    """Flip an axis or turn a plane by 90 degrees, as torch does it."""
    if isinstance(step, int):
        return values.flip(2 + step)
    return torch.rot90(values, 1, (2 + step[0], 2 + step[1]))


def choices(dimensions: int) -> st.SearchStrategy[tuple[list[int], list[tuple[int, int]]]]:
    flips = st.lists(st.integers(0, dimensions - 1), unique=True)
    return st.tuples(flips, st.lists(st.sampled_from(PLANES[dimensions]), unique=True))


@pytest.mark.parametrize(
    ("flips", "turns", "dimensions", "count"),
    [
        ((), (), 2, 1),
        ((1,), (), 2, 2),
        ((0, 1), (), 2, 4),
        ((), ((0, 1),), 2, 4),
        ((0,), ((0, 1),), 2, 8),
        ((0, 1), ((0, 1),), 2, 8),
        ((0, 1, 2), (), 3, 8),
        ((0, 1, 2), ((1, 2),), 3, 16),
        ((), ((0, 1), (1, 2)), 3, 24),
        ((0, 1, 2), ((0, 1), (0, 2), (1, 2)), 3, 48),
    ],
)
def test_orientations_are_as_many_as_the_symmetries(
    flips: tuple[int, ...], turns: tuple[tuple[int, int], ...], dimensions: int, count: int
) -> None:
    assert len(orientations(flips, turns, dimensions)) == count


@given(chosen=st.sampled_from([2, 3]).flatmap(lambda n: st.tuples(st.just(n), choices(n))))
def test_orientations_are_what_torch_reaches_by_flips_and_turns_each_once(
    chosen: tuple[int, tuple[list[int], list[tuple[int, int]]]],
) -> None:
    dimensions, (flips, turns) = chosen
    cube = torch.arange(3**dimensions).reshape(1, 1, *(3,) * dimensions)
    reached = {tuple(cube.flatten().tolist()): cube}
    waiting = [cube]
    while waiting:
        current = waiting.pop()
        for step in [*flips, *turns]:
            found = stepped(current, step)
            if tuple(found.flatten().tolist()) not in reached:
                reached[tuple(found.flatten().tolist())] = found
                waiting.append(found)
    ways = orientations(tuple(flips), tuple(turns), dimensions)
    given_ways = [tuple(way.apply(cube).flatten().tolist()) for way in ways]
    assert sorted(given_ways) == sorted(reached)


@pytest.mark.parametrize("shape", [(1, 2, 4, 7), (2, 1, 3, 4, 5)])
def test_undo_turns_back_what_apply_turned(shape: tuple[int, ...]) -> None:
    values, dimensions = image(*shape), len(shape) - 2
    ways = orientations(tuple(range(dimensions)), tuple(PLANES[dimensions]), dimensions)
    assert torch.equal(ways[0].apply(values), values)
    for way in ways:
        assert torch.equal(way.undo(way.apply(values)), values)


def test_two_orientations_make_the_one_that_then_gives() -> None:
    values = image(1, 1, 3, 4, 5)
    ways = orientations((0,), ((0, 1), (1, 2)), 3)
    for one, other in itertools.product(ways[:12], ways):
        assert torch.equal(one.then(other).apply(values), other.apply(one.apply(values)))


@given(chosen=choices(3), domain=st.sampled_from(["probability", "logit"]))
def test_pointwise_network_gives_the_same_with_augmentation(chosen: Any, domain: Domain) -> None:
    flips, turns = chosen
    values = 8 * image(2, 2, 4, 5, 3)
    found = FlipsAndTurns(lambda window: 1.5 * window - 2, flips, turns, domain)(values)
    torch.testing.assert_close(found, 1.5 * values - 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("domain", ["probability", "logit"])
@settings(max_examples=12)
@given(chosen=st.sampled_from([2, 3]).flatmap(lambda n: st.tuples(st.just(n), choices(n))))
def test_augmented_network_commutes_with_its_flips_and_turns(
    domain: Domain, activation: Activation, chosen: Any
) -> None:
    dimensions, (flips, turns) = chosen
    augmented = FlipsAndTurns(convolution(dimensions), flips, turns, domain, activation)
    values = image(1, 1, *(5, 4, 6)[:dimensions])
    answer = augmented(values)
    # What commutes with these commutes with all that they lead to.
    for step in [*flips, *turns]:
        torch.testing.assert_close(
            augmented(stepped(values, step)), stepped(answer, step), rtol=1e-5, atol=2e-6
        )


def test_the_plain_network_does_not_commute() -> None:
    network, values = convolution(2), image(1, 1, 6, 6)
    assert not torch.allclose(network(values.flip(2)), network(values).flip(2), atol=1e-3)


@pytest.mark.parametrize("domain", ["probability", "logit"])
def test_mean_is_the_brute_force_mean_over_flips_and_turns(domain: Domain) -> None:
    network, values = convolution(2), image(2, 1, 6, 9)
    found = FlipsAndTurns(network, [1], [(0, 1)], domain)(values)
    terms = []
    for turns, flip in itertools.product(range(4), [False, True]):
        turned = torch.rot90(values, turns, (2, 3))
        answer = network(turned.flip(3) if flip else turned)
        back = torch.rot90(answer.flip(3) if flip else answer, -turns, (2, 3))
        terms.append(torch.sigmoid(back) if domain == "probability" else back)
    mean = torch.stack(terms).mean(0)
    expected = torch.logit(mean) if domain == "probability" else mean
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_each_orientation_is_run_once_with_the_turned_shape() -> None:
    seen: list[tuple[int, ...]] = []

    def watch(window: Tensor) -> Tensor:
        seen.append(tuple(window.shape))
        return window

    FlipsAndTurns(watch, [0, 1], [(0, 1)])(image(1, 1, 4, 7))
    assert sorted(seen) == [(1, 1, 4, 7)] * 4 + [(1, 1, 7, 4)] * 4


def test_without_flips_and_turns_the_networks_own_output_comes_back() -> None:
    given_back = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)
    assert FlipsAndTurns(lambda _: given_back)(image(1, 1, 2, 2)) is given_back


def test_further_arguments_reach_the_network() -> None:
    def scale(window: Tensor, factor: float, *, offset: float) -> Tensor:
        return window * factor + offset

    values = image(1, 1, 4, 4)
    found = FlipsAndTurns(scale, [0])(values, 2.0, offset=1.0)
    torch.testing.assert_close(found, values * 2 + 1)


@pytest.mark.parametrize("form", [tuple, dict])
def test_several_outputs_are_turned_back_each(form: type) -> None:
    def network(window: Tensor) -> Any:
        outputs = {"mask": 2 * window, "rows": window[..., ::2, ::2], "class": window.mean((2, 3))}
        return outputs if form is dict else tuple(outputs.values())

    values = image(2, 3, 5, 7)
    expected, found = network(values), FlipsAndTurns(network, [0, 1], [(0, 1)])(values)
    assert type(found) is form
    if form is dict:
        assert list(found) == list(expected)
        found, expected = tuple(found.values()), tuple(expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("domain", ["probability", "logit"])
def test_bfloat16_networks_are_averaged_in_float32(domain: Domain) -> None:
    network = convolution(2).to(torch.bfloat16)
    values = image(1, 1, 6, 6).to(torch.bfloat16)
    found = FlipsAndTurns(network, [0, 1], (), domain)(values)
    exact = FlipsAndTurns(lambda window: network(window).double(), [0, 1], (), domain)(values)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_under_autocast_the_mean_is_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        found = FlipsAndTurns(convolution(2), [0], [(0, 1)])(image(1, 1, 6, 6))
    assert found.dtype == torch.float32


def test_windows_with_metadata_are_turned_too() -> None:
    values, augmented = image(1, 1, 5, 6), FlipsAndTurns(convolution(2), [0], [(0, 1)])
    torch.testing.assert_close(
        torch.as_tensor(augmented(MetaTensor(values))).as_subclass(Tensor), augmented(values)
    )


def test_window_and_output_are_not_written_to() -> None:
    values = image(1, 1, 4, 4)
    before = values.clone()
    FlipsAndTurns(nn.Identity(), [0, 1], [(0, 1)])(values)
    assert torch.equal(values, before)


def test_the_network_moves_with_the_augmentation() -> None:
    augmented = FlipsAndTurns(convolution(2).train(), [0])
    assert not augmented.eval().network.training
    assert {p.dtype for p in augmented.double().parameters()} == {torch.float64}


def test_settings_are_plain_and_do_not_depend_on_the_way_they_were_written() -> None:
    found = FlipsAndTurns(nn.Identity(), [1, 0, 1], [[1, 0], (0, 1)]).settings()
    assert found == {
        "flips": [0, 1], "turns": [[0, 1]], "domain": "probability", "activation": "sigmoid",
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"flips": [-1]}, "spatial axes 0, 1, ..., got -1"),
        ({"flips": [True]}, "got True"),
        ({"flips": ["x"]}, "got 'x'"),
        ({"turns": [[0, 0]]}, r"pairs of different axes such as \[0, 1\], got \[\[0, 0\]\]"),
        ({"turns": [0, 1]}, r"pairs of different axes such as \[0, 1\], got \[0, 1\]"),
        ({"turns": [[0, 1, 2]]}, "pairs of different axes"),
        ({"domain": "log"}, "domain must be probability or logit, got 'log'"),
        ({"activation": None}, "activation must be sigmoid or softmax, got None"),
    ],
)
def test_settings_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FlipsAndTurns(nn.Identity(), **wrong)


def test_axis_that_a_window_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="name axis 2, but a window has 2 spatial axes"):
        FlipsAndTurns(nn.Identity(), [2])(image(1, 1, 4, 4))


def test_output_that_cannot_be_turned_back_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"shape \[1, 1, 4\] cannot be turned back"):
        FlipsAndTurns(lambda window: window.mean(3), [0])(image(1, 1, 4, 4))
