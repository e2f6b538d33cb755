from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.data.labels import label_classes, label_plane, read_label, read_mask
from pipeline.data.writers import write_png
from pipeline.errors import ConfigurationError, InputError

MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8))
PLAIN = {"foreground": "> 127", "allowed": [0, 255]}
CODES = np.uint8([[0, 1], [2, 3]])


@given(mask=MASKS, high=st.sampled_from([1, 3, 255]))
def test_auto_finds_the_mask_whatever_its_high_value(mask: Any, high: int) -> None:
    array = mask.astype(np.uint8) * np.uint8(high)
    classes = label_classes(array, {"foreground": "auto", "allowed": None}, "a.png")
    np.testing.assert_array_equal(classes, mask)


def test_auto_accepts_a_compressed_mask_and_refuses_a_photograph() -> None:
    auto = {"foreground": "auto"}
    mask = np.where(np.arange(100).reshape(10, 10) > 60, 250, 6).astype(np.uint8)
    np.testing.assert_array_equal(label_classes(mask, auto, "a.jpg"), mask > 127)
    photograph = np.random.default_rng(0).integers(0, 256, (10, 10), dtype=np.uint8)
    with pytest.raises(InputError, match=r"a\.jpg: values .* are no mask"):
        label_classes(photograph, auto, "a.jpg")


def test_artery_and_vein_codes_are_vessel() -> None:
    np.testing.assert_array_equal(
        label_classes(CODES, {"foreground": "> 0", "allowed": None}, "a.png"), CODES > 0
    )


def test_mapping_gives_the_classes_it_names() -> None:
    rule = {"foreground": {"0": 0, "1": 1, "2": 2, "3": 1}, "allowed": None}
    np.testing.assert_array_equal(label_classes(CODES, rule, "a.png"), [[0, 1], [2, 1]])


@pytest.mark.parametrize(
    ("values", "labels", "hint"),
    [
        ([0, 1], PLAIN, r"\{1\} found, \[0, 255\] allowed; a mask of 0/1: write .*'> 0'"),
        ([0, 255], {"foreground": "> 0", "allowed": [0, 1]}, "a mask of 0/255: write .*'> 127'"),
        ([0, 5], PLAIN, r"\{5\} found"),
        (range(200), PLAIN, r"\{1, 2, 3, 4, 5, 6, 7, 8, \.\.\.\} found.*save the mask as PNG"),
        ([0, 1], {"foreground": "> 127", "allowed": None}, "all background by the rule '> 127'"),
        (
            [0, 7],
            {"foreground": {0: 0, 1: 1}, "allowed": None},
            r"\{7\} have no class, \[0, 1\] have",
        ),
    ],
    ids=["0/1", "0/255", "unknown", "grays", "all background", "no class"],
)
def test_unexpected_values_are_named_with_a_remedy(values: Any, labels: Any, hint: str) -> None:
    with pytest.raises(InputError, match=r"^eye\.png: .*" + hint) as caught:
        label_classes(np.uint8([list(values)]), labels, "eye.png")
    assert "\n" not in str(caught.value)


def test_empty_label_is_background() -> None:
    assert not label_classes(np.zeros((3, 3), np.uint8), PLAIN, "a").any()


@pytest.mark.parametrize("rule", ["127", "> x", "< 3", ""])
def test_rule_that_cannot_be_read_is_a_configuration_error(rule: str) -> None:
    with pytest.raises(ConfigurationError, match=r"labels\.foreground"):
        label_classes(np.zeros((3, 3), np.uint8), {"foreground": rule}, "a")


def test_alpha_is_dropped_and_the_brightest_colour_counts() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 3] = 255
    rgba[0, 1, 2] = 200
    np.testing.assert_array_equal(label_plane(rgba, "a"), [[0, 200], [0, 0]])
    with pytest.raises(InputError, match=r"shape \(2, 2, 5\)"):
        label_plane(np.zeros((2, 2, 5), np.uint8), "a")


def test_rgb_field_of_view_is_read_as_a_mask(tmp_path: Path) -> None:
    mask = np.eye(5, dtype=bool)
    path = write_png(tmp_path / "fov.png", np.repeat(mask[..., None], 3, -1).astype(np.uint8) * 255)
    np.testing.assert_array_equal(read_mask(path), mask)
    np.testing.assert_array_equal(read_label(path, PLAIN), mask)
