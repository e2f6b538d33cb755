from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import Compose

from pipeline.errors import ConfigurationError
from pipeline.oct.phantom import oct_phantom
from pipeline.oct.transforms.appearance import RandHazed, RandNoiseFloord, RandShadowsd

TRANSFORMS = {
    "floor": RandNoiseFloord(prob=1.0),
    "haze": RandHazed(prob=1.0),
    "shadows": RandShadowsd(prob=1.0),
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())


def case() -> dict[str, torch.Tensor]:
    phantom = oct_phantom(0, (128, 128))
    return {
        "image": torch.from_numpy(phantom.image.astype(np.float32) / 255)[None],
        "ilm": torch.from_numpy(phantom.ilm),
    }


def drawn(transform, seed: int, given: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    transform.set_random_state(seed=seed)
    return transform(given or case())["image"]


@every_transform
def test_values_stay_between_0_and_1_and_rows_as_they_are(transform) -> None:
    for seed in range(10):
        image = drawn(transform, seed, {"image": case()["image"].clamp(min=0.8)})
        assert image.dtype == torch.float32
        assert image.shape == (1, 128, 128)
        assert image.min() >= 0
        assert image.max() <= 1
    assert torch.equal(transform(case())["ilm"], case()["ilm"])


@every_transform
def test_a_seed_decides_and_the_input_stays_as_it_is(transform) -> None:
    given = case()
    first, second, other = (drawn(transform, seed, given) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(given["image"], case()["image"])


@pytest.mark.parametrize("make", [RandNoiseFloord, RandHazed, RandShadowsd])
def test_probability_0_changes_nothing(make) -> None:
    assert torch.equal(make(prob=0.0)(case())["image"], case()["image"])


def test_nothing_is_darker_than_before_under_noise_and_its_mean_is_the_level() -> None:
    transform = RandNoiseFloord(prob=1.0, level=(0.2, 0.2))
    assert (drawn(transform, 0) >= case()["image"]).all()
    dark = drawn(transform, 0, {"image": torch.zeros(1, 200, 200)})
    assert abs(float(dark.mean()) - 0.2) < 0.005


def test_haze_brightens_one_band_of_rows() -> None:
    for seed in range(10):
        change = drawn(TRANSFORMS["haze"], seed, {"image": torch.zeros(1, 128, 64)})[0]
        assert (change == change[:, :1]).all()
        rows = change[:, 0].nonzero().flatten()
        assert 4 <= len(rows) <= 30
        assert rows[-1] - rows[0] + 1 == len(rows)
        assert change.max() <= 0.35


def test_shadows_darken_whole_columns() -> None:
    for seed in range(10):
        light = drawn(TRANSFORMS["shadows"], seed, {"image": torch.ones(1, 64, 300)})[0]
        assert (light == light[:1]).all()
        dark = (light[0] < 1).sum()
        assert 4 <= dark <= 3 * 16
        assert light[light < 1].max() <= 0.6


def test_a_chain_draws_what_its_seed_says() -> None:
    """Randomness comes from `self.R` alone: the global generators do not matter."""
    chain = Compose(list(TRANSFORMS.values()))
    results = []
    for state in (1, 2):
        np.random.seed(state)  # noqa: NPY002 - the legacy state is what must not matter
        torch.manual_seed(state)
        results.append(drawn(chain, 7))
    assert torch.equal(*results)


@pytest.mark.parametrize("limits", [(0.3, 0.1), (-0.1, 0.3)])
def test_a_range_that_is_none_is_named(limits: tuple[float, float]) -> None:
    with pytest.raises(ConfigurationError, match="level must be two numbers from 0"):
        RandNoiseFloord(level=limits)
