from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigurationError, InputError
from pipeline.oct.transforms import RenderLabeld
from pipeline.oct.transforms.geometry import (
    RandCropColumnsd,
    RandFlipColumnsd,
    RandShiftRowsd,
    RandTiltd,
)

HEIGHT, WIDTH = 90, 48


def case(low: float = 20.0) -> dict[str, Any]:
    """A B-scan whose grey values are its own label, so that both can be compared afterwards."""
    ilm = low + 6 * torch.sin(torch.arange(WIDTH) / 9)
    bm = ilm + 24.25
    ilm[10:14], bm[12:18] = torch.nan, torch.nan
    drawn = {"image": torch.zeros(1, HEIGHT, WIDTH), "ilm": ilm, "bm": bm, "name": "drawn"}
    drawn["image"] = RenderLabeld()(drawn)["label"].float()
    return drawn


TRANSFORMS = {
    "flip": RandFlipColumnsd(prob=1.0),
    "shift": RandShiftRowsd(prob=1.0),
    "tilt": RandTiltd(prob=1.0),
    "crop": RandCropColumnsd(width_px=20),
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())


@every_transform
@given(seed=st.integers(0, 10_000), low=st.floats(15, 50))
def test_the_label_of_the_changed_rows_is_the_changed_label(transform, seed, low) -> None:
    transform.set_random_state(seed=seed)
    changed = transform(case(low))
    label = RenderLabeld()(changed)["label"]
    row = torch.arange(HEIGHT)[:, None]
    # What comes in at one end is of the other; it never comes near the layers.
    near = (row > changed["ilm"] - 5) & (row < changed["bm"] + 5)
    ignored = label[0] == 255
    assert near.any()
    assert ignored.any() or label.shape[2] < WIDTH
    assert torch.equal(label[0][near | ignored].float(), changed["image"][0][near | ignored])


@every_transform
def test_the_same_seed_draws_the_same_and_another_one_something_else(transform) -> None:
    results = []
    for seed in (1, 1, 2, 3, 4):
        transform.set_random_state(seed=seed)
        results.append(transform(case())["ilm"].nan_to_num(-1).tolist())
    assert results[0] == results[1]
    assert len({tuple(result) for result in results}) > 1 or isinstance(transform, RandFlipColumnsd)


@every_transform
def test_gaps_stay_gaps_and_the_input_stays_as_it_is(transform) -> None:
    before = case()
    given_case = {
        key: value.clone() if torch.is_tensor(value) else value for key, value in before.items()
    }
    changed = transform(given_case)
    for key in ("image", "ilm", "bm"):
        torch.testing.assert_close(given_case[key], before[key], equal_nan=True)
    if changed["ilm"].shape == before["ilm"].shape:
        assert changed["ilm"].isnan().sum() == before["ilm"].isnan().sum()


@pytest.mark.parametrize(
    "transform", [RandFlipColumnsd(prob=0), RandShiftRowsd(prob=0), RandTiltd(prob=0)]
)
def test_probability_0_changes_nothing(transform) -> None:
    before, after = case(), transform(case())
    for key in ("image", "ilm", "bm"):
        torch.testing.assert_close(after[key], before[key], equal_nan=True)


def test_flipping_twice_gives_the_bscan_back() -> None:
    flip = TRANSFORMS["flip"]
    once = flip(case())
    assert not torch.equal(once["image"], case()["image"])
    torch.testing.assert_close(flip(once)["ilm"], case()["ilm"], equal_nan=True)


@pytest.mark.parametrize("name", ["shift", "tilt"])
@given(seed=st.integers(0, 10_000), low=st.floats(15, 50))
def test_rows_never_leave_the_frame(name, seed, low) -> None:
    transform = TRANSFORMS[name]
    transform.set_random_state(seed=seed)
    changed = transform(case(low))
    known = torch.cat([changed[key][changed[key].isfinite()] for key in ("ilm", "bm")])
    assert known.min() > 5
    assert known.max() < HEIGHT - 5


@pytest.mark.parametrize("name", ["shift", "tilt"])
def test_rows_move_by_whole_pixels(name) -> None:
    transform = TRANSFORMS[name]
    transform.set_random_state(seed=3)
    moved = transform(case())["ilm"] - case()["ilm"]
    moved = moved[moved.isfinite()]
    assert moved.abs().max() >= 1
    torch.testing.assert_close(moved, moved.round(), atol=1e-4, rtol=0)


def test_a_tilt_is_a_slope_around_the_middle() -> None:
    tilt = RandTiltd(prob=1.0, slope=0.35)
    tilt.set_random_state(seed=5)
    flat = {"image": torch.zeros(1, 400, WIDTH), "ilm": torch.full((WIDTH,), 200.0)}
    moved = tilt(flat)["ilm"] - 200
    slope = tilt.drawn
    assert 0 < abs(slope) <= 0.35
    expected = slope * (torch.arange(WIDTH) - (WIDTH - 1) / 2)
    assert (moved - expected).abs().max() <= 0.5 + 1e-4


def test_rows_that_touch_an_end_already_are_not_moved_towards_it() -> None:
    near = case(7.0)  # the ILM comes to row 1
    for seed in range(8):
        for name in ("shift", "tilt"):
            TRANSFORMS[name].set_random_state(seed=seed)
            changed = TRANSFORMS[name](near)
            moved = changed["ilm"] - near["ilm"]
            assert moved[near["ilm"].nan_to_num(99.0) < 6].min() >= 0


def test_a_bscan_without_rows_is_changed_too() -> None:
    bare = {"image": case()["image"]}
    for transform in TRANSFORMS.values():
        assert set(transform(bare)) == {"image"}


def test_a_bscan_narrower_than_the_crop_is_named() -> None:
    with pytest.raises(InputError, match=r"drawn: 48 columns, fewer than the 64 of a crop"):
        RandCropColumnsd(width_px=64)(case())


def test_a_negative_range_is_named() -> None:
    with pytest.raises(ConfigurationError, match="of RandTiltd must not be negative"):
        RandTiltd(slope=-0.1)
