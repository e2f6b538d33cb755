"""A case as a picture beside its truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigurationError
from pipeline.training.panels import SideBySide


def case(side: int = 4) -> dict[str, Tensor]:
    mask = torch.zeros(1, side, side)
    mask[0, 0, 0] = 1
    return {"image": torch.linspace(-2, 3, side * side).reshape(1, side, side), "label": mask,
            "pred": mask * 0.5}  # fmt: skip


def test_a_row_shows_input_truth_and_prediction() -> None:
    row = SideBySide()(case())
    assert row.dtype == torch.uint8
    assert row.shape == (3, 4, 3 * 4 + 2 * 4)
    assert row[:, 0, 0].tolist() == [0] * 3
    assert row[:, 3, 3].tolist() == [255] * 3  # brightest pixel of the input
    assert row[:, 0, 8].tolist() == [255] * 3  # truth 1
    assert row[:, 0, 16].tolist() == [128] * 3  # prediction 0.5
    assert row[:, 1, 8].tolist() == row[:, 1, 16].tolist() == [0] * 3


def test_what_the_truth_ignores_is_grey_and_dims_nothing() -> None:
    item = case()
    item["label"][0, 3, 3] = 255
    row = SideBySide()(item)
    assert row[0, 0, 8] == 255
    assert row[0, 3, 11] == 64


def test_channels_of_a_prediction_become_classes() -> None:
    item = case()
    item["pred"] = torch.cat([1 - item["label"], item["label"]])
    assert SideBySide()(item)[0, 0, 16] == 255


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_an_input_of_any_channels_is_drawn(channels: int) -> None:
    item = case() | {"image": torch.rand(channels, 4, 4)}
    assert SideBySide()(item).shape[0] == 3


def test_eight_bit_input_is_drawn_as_it_is() -> None:
    item = case() | {"image": torch.full((3, 4, 4), 77, dtype=torch.uint8)}
    assert SideBySide()(item)[:, 0, 0].tolist() == [77] * 3


def test_a_volume_is_drawn_by_its_middle_slice() -> None:
    flat = case()
    volume = {key: torch.stack([value * 0, value, value * 0], 1) for key, value in flat.items()}
    assert torch.equal(SideBySide()(volume), SideBySide()(flat))


def test_large_pictures_shrink_and_thin_vessels_stay() -> None:
    item = case(64)
    item["label"] = torch.zeros(1, 64, 64)
    item["label"][0, :, 31] = 1
    row = SideBySide(max_side_px=16)(item)
    assert row.shape == (3, 16, 3 * 16 + 2 * 4)
    assert row[0, :, 20:36].max() == 64  # one column of four


def test_columns_take_the_size_of_the_input() -> None:
    item = case(8) | {"pred": torch.ones(1, 4, 4)}
    assert SideBySide()(item).shape == (3, 8, 3 * 8 + 2 * 4)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"no key 'native'.*'image', 'label', 'pred'"):
        SideBySide(image="native")(case())
