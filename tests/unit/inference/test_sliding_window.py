from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from pipeline.errors import ConfigurationError, ResourceError
from pipeline.inference.blending import WEIGHTS, Blending
from pipeline.inference.passes import Passes
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
    weights=st.sampled_from(WEIGHTS),
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
    weights=st.sampled_from(WEIGHTS),
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


def shapes_seen(roi: Sequence[int], values: Tensor, **settings: Any) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []

    def watch(window: Tensor) -> Tensor:
        seen.append(tuple(window.shape))
        return window

    assert SlidingWindow(roi, **settings)(values, watch).shape == values.shape
    return seen


@pytest.mark.parametrize("shape", [(1, 1, 7, 9), (1, 1, 16, 16), (1, 1, 16, 3)])
def test_window_shrinks_to_the_image_where_asked(shape: tuple[int, ...]) -> None:
    assert shapes_seen((16, 16), image(*shape), small="shrink") == [shape]


def test_window_shrinks_along_short_axes_only() -> None:
    seen = shapes_seen((16, 16), image(1, 1, 40, 10), small="shrink", overlap=12)
    assert set(seen) == {(1, 1, 16, 10)}


def test_image_that_a_window_shrinks_to_gives_exactly_the_networks_output(
    network: nn.Module,
) -> None:
    values = image(1, 1, 9, 11)
    found = SlidingWindow((16, 16), small="shrink")(values, network)
    assert torch.equal(found, network(values))


@pytest.mark.parametrize("shape", [(1, 1, 7, 40), (2, 1, 9, 11), (1, 1, 16, 3)])
@pytest.mark.parametrize("mode", ["constant", "replicate"])
def test_small_image_is_padded_as_monai_pads_it(
    network: nn.Module, shape: tuple[int, ...], mode: str
) -> None:
    values = image(*shape)
    found = SlidingWindow((16, 16), padding_mode=mode)(values, network)
    expected = SlidingWindowInferer((16, 16), mode="gaussian", padding_mode=mode)(values, network)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_real_volume_network_gives_what_monai_gives_or_near_it(weights: Any) -> None:
    torch.manual_seed(0)
    unet = BasicUNet(3, 1, 2, features=(4, 4, 8, 8, 8, 4)).eval().requires_grad_(False)
    values = image(1, 1, 37, 50, 41)
    found = SlidingWindow((32, 32, 32), 0.5, weights)(values, unet)
    mode = "constant" if weights == "constant" else "gaussian"
    expected = SlidingWindowInferer((32, 32, 32), 1, 0.5, mode=mode)(values, unet)
    if weights == "separable":  # other weights, hence another result between windows
        assert float((found - expected).norm() / expected.norm()) < 0.2
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def reference(values: Tensor, network: nn.Module, window: SlidingWindow) -> Tensor:
    """Blend in float64, window by window, by the definition."""
    grid = window.grid(values.shape[2:])
    blending = Blending(grid, window.weights, dtype=torch.float64)
    total, count = 0.0, torch.zeros(grid.size, dtype=torch.float64)
    for start in [s for z in grid.starts[0] for s in grid.row(z)]:
        box = tuple(slice(a, a + p) for a, p in zip(start, grid.roi, strict=True))
        output = network(values[(..., *box)].double())
        padded = torch.zeros((*output.shape[:2], *grid.size), dtype=torch.float64)
        padded[(..., *box)] = output * blending.window
        total = total + padded
        count[box] += blending.window
    return total / count  # type: ignore[return-value]


# relative to the largest value; the types' own rounding of the input is not the window's doing
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.uint8, torch.int16, torch.uint16, torch.float16, torch.bfloat16]
)
def test_every_voxel_is_right_to_the_borders_and_corners_for_any_input_type(
    weights: Any, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 1, 3, padding=1))
    layers = layers.eval().requires_grad_(False)
    field = image(1, 1, 21, 26, 19)
    values = field.to(dtype) if dtype.is_floating_point else (field.abs() * 60).to(dtype)
    window = SlidingWindow((12, 12, 12), 0.5, weights)
    expected = reference(values.double(), copy.deepcopy(layers).double(), window)
    error = (window(values, layers).double() - expected).abs() / expected.abs().max()
    assert float(error.max()) <= 1e-5


def test_half_network_gets_windows_in_its_own_type_and_sums_stay_float32() -> None:
    half = nn.Conv2d(1, 1, 1).to(torch.bfloat16).requires_grad_(False)
    found = SlidingWindow((16, 16), 0.5)(image(1, 1, 30, 30).to(torch.bfloat16), half)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("form", ["tuple", "dictionary"])
@pytest.mark.parametrize("shape", [(2, 1, 40, 30), (1, 1, 10, 10)])
def test_several_outputs_come_back_in_the_networks_form(form: str, shape: tuple[int, ...]) -> None:
    def two(window: Tensor) -> Any:
        pair = (window, torch.cat([window, -window], 1))
        return pair if form == "tuple" else {"a": pair[0], "b": pair[1]}

    values = image(*shape)
    found = SlidingWindow((16, 16), 0.5)(values, two)
    first, second = found if form == "tuple" else (found["a"], found["b"])
    torch.testing.assert_close(first, values, rtol=0, atol=1e-6)
    torch.testing.assert_close(second, torch.cat([values, -values], 1), rtol=0, atol=1e-6)


def test_metadata_of_the_image_stay_with_the_result() -> None:
    values = MetaTensor(image(1, 1, 20, 20), meta={"filename_or_obj": "a.png"})
    found = SlidingWindow((16, 16))(values, nn.Identity())
    assert isinstance(found, MetaTensor)
    assert found.meta["filename_or_obj"] == "a.png"


def test_network_that_writes_into_its_input_leaves_the_image_alone() -> None:
    values = image(1, 1, 20, 20)
    before = values.clone()
    found = SlidingWindow((8, 8), 0.5)(values, lambda window: window.mul_(2))
    assert torch.equal(values, before)
    torch.testing.assert_close(found, 2 * before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sw_batch_size", [1, 3])
def test_windows_without_signal_are_not_run_and_predict_the_empty_value(
    sw_batch_size: int,
) -> None:
    values = torch.zeros(1, 1, 64, 16)
    values[:, :, 40:48] = 1
    seen: list[int] = []

    def count(window: Tensor) -> Tensor:
        seen.append(len(window))
        return window + 5

    window = SlidingWindow(
        (16, 16), 0.0, sw_batch_size=sw_batch_size, skip_below=0.0, empty_value=-7.0
    )
    found = window(values, count)
    assert sum(seen) == 1
    torch.testing.assert_close(found[:, :, :32], torch.full((1, 1, 32, 16), -7.0))
    torch.testing.assert_close(found[:, :, 32:48], values[:, :, 32:48] + 5)


def test_mask_says_which_windows_are_run(network: nn.Module) -> None:
    values = image(1, 1, 64, 16)
    mask = torch.zeros(1, 1, 64, 16, dtype=torch.bool)
    mask[:, :, 50:] = True
    window = SlidingWindow((16, 16), 0.0)
    found, whole = window(values, network, mask=mask), window(values, network)
    assert torch.equal(found[:, :, 48:], whole[:, :, 48:])
    assert not found[:, :, :48].any()


def test_image_with_no_window_to_run_still_has_the_networks_channels(network: nn.Module) -> None:
    found = SlidingWindow((16, 16), skip_below=100.0, empty_value=-1.0)(
        image(1, 1, 40, 40), network
    )
    torch.testing.assert_close(found, torch.full((1, 2, 40, 40), -1.0))


def out_of_memory_above(limit: int, seen: list[int]) -> Any:
    def run(window: Tensor) -> Tensor:
        if len(window) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory: injected")
        seen.append(len(window))
        return window * 2

    return run


def test_out_of_memory_halves_the_windows_per_pass_for_good(
    caplog: pytest.LogCaptureFixture,
) -> None:
    values, seen = image(1, 1, 40, 40), list[int]()
    found = SlidingWindow((8, 8), 0.0, sw_batch_size=8)(values, out_of_memory_above(2, seen))
    torch.testing.assert_close(found, values * 2)
    assert max(seen) == 2
    assert sum(seen) == 25
    assert caplog.text.count("windows per pass from now on") == 2


def test_out_of_memory_with_one_window_frees_the_sums_before_giving_up() -> None:
    passes = Passes([out_of_memory_above(0, [])], [torch.device("cpu")])
    asked: list[bool] = []

    def release() -> bool:
        asked.append(not asked)  # the first time there is something to free
        return asked[-1]

    passes.release = release
    with pytest.raises(ResourceError, match=r"one window of \[8, 8\].*smaller roi_size"):
        list(passes.run([(0, torch.ones(1, 8, 8))]))
    assert asked == [True, False]


def test_an_error_of_the_network_is_not_taken_for_lack_of_memory() -> None:
    def fail(window: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        SlidingWindow((8, 8))(image(1, 1, 9, 9), fail)


def test_two_devices_give_the_bits_of_one(network: nn.Module) -> None:
    values = image(1, 1, 60, 50)
    one = SlidingWindow((16, 16), 0.5)(values, network)
    two = SlidingWindow((16, 16), 0.5, devices=["cpu", "cpu"])(values, network)
    assert torch.equal(one, two)


def test_weights_that_change_between_calls_are_used() -> None:
    layer = nn.Conv2d(1, 1, 1, bias=False)
    window = SlidingWindow((8, 8), 0.0)
    ones = torch.ones(1, 1, 16, 8)
    with torch.no_grad():
        for value in (2.0, 3.0):
            layer.weight.fill_(value)
            torch.testing.assert_close(window(ones, layer), ones * value)


def test_a_window_that_was_used_travels_to_another_process(network: nn.Module) -> None:
    window = SlidingWindow((16, 16), 0.5)
    values = image(1, 1, 30, 30)
    expected = window(values, network)
    assert torch.equal(pickle.loads(pickle.dumps(window))(values, network), expected)


def test_settings_are_plain_data() -> None:
    settings = SlidingWindow((16, 16), (0.5, 4), "separable").settings()
    assert json.loads(json.dumps(settings)) == settings


def test_output_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="window's own size"):
        SlidingWindow((16, 16))(image(1, 1, 20, 20), nn.AvgPool2d(2))


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
        ({"overlap": 1.0}, r"overlap must be a fraction in \[0, 1\) or .* got 1.0"),
        ({"overlap": 32}, "a number of voxels below the window's 16, got 32"),
        ({"weights": "hann"}, "weights must be one of gaussian, separable, constant, got 'hann'"),
        ({"small": "crop"}, "small must be pad or shrink, got 'crop'"),
        ({"roi_size": (16, 0)}, r"roi_size must be positive, got \[16, 0\]"),
        ({"sw_batch_size": 0}, "sw_batch_size must be auto or at least 1, got 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SlidingWindow(**{"roi_size": (16, 16), **settings})


def test_number_of_axes_is_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"roi_size \[8, 8\] has 2 axes, the image .* 3"):
        SlidingWindow((8, 8))(torch.ones(1, 1, 4, 4, 4), nn.Identity())
