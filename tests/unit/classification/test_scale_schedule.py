from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.classification.scale_schedule import FixedScale, ProgressiveScales, RandomScales
from pipeline.classification.scales import checked_scales, resize
from pipeline.errors import ConfigurationError

SIZES = st.lists(st.integers(1, 512), min_size=1, max_size=5, unique=True)


def by_epoch(schedule: ProgressiveScales, epochs: int) -> list[int]:
    return [schedule(epoch, 0) for epoch in range(1, epochs + 1)]


def test_phases_take_their_shares() -> None:
    equal = ProgressiveScales([64, 96, 128], 30, 128)
    assert by_epoch(equal, 30) == [64] * 10 + [96] * 10 + [128] * 10
    shared = ProgressiveScales([128, 64, 96], 8, 128, epoch_shares=[1, 1, 2])
    assert by_epoch(shared, 8) == [64] * 2 + [96] * 2 + [128] * 4
    assert str(shared) == "64 px in epochs 1 to 2, 96 px in epochs 3 to 4, 128 px in epochs 5 to 8"


@given(sizes=SIZES, epochs=st.integers(1, 60), data=st.data())
def test_sizes_grow_and_the_last_epoch_is_at_the_evaluation_scale(
    sizes: list[int], epochs: int, data: st.DataObject
) -> None:
    shares = st.lists(st.floats(0.01, 9), min_size=len(sizes), max_size=len(sizes))
    schedule = ProgressiveScales(sizes, epochs, max(sizes), data.draw(st.none() | shares))
    found = by_epoch(schedule, epochs)
    assert all(one <= other for one, other in pairwise(found))
    assert set(found) <= set(sizes)
    assert found[-1] == schedule(epochs + 7, 3) == max(sizes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluation_scale": 160}, r"ends at the largest of scales \[64, 128\].* got 160"),
        ({"epoch_shares": [1, 2, 3]}, r"epoch_shares must be 2 positive .* got \[1, 2, 3\]"),
        ({"epoch_shares": [0, 1]}, "epoch_shares must be 2 positive"),
        ({"epoch_shares": ["a", 1]}, "epoch_shares must be 2 positive"),
        ({"sizes_px": [64, 64]}, r"scales must be different sizes, got \[64, 64\]"),
        ({"sizes_px": [64, 0]}, "scales must be a size in pixels such as 128, got 0"),
        ({"sizes_px": [64, 96.0]}, "scales must be a size in pixels such as 128, got 96.0"),
        ({"sizes_px": 64}, r"scales must be a list such as .* got 64"),
        ({"sizes_px": []}, r"scales must be a list such as"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    given = {"sizes_px": [64, 128], "max_epochs": 4, "evaluation_scale": 128}
    with pytest.raises(ConfigurationError, match=message):
        ProgressiveScales(**given | settings)


def test_random_sizes_follow_from_seed_epoch_and_update_alone() -> None:
    places = [(epoch, update) for epoch in range(1, 21) for update in range(20)]
    forwards = RandomScales([64, 128, 96], seed=3)
    drawn = {place: forwards(*place) for place in places}
    again = RandomScales([128, 96, 64], seed=3)
    assert drawn == {place: again(*place) for place in reversed(places)}
    assert drawn != {place: RandomScales([64, 128, 96], seed=4)(*place) for place in places}
    counts = [list(drawn.values()).count(size) for size in (64, 96, 128)]
    assert min(counts) > 400 / 3 * 0.75


def test_a_fixed_size_stays() -> None:
    assert FixedScale(128)(1, 0) == FixedScale(128)(40, 7) == 128
    with pytest.raises(ConfigurationError, match="evaluation_scale must be a size"):
        FixedScale(True)


def test_sizes_are_sorted_from_the_largest() -> None:
    assert checked_scales("scales", [64, 128, 96]) == (128, 96, 64)


# The images


def test_images_of_the_size_are_left_as_they_are() -> None:
    images = torch.rand(2, 3, 16, 16)
    assert resize(images, 16) is images


@pytest.mark.parametrize("size", [4, 7, 16, 33])
def test_a_constant_stays_constant_at_any_size(size: int) -> None:
    resized = resize(torch.full((2, 1, 20, 16), 0.3), size)
    assert resized.shape == (2, 1, size, size)
    torch.testing.assert_close(resized, torch.full_like(resized, 0.3))


def test_small_images_are_means_over_areas() -> None:
    """Every third pixel of a checkerboard is a checkerboard again; its mean is grey."""
    board = (torch.arange(33)[:, None] + torch.arange(33)) % 2
    small = resize(board[None, None].double(), 11)
    torch.testing.assert_close(small, torch.full_like(small, 0.5), rtol=0, atol=0.05)


def test_each_image_is_resized_by_itself() -> None:
    images = torch.rand(3, 3, 16, 16)
    each = torch.cat([resize(image[None], 9) for image in images])
    torch.testing.assert_close(resize(images, 9), each)
