from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from pipeline.errors import ConfigurationError
from pipeline.inference.sliding_window import SlidingWindow


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Two real convolutions, whose borders depend on the window."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)
    ).eval()
    return layers.requires_grad_(False)


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@given(
    height=st.integers(5, 40),
    width=st.integers(5, 40),
    roi=st.tuples(st.integers(4, 24), st.integers(4, 24)),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.8]),
    weights=st.sampled_from(["gaussian", "constant"]),
    sw_batch_size=st.sampled_from([1, 3]),
)
def test_ones_in_ones_out(
    height: int, width: int, roi: tuple[int, int], overlap: float, weights: Any, sw_batch_size: int
) -> None:
    window = SlidingWindow(roi, overlap, weights, sw_batch_size)
    ones = torch.ones(1, 1, height, width)
    torch.testing.assert_close(window(ones, nn.Identity()), ones, rtol=0, atol=1e-6)


@given(
    height=st.integers(5, 40),
    width=st.integers(5, 40),
    overlap=st.sampled_from([0.0, 0.25, 0.5]),
    weights=st.sampled_from(["gaussian", "constant"]),
)
def test_pointwise_network_gives_what_it_gives_for_the_whole_image(
    height: int, width: int, overlap: float, weights: Any
) -> None:
    values = image(1, 1, height, width)
    found = SlidingWindow((12, 16), overlap, weights)(values, torch.sigmoid)
    torch.testing.assert_close(found, torch.sigmoid(values), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap", [0.25, 0.5])
@pytest.mark.parametrize(
    ("shape", "roi"),
    [((1, 1, 40, 53), (16, 16)), ((2, 1, 33, 32), (32, 32)), ((1, 1, 50, 24), (24, 24))],
)
def test_windows_smaller_than_the_image_give_what_monai_gives(
    network: nn.Module, shape: tuple[int, ...], roi: tuple[int, int], overlap: float, weights: Any
) -> None:
    values = image(*shape)
    found = SlidingWindow(roi, overlap, weights)(values, network)
    expected = SlidingWindowInferer(roi, 1, overlap, mode=weights)(values, network)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sw_batch_size", [2, 5, 64])
def test_result_does_not_depend_on_the_windows_per_pass(
    network: nn.Module, sw_batch_size: int
) -> None:
    values = image(1, 1, 40, 44)
    expected = SlidingWindow((16, 16))(values, network)
    found = SlidingWindow((16, 16), sw_batch_size=sw_batch_size)(values, network)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def shapes_seen(roi: Sequence[int], values: Tensor) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []

    def watch(window: Tensor) -> Tensor:
        seen.append(tuple(window.shape))
        return window

    assert SlidingWindow(roi)(values, watch).shape == values.shape
    return seen


@pytest.mark.parametrize("shape", [(2, 1, 7, 9), (1, 1, 16, 16), (1, 1, 16, 3)])
def test_image_that_fits_runs_once_as_it_is(shape: tuple[int, ...]) -> None:
    assert shapes_seen((16, 16), image(*shape)) == [shape]


def test_image_that_fits_gives_exactly_the_networks_output(network: nn.Module) -> None:
    values = image(1, 1, 9, 11)
    assert torch.equal(SlidingWindow((16, 16))(values, network), network(values))


def test_image_narrower_than_the_window_is_not_padded() -> None:
    assert set(shapes_seen((16, 16), image(1, 1, 40, 10))) == {(1, 1, 16, 10)}


def test_image_stays_as_it_is_where_the_network_passes_it_on() -> None:
    values = image(1, 1, 20, 20)
    before = values.clone()
    found = SlidingWindow((8, 8), 0.5)(values, lambda window: window[:, :])
    assert torch.equal(values, before)
    torch.testing.assert_close(found, before, rtol=0, atol=1e-6)


def test_volumes_have_three_axes() -> None:
    ones = torch.ones(1, 1, 9, 10, 11)
    found = SlidingWindow((4, 16, 6), 0.5)(ones, nn.Identity())
    torch.testing.assert_close(found, ones, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [8, 24], ids=["once", "windows"])
def test_further_arguments_reach_the_network(side: int) -> None:
    def scale(window: Tensor, factor: float, *, device: float) -> Tensor:
        return window * factor + device

    ones = torch.ones(1, 1, side, side)
    found = SlidingWindow((16, 16))(ones, scale, 3.0, device=0.5)
    torch.testing.assert_close(found, ones * 3.5, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap": 1.0}, r"overlap must be in \[0, 1\), got 1.0"),
        ({"overlap": 32}, "32 of 128 px is 0.25"),
        ({"weights": "hann"}, "weights must be gaussian or constant, got 'hann'"),
        ({"roi_size": (16, 0)}, r"roi_size must be positive, got \[16, 0\]"),
        ({"sw_batch_size": 0}, "sw_batch_size must be at least 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SlidingWindow(**{"roi_size": (16, 16), **settings})


def test_number_of_axes_is_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"roi_size \[8, 8\] has 2 axes, the image .* 3"):
        SlidingWindow((8, 8))(torch.ones(1, 1, 4, 4, 4), nn.Identity())
