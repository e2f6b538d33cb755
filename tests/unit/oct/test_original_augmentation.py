from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.errors import ConfigurationError
from pipeline.oct.transforms import RenderLabeld
from pipeline.oct.transforms.original_augmentation import RandRotateIgnoredd, RandSnowd

HEIGHT, WIDTH = 64, 80


def case(**settings: Any) -> dict[str, Any]:
    """A B-scan whose grey values are a tenth and more, so that 0 is where nothing was scanned."""
    rows = {"ilm": torch.full((WIDTH,), 24.0), "bm": torch.full((WIDTH,), 40.0)}
    drawn = RenderLabeld(**settings)({"image": torch.zeros(1, HEIGHT, WIDTH), **rows})
    drawn["image"] = 0.1 + drawn["label"][:, :HEIGHT].float() / 4
    return drawn


def rotated(seed: int = 1) -> dict[str, Any]:
    rotate = RandRotateIgnoredd(prob=1.0)
    rotate.set_random_state(seed=seed)
    return rotate(case())


@pytest.mark.parametrize("seed", range(6))
def test_the_label_turns_with_the_bscan_and_is_ignored_where_nothing_was_scanned(seed) -> None:
    turned = rotated(seed)
    label, image = turned["label"], turned["image"]
    assert label.dtype == torch.uint8
    assert set(label.unique().tolist()) <= {0, 1, 2, 255}
    assert (label[image == 0] == 255).all()
    known = label != 255
    assert known.float().mean() > 0.6
    agree = ((image[known] - 0.1) * 4 - label[known]).abs() < 0.5
    assert agree.float().mean() > 0.97  # but for edges, where grey values mix


def test_a_rotation_leaves_no_corner_as_vitreous() -> None:
    turned = rotated(0)
    assert (turned["image"][:, 0, [0, -1]] == 0).any()
    assert turned["label"][0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [255] * 4


def test_rows_are_lost_in_a_rotation_and_the_label_is_not_drawn_from_them_again() -> None:
    turned = rotated()
    assert not {"ilm", "bm"} & turned.keys()
    assert torch.equal(RenderLabeld()(turned)["label"], turned["label"])


def test_probability_0_changes_nothing() -> None:
    for transform in (RandRotateIgnoredd(prob=0), RandSnowd(prob=0)):
        changed = transform(case())
        assert torch.equal(changed["image"], case()["image"])
        assert torch.equal(changed["label"], case()["label"])


def test_a_label_with_rows_cannot_be_rotated() -> None:
    with pytest.raises(ConfigurationError, match="leave with_rows of RenderLabeld false"):
        RandRotateIgnoredd(prob=1.0)(case(with_rows=True))


def test_snow_brightens_dark_pixels_alone() -> None:
    snow = RandSnowd(prob=1.0, point=(0.2, 0.2))
    image = torch.tensor([[[0.0, 0.1, 0.42, 0.44, 1.0]]])
    expected = torch.tensor([[[0.0, 0.25, 1.0, 0.44, 1.0]]])
    torch.testing.assert_close(snow({"image": image})["image"], expected)
