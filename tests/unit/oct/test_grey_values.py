from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigurationError
from pipeline.oct.transforms.grey_values import (
    BlurGaussiand,
    EqualizeTiles,
    EqualizeTilesd,
    NormalizeGreyd,
)


def image(height: int = 64, width: int = 80) -> Tensor:
    grey = np.random.default_rng(0).beta(1, 6, (1, height, width))
    return torch.from_numpy(grey.astype(np.float32))


def test_a_point_becomes_the_gaussian_of_five_by_five() -> None:
    point = torch.zeros(1, 11, 11)
    point[0, 5, 5] = 1
    weights = np.exp(-0.5 * np.arange(-2, 3.0) ** 2)
    weights /= weights.sum()
    expected = np.zeros((11, 11))
    expected[3:8, 3:8] = np.outer(weights, weights)
    blurred = BlurGaussiand()({"image": point})["image"]
    np.testing.assert_allclose(blurred[0], expected, atol=1e-7)


def test_blur_mirrors_at_the_border_without_repeating_it() -> None:
    ramp = torch.arange(8.0).expand(1, 6, 8)
    weights = np.exp(-0.5 * np.arange(-2, 3.0) ** 2)
    weights /= weights.sum()
    blurred = BlurGaussiand()({"image": ramp})["image"]
    np.testing.assert_allclose(blurred[0, :, 0], weights @ [2, 1, 0, 1, 2], rtol=1e-6)
    np.testing.assert_allclose(blurred[0, :, 3], 3, rtol=1e-6)


@pytest.mark.parametrize("shape", [(64, 80), (480, 768), (61, 43), (9, 5)])
def test_equalised_values_lie_between_0_and_1_in_the_same_shape(shape: tuple[int, int]) -> None:
    equalised = EqualizeTiles()(image(*shape))
    assert equalised.shape == (1, *shape)
    assert equalised.dtype == torch.float32
    assert equalised.min() >= 0
    assert equalised.max() <= 1


def test_a_limit_of_1_hardly_changes_and_a_high_one_spreads_the_grey_values() -> None:
    bscan = image(256, 256)
    stretched = (bscan - bscan.min()) / (bscan.max() - bscan.min())
    changes = [
        float((EqualizeTiles(limit, (4, 4))(bscan) - stretched).mean()) for limit in (1.0, 2.0, 8.0)
    ]
    assert abs(changes[0]) < 0.02
    assert changes[0] + 0.05 < changes[1] < changes[2]


def test_no_grey_value_of_a_tile_is_spread_further_than_the_limit() -> None:
    """The limit in OpenCV's units: the slope of the mapping, where the histogram is full."""
    ramp = torch.linspace(0, 1, 256 * 256).reshape(1, 256, 256)[:, torch.randperm(256)]
    ramp = ramp**4  # many dark pixels
    steps = torch.sort(EqualizeTiles(2.0, (1, 1))(ramp).flatten()).values
    grey = torch.sort(ramp.flatten()).values
    dark = grey < 0.2
    slope = (steps[dark].max() - steps[dark].min()) / (grey[dark].max() - grey[dark].min())
    assert 1.3 < slope < 2.1


def test_tiles_are_equalised_apart() -> None:
    """A dark half gains contrast that the whole histogram would not give it."""
    bscan = image(256, 256)
    bscan[..., :128] *= 0.2
    one, many = (EqualizeTiles(100.0, tiles)(bscan)[0, :, :64].std() for tiles in ((1, 1), (4, 4)))
    assert many > 1.2 * one


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_a_constant_bscan_stays_as_it_is(value: float) -> None:
    bscan = torch.full((1, 32, 32), value)
    assert torch.equal(EqualizeTilesd()({"image": bscan})["image"], bscan)


def test_each_step_can_be_left_out() -> None:
    case = {"image": image()}
    for step in (
        BlurGaussiand(sigma_px=None),
        EqualizeTilesd(clip_limit=None),
        NormalizeGreyd(mean=0.0, std=1.0),
    ):
        assert torch.equal(step(case)["image"], case["image"])


def test_mean_and_deviation_come_from_the_settings() -> None:
    case = NormalizeGreyd(mean=0.25, std=0.5)({"image": torch.tensor([[[0.25, 1.0]]])})
    assert case["image"].tolist() == [[[0.0, 1.5]]]


def test_a_step_leaves_its_input_alone() -> None:
    before = image()
    case = {"image": before.clone()}
    for step in (BlurGaussiand(), EqualizeTilesd(), NormalizeGreyd(mean=0.1)):
        step(case)
        assert torch.equal(case["image"], before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlurGaussiand(sigma_px=0), "sigma_px must be positive or null"),
        (lambda: BlurGaussiand(size_px=4), "size_px must be odd"),
        (lambda: EqualizeTiles(0), "clip_limit must be above 0"),
        (lambda: EqualizeTiles(tiles=(8,)), "tiles must be two"),
        (lambda: NormalizeGreyd(std=0), "std must be positive"),
    ],
    ids=["sigma", "size", "limit", "tiles", "std"],
)
def test_a_wrong_setting_is_named(make, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
