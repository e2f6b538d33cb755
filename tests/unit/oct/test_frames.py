from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.oct.coordinates import Layers
from pipeline.oct.frames import columns_to_width, layers_to_frame, rows_to_height

sizes = st.integers(1, 1100)


def some_layers(width: int = 40, seed: int = 0) -> Layers:
    rng = np.random.default_rng(seed)
    ilm = rng.uniform(100, 150, (3, width))
    thickness, sigmas = rng.uniform(50, 90, (3, width)), rng.uniform(0, 3, (2, 3, width))
    return Layers(ilm, ilm + thickness, *sigmas, *(rng.random((2, 3, width)) < 0.8))


def resized(image: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Return `image` as torch resizes it: by the centres of pixels."""
    tensor = torch.from_numpy(image)[None, None]
    by_torch = torch.nn.functional.interpolate(tensor, (height, width), mode="bilinear")
    return by_torch[0, 0].numpy()


@pytest.mark.parametrize(
    ("row", "height", "new_height", "expected"),
    [
        (150.0, 480, 496, 150.5 * 496 / 480 - 0.5),  # 155.017; the original left it at 150
        (250.0, 480, 496, 258.35),
        (0.0, 496, 480, -1 / 62),
        (3.0, 8, 16, 6.5),
        (3.0, 8, 4, 1.25),
        (7.25, 480, 480, 7.25),
    ],
)
def test_rows_by_hand(row: float, height: int, new_height: int, expected: float) -> None:
    assert rows_to_height(np.array(row), height, new_height) == pytest.approx(expected)


@given(height=sizes, new_height=sizes)
def test_rows_come_back(height: int, new_height: int) -> None:
    rows = np.append(np.linspace(-1, height + 1, 50), np.nan)
    there = rows_to_height(rows, height, new_height)
    np.testing.assert_allclose(rows_to_height(there, new_height, height), rows, atol=1e-9)


@given(first=sizes, second=sizes, third=sizes)
def test_a_way_round_ends_where_the_straight_way_does(first: int, second: int, third: int) -> None:
    rows = np.linspace(0, first, 20)
    straight = rows_to_height(rows, first, third)
    by_way_of = rows_to_height(rows_to_height(rows, first, second), second, third)
    np.testing.assert_allclose(by_way_of, straight, atol=1e-9)


@pytest.mark.parametrize("row", [40.0, 150.0, 250.25, 401.0])
@pytest.mark.parametrize(("height", "new_height"), [(496, 480), (480, 496), (512, 480), (480, 224)])
def test_a_row_goes_where_resizing_the_image_moves_it(
    row: float, height: int, new_height: int
) -> None:
    ramp = resized(np.arange(float(height))[:, None], new_height, 1)[:, 0]
    found = np.interp(row, ramp, np.arange(new_height))
    assert rows_to_height(np.array(row), height, new_height) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("row", [1, 40, 151, 250, 401, 465])
@pytest.mark.parametrize("height", [470, 496, 512])
def test_a_step_found_in_the_frame_of_the_network_comes_back_within_half_a_row(
    row: int, height: int
) -> None:
    image = (np.arange(height) >= row).astype(float)[:, None]
    found = int((resized(image, 480, 1)[:, 0] >= 0.5).argmax())
    back = rows_to_height(np.array(found), 480, height)
    assert back == pytest.approx(row, abs=0.5 * height / 480 + 0.05)


@given(width=st.integers(1, 60), new_width=st.integers(1, 90))
def test_columns_are_interpolated_as_torch_resizes(width: int, new_width: int) -> None:
    values = np.random.default_rng(width).uniform(0, 100, (2, width))
    expected = np.stack([resized(line[None], 1, new_width)[0] for line in values])
    np.testing.assert_allclose(columns_to_width(values, new_width), expected, atol=1e-9)


@given(width=st.integers(2, 60), new_width=st.integers(2, 90))
def test_a_straight_line_stays_straight(width: int, new_width: int) -> None:
    slope = 3.0 * np.arange(width) + 7
    centres = np.clip((np.arange(new_width) + 0.5) * width / new_width - 0.5, 0, width - 1)
    np.testing.assert_allclose(columns_to_width(slope, new_width), 3 * centres + 7, atol=1e-9)


def test_nan_spreads_to_the_columns_it_has_a_part_in_and_no_further() -> None:
    values = np.array([1.0, np.nan, 3.0, 4.0])
    np.testing.assert_array_equal(columns_to_width(values, 4), values)
    spread = columns_to_width(values, 8)
    np.testing.assert_array_equal(np.isnan(spread), [0, 1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_allclose(spread[[0, 5, 6, 7]], [1, 3.25, 3.75, 4])


def test_layers_of_the_same_frame_stay_what_they_are() -> None:
    layers = some_layers()
    same = layers_to_frame(layers, (480, 40), (480, 40))
    for name in ("ilm_px", "bm_px", "ilm_sigma_px", "bm_sigma_px", "ilm_valid", "bm_valid"):
        np.testing.assert_allclose(getattr(same, name), getattr(layers, name), atol=1e-12)


@given(width=st.integers(1, 60), new_width=st.integers(1, 90), new_height=st.integers(1, 900))
def test_layers_stay_ordered_in_another_frame(width: int, new_width: int, new_height: int) -> None:
    layers = layers_to_frame(some_layers(width), (480, width), (new_height, new_width))
    assert layers.ilm_px.shape == layers.bm_valid.shape == (3, new_width)
    assert (layers.ilm_px <= layers.bm_px).all()


def test_sigmas_grow_with_the_rows_and_thickness_too() -> None:
    layers = some_layers()
    taller = layers_to_frame(layers, (480, 40), (960, 40))
    np.testing.assert_allclose(taller.bm_sigma_px, 2 * layers.bm_sigma_px)
    thickness = layers.bm_px - layers.ilm_px
    np.testing.assert_allclose(taller.bm_px - taller.ilm_px, 2 * thickness)


def test_a_column_is_valid_where_all_that_have_a_part_in_it_are() -> None:
    layers = some_layers(4)
    layers.ilm_valid[:] = [True, False, True, True]
    wider = layers_to_frame(layers, (480, 4), (480, 8))
    assert wider.ilm_valid[0].tolist() == [True, False, False, False, False, True, True, True]


def test_frames_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="expected 1 or more"):
        rows_to_height(np.zeros(3), 480, 0)
    with pytest.raises(InputError, match="expected 1 or more"):
        columns_to_width(np.zeros(3), 0)
    with pytest.raises(InputError, match="40 columns, their frame 41"):
        layers_to_frame(some_layers(), (480, 41), (496, 41))
