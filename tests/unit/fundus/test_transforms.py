"""From a photograph to the network's frame and back: laws of the chain and of its steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, CropForegroundd, DivisiblePadd, Invertd
from numpy.typing import NDArray

from pipeline.data.photographs import rgb_photograph
from pipeline.errors import ConfigurationError, InputError
from pipeline.fundus.transforms import (
    IgnoreOutsided,
    LoadFundusd,
    NormalizeInsided,
    ScaleToFOVd,
    SelectChannelsd,
    ZeroIgnoredd,
    ZeroOutsided,
)


def disc(height: int, width: int, radius: float) -> NDArray[np.bool_]:
    rows, columns = np.ogrid[:height, :width]
    inside = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < radius**2
    return np.asarray(inside)


@pytest.fixture
def case() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    fov = disc(117, 131, 50)
    image = (generator.integers(60, 255, (117, 131, 3)) * fov[..., None]).astype(np.uint8)
    label = ((generator.random(fov.shape) < 0.1) * 255).astype(np.uint8)
    return {"image": image, "label": label, "fov": fov.astype(np.uint8) * 255}


def frame(fov_size_px: int | None) -> Compose:
    keys = ["image", "label", "fov"]
    modes = ["bilinear", "nearest-exact", "nearest-exact"]
    return Compose(
        [
            LoadFundusd(),
            CropForegroundd(keys, source_key="fov", allow_smaller=True),
            ScaleToFOVd(keys, fov_size_px=fov_size_px, mode=modes),
            NormalizeInsided("image"),
            IgnoreOutsided("label"),
            DivisiblePadd(["image", "fov"], k=32, mode=["reflect", "constant"]),
            DivisiblePadd("label", k=32, mode="constant", value=255),
        ]
    )


def inverted(chain: Compose, framed: dict[str, Any], pred: torch.Tensor) -> NDArray[Any]:
    back = Invertd("pred", transform=chain, orig_keys="image", nearest_interp=False)
    result = back({**framed, "pred": MetaTensor(pred, meta=framed["image"].meta)})["pred"]
    return np.asarray(result)[0]


@pytest.mark.parametrize("fov_size_px", [None, 60, 100, 250])
def test_a_prediction_comes_back_to_its_place_at_any_scale(
    case: dict[str, Any], fov_size_px: int | None
) -> None:
    chain = frame(fov_size_px)
    framed = chain(case)
    assert all(side % 32 == 0 for side in framed["image"].shape[1:])
    back = inverted(chain, framed, torch.as_tensor(framed["fov"]).float())
    assert back.shape == case["fov"].shape
    found, truth = back > 0.5, case["fov"] > 0
    assert (found & truth).sum() * 2 / (found.sum() + truth.sum()) > 0.97
    assert not back[~disc(117, 131, 55)].any()


def test_without_a_change_of_scale_every_pixel_comes_back_as_it_was(case: dict[str, Any]) -> None:
    chain = frame(None)
    framed = chain(case)
    label = torch.as_tensor(framed["label"]).float()
    back = inverted(chain, framed, torch.where(label == 255, 0.0, label))
    np.testing.assert_array_equal(back, (case["label"] > 0) & (case["fov"] > 0))


@pytest.mark.parametrize("fov_size_px", [37, 60, 250])
def test_masks_stay_masks_at_any_scale(case: dict[str, Any], fov_size_px: int) -> None:
    framed = frame(fov_size_px)(case)
    assert set(framed["label"].unique().tolist()) <= {0.0, 1.0, 255.0}
    assert set(framed["fov"].unique().tolist()) <= {0.0, 1.0}


def test_a_scale_within_the_tolerance_is_left_alone(case: dict[str, Any]) -> None:
    assert torch.equal(frame(None)(case)["image"], frame(105)(case)["image"])


def test_what_lies_outside_the_fov_never_reaches_the_network(case: dict[str, Any]) -> None:
    noisy = case["image"].copy()
    noisy[case["fov"] == 0] = 255
    expected, found = frame(None)(case), frame(None)({**case, "image": noisy})
    assert torch.equal(expected["image"], found["image"])


def test_each_channel_has_mean_0_and_deviation_1_inside(case: dict[str, Any]) -> None:
    loaded = NormalizeInsided("image")(LoadFundusd()(case))
    inside = loaded["image"][:, loaded["fov"][0] > 0]
    torch.testing.assert_close(torch.as_tensor(inside.mean(1)), torch.zeros(3), atol=1e-5, rtol=0)
    deviation = torch.as_tensor(inside.std(1, correction=0))
    torch.testing.assert_close(deviation, torch.ones(3), atol=1e-4, rtol=0)
    assert not loaded["image"][:, loaded["fov"][0] == 0].any()


def test_a_constant_photograph_becomes_zeros_and_no_nan(case: dict[str, Any]) -> None:
    flat = {**case, "image": np.full_like(case["image"], 128)}
    assert not NormalizeInsided("image")(LoadFundusd()(flat))["image"].any()


def test_outside_the_fov_the_label_is_ignored_and_the_photograph_zero(case: dict[str, Any]) -> None:
    marked = IgnoreOutsided("label")(LoadFundusd()(case))
    outside = marked["fov"] == 0
    assert (marked["label"][outside] == 255).all()
    assert (marked["label"][~outside] <= 1).all()
    shifted = ZeroIgnoredd("image")({**marked, "image": marked["image"] + 1})
    assert not shifted["image"][:, outside[0]].any()
    assert (shifted["image"][:, ~outside[0]] >= 1).all()


def test_a_prediction_is_zero_outside_the_fov(case: dict[str, Any]) -> None:
    fov = torch.as_tensor(case["fov"] > 0)[None]
    cleared = ZeroOutsided("pred")({"pred": torch.ones(1, 117, 131), "native_fov": fov})["pred"]
    assert torch.equal(cleared, fov.float())


@pytest.mark.parametrize("code", [1, 255])
def test_masks_coded_0_1_and_0_255_are_the_same(case: dict[str, Any], code: int) -> None:
    coded = {**case, "label": (case["label"] > 0).astype(np.uint8) * code}
    label = np.asarray(LoadFundusd()(coded)["label"])[0]
    np.testing.assert_array_equal(label, case["label"] > 0)


def test_artery_and_vein_codes_are_all_vessel(case: dict[str, Any]) -> None:
    codes = np.random.default_rng(0).integers(0, 4, case["label"].shape).astype(np.uint8)
    label = np.asarray(LoadFundusd()({**case, "label": codes})["label"])[0]
    np.testing.assert_array_equal(label, codes > 0)


def test_a_missing_fov_is_derived_and_said_to_be(case: dict[str, Any]) -> None:
    assert LoadFundusd()(case)["fov_source"] == "given"
    loaded = LoadFundusd()({**case, "fov": None})
    assert loaded["fov_source"] == "derived"
    found, truth = np.asarray(loaded["fov"])[0] > 0, case["fov"] > 0
    assert (found & truth).sum() / (found | truth).sum() > 0.95


@pytest.mark.parametrize("key", ["label", "fov"])
def test_a_mask_of_another_size_is_refused_with_both_sizes(case: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=r"found 110x131 .* expected 117x131"):
        LoadFundusd()({**case, key: case[key][:110]})


def test_an_empty_fov_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="field-of-view mask is empty"):
        LoadFundusd()({**case, "fov": np.zeros_like(case["fov"])})


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 4, 5), np.uint8), r"shape \(4, 4, 5\)"),
        (np.zeros((4, 4, 4, 4), np.uint8), "shape"),
        (np.zeros((4, 4), np.int32), "int32"),
        (np.full((4, 4), np.nan), "not finite"),
        (np.full((4, 4), 200.0), "outside"),
    ],
)
def test_what_is_no_photograph_is_refused(pixels: NDArray[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rgb_photograph(pixels, "eye.tif")


def test_green_is_the_green_channel(case: dict[str, Any]) -> None:
    loaded = LoadFundusd()(case)
    plain = SelectChannelsd("image", "green", clip_limit=0)(loaded)["image"]
    assert torch.equal(plain, loaded["image"][1:2])
    equalised = SelectChannelsd("image", "green")(loaded)["image"]
    assert equalised.shape == plain.shape
    assert not torch.equal(equalised, plain)
    assert torch.equal(SelectChannelsd("image", "rgb")(loaded)["image"], loaded["image"])


def test_unknown_channels_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'rgb' or 'green'"):
        SelectChannelsd("image", "red")  # type: ignore[arg-type]
