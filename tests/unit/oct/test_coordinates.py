from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError, InputError
from pipeline.oct.coordinates import Layers, extract_layers, original_extraction

ORDERED = ("map", "posterior_mean", "viterbi")
FIELDS = ("ilm_px", "bm_px", "ilm_sigma_px", "bm_sigma_px", "ilm_valid", "bm_valid")


def step_logits(ilm: Any, bm: Any, height: int, strength: float = 8.0) -> NDArray[np.float32]:
    """Return `(B, 3, H, W)` of boundaries `(B, W)`, sure of every pixel."""
    rows = np.arange(height)[:, None]
    ilm, bm = np.asarray(ilm)[:, None], np.asarray(bm)[:, None]
    classes = (rows >= ilm).astype(int) + (rows >= bm)
    return (strength * (classes[:, None] == np.arange(3)[:, None, None])).astype(np.float32)


def noise(seed: int, shape: tuple[int, ...] = (2, 3, 24, 30), scale: float = 2.0) -> Any:
    return scale * np.random.default_rng(seed).standard_normal(shape)


def agree(first: Layers, second: Layers, tolerance: float = 0.0) -> None:
    for name in FIELDS:
        np.testing.assert_allclose(
            getattr(first, name), getattr(second, name), rtol=0, atol=tolerance, err_msg=name
        )


def columns(layers: Layers, chosen: Any) -> Layers:
    return Layers(*(getattr(layers, name)[chosen] for name in FIELDS))


@pytest.mark.parametrize("method", [*ORDERED, "transition"])
@pytest.mark.parametrize("refine", [True, False])
def test_a_clear_step_is_found_exactly(method: Any, refine: bool) -> None:
    ilm = [[20, 21, 21, 23, 22], [14, 15, 16, 17, 18]]
    bm = [[50, 50, 51, 52, 50], [40, 41, 40, 41, 40]]
    # Clear enough for the paths to pay for their steps.
    layers = extract_layers(step_logits(ilm, bm, 64, strength=40), method, refine=refine)
    np.testing.assert_allclose(layers.ilm_px, ilm, rtol=0, atol=1e-9)
    np.testing.assert_allclose(layers.bm_px, bm, rtol=0, atol=1e-9)
    assert layers.ilm_valid.all()
    assert layers.bm_valid.all()
    assert layers.ilm_sigma_px.max() < 1e-6


finite_logits = hnp.arrays(
    st.sampled_from([np.float32, np.float64]),
    st.tuples(st.integers(1, 2), st.just(3), st.integers(1, 6), st.integers(1, 4)),
    elements=st.one_of(
        st.sampled_from([0.0, 1.0, -1.0, 3e38, -3e38, 1e-40]), st.floats(-1e4, 1e4, width=32)
    ),
)


@pytest.mark.parametrize("method", ORDERED)
@pytest.mark.parametrize("refine", [True, False])
@given(logits=finite_logits)
def test_rows_are_finite_ordered_and_in_the_frame_for_any_logits(
    method: Any, refine: bool, logits: NDArray[np.floating]
) -> None:
    layers = extract_layers(logits, method, refine=refine)
    rows = np.stack([layers.ilm_px, layers.bm_px])
    sigmas = np.stack([layers.ilm_sigma_px, layers.bm_sigma_px])
    assert rows.shape == (2, logits.shape[0], logits.shape[3])
    assert np.isfinite(rows).all()
    assert np.isfinite(sigmas).all()
    assert (sigmas >= 0).all()
    assert (rows[0] <= rows[1]).all()
    assert (rows >= 0).all()
    assert (rows <= logits.shape[2]).all()


@pytest.mark.parametrize("method", ORDERED)
def test_the_largest_numbers_of_float64_are_still_ordered(method: Any) -> None:
    logits = np.random.default_rng(0).choice([-1.7e308, 0.0, 1.7e308], (2, 3, 9, 40))
    ordinary = noise(1, (2, 3, 9, 40))
    logits[..., ::2] = ordinary[..., ::2]
    layers = extract_layers(logits, method)
    assert np.isfinite([layers.ilm_px, layers.bm_px, layers.bm_sigma_px]).all()
    assert (layers.ilm_px <= layers.bm_px).all()
    if method != "viterbi":  # whose columns hang together
        agree(columns(layers, np.s_[:, ::2]), extract_layers(ordinary[..., ::2], method))


@pytest.mark.parametrize("method", [*ORDERED, "transition"])
@given(seed=st.integers(0, 1000))
def test_tensors_and_arrays_give_the_same(method: Any, seed: int) -> None:
    logits = noise(seed, (1, 3, 9, 7))
    agree(extract_layers(torch.from_numpy(logits), method), extract_layers(logits, method))


@given(seed=st.integers(0, 1000))
def test_single_precision_gives_the_rows_of_double_precision(seed: int) -> None:
    logits = noise(seed).astype(np.float32)
    agree(extract_layers(logits), extract_layers(logits.astype(np.float64)))


def test_half_precision_integers_and_gradients_are_welcome() -> None:
    whole = np.round(noise(3, (1, 3, 12, 9)))
    expected = extract_layers(whole)
    tensor = torch.from_numpy(whole)
    for logits in (
        whole.astype(np.float16),
        whole.astype(np.int32),
        tensor.to(torch.bfloat16),
        tensor.half(),
        tensor.clone().requires_grad_(),
        np.asfortranarray(whole),
        tensor.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        agree(extract_layers(logits), expected)


@pytest.mark.parametrize("method", ["map", "posterior_mean", "transition"])
@given(seed=st.integers(0, 1000))
def test_a_mirrored_image_has_mirrored_boundaries(method: Any, seed: int) -> None:
    logits = noise(seed, (1, 3, 15, 300))
    mirrored = extract_layers(logits[..., ::-1], method)
    agree(columns(mirrored, np.s_[:, ::-1]), extract_layers(logits, method))


@pytest.mark.parametrize("method", [*ORDERED, "transition"])
def test_an_image_alone_gives_what_it_gives_in_a_batch(method: Any) -> None:
    logits = noise(5, (12, 3, 17, 40))
    together = extract_layers(logits, method)
    for image in range(12):
        alone = extract_layers(logits[image : image + 1], method)
        agree(alone, columns(together, np.s_[image : image + 1]))


@pytest.mark.parametrize("method", [*ORDERED, "transition"])
def test_an_empty_batch_has_no_rows(method: Any) -> None:
    assert extract_layers(np.zeros((0, 3, 8, 5)), method).bm_px.shape == (0, 5)


@pytest.mark.parametrize(
    ("number", "ilm", "bm"), [(0, 16, 16), (1, 0, 16), (2, 0, 0)], ids=["above", "between", "below"]
)
@pytest.mark.parametrize("method", ORDERED)
def test_columns_of_one_class_have_boundaries_at_the_border_and_are_not_valid(
    number: int, ilm: int, bm: int, method: Any
) -> None:
    logits = np.zeros((1, 3, 16, 4))
    logits[:, number] = 9
    layers = extract_layers(logits, method)
    np.testing.assert_allclose(layers.ilm_px, ilm, atol=0.01)
    np.testing.assert_allclose(layers.bm_px, bm, atol=0.01)
    assert not layers.ilm_valid.any()
    assert not layers.bm_valid.any()


def test_a_boundary_below_the_image_is_h_and_not_valid() -> None:
    layers = extract_layers(step_logits([[5]], [[20]], 20), refine=False)
    assert (layers.ilm_px, layers.bm_px) == (5, 20)
    assert layers.ilm_valid.all()
    assert not layers.bm_valid.any()


def test_the_rendered_mask_of_a_fraction_comes_back_as_the_row_it_was_rounded_to() -> None:
    """Halves go to the even row, as NumPy and torch round."""
    ilm = np.array([[10.5, 11.5, 10.49, 10.51]])
    layers = extract_layers(step_logits(np.round(ilm), np.round(ilm) + 20, 48))
    np.testing.assert_allclose(layers.ilm_px, [[10, 12, 10, 11]], atol=1e-6)


def test_an_island_moves_the_original_and_not_the_map() -> None:
    logits = step_logits(np.full((1, 6), 60), np.full((1, 6), 90), 128)
    logits[:, :, 10:14] = step_logits([[0] * 6], [[128] * 6], 128)[:, :, :4]
    original, ordered = original_extraction(logits), extract_layers(logits)
    assert (original.ilm_px == 10).all()
    np.testing.assert_allclose(ordered.ilm_px, 60, atol=1e-6)
    np.testing.assert_allclose(ordered.bm_px, 90, atol=1e-6)


def test_the_original_has_no_row_where_a_class_is_skipped() -> None:
    original = original_extraction(step_logits([[8]], [[8]], 16))
    assert np.isnan([original.ilm_px, original.bm_px]).all()
    assert not original.ilm_valid.any()
    assert not original.bm_valid.any()


def test_a_second_place_as_good_is_flagged_by_sigma() -> None:
    sure = step_logits([[30, 30]], [[60, 60]], 96, strength=4)
    sure[0, :, 36:42, 1] = sure[0, :, 0, 1][:, None]  # six rows of vitreous below six of retina
    layers = extract_layers(sure, max_sigma_px=2)
    assert layers.ilm_sigma_px[0, 0] < 0.5
    assert layers.ilm_sigma_px[0, 1] == pytest.approx(6, abs=0.1)
    assert layers.ilm_valid.tolist() == [[True, False]]
    assert layers.bm_valid.all()


def test_a_higher_temperature_widens_the_sigmas_and_moves_no_row() -> None:
    logits = step_logits([[20]], [[40]], 64, strength=3) + noise(0, (1, 3, 64, 1), 0.5)
    sigmas = []
    for temperature in (0.5, 1.0, 2.0, 4.0):
        layers = extract_layers(logits, temperature=temperature)
        np.testing.assert_array_equal(layers.ilm_px, extract_layers(logits).ilm_px)
        scaled = extract_layers(logits / temperature)
        np.testing.assert_allclose(layers.bm_sigma_px, scaled.bm_sigma_px, rtol=1e-9)
        sigmas.append(layers.ilm_sigma_px.item())
    assert sigmas == sorted(sigmas)
    assert sigmas[-1] > 2 * sigmas[0]


def test_the_thickness_window_in_micrometres_uses_the_scale_of_each_image() -> None:
    logits = step_logits([[20], [20]], [[50], [50]], 96)
    layers = extract_layers(logits, thickness_um=(100, 500), scale_y_um=[4.0, 3.0])
    assert layers.ilm_valid.tolist() == layers.bm_valid.tolist() == [[True], [False]]
    in_rows = extract_layers(logits, thickness_px=(25, 125))
    agree(in_rows, extract_layers(logits, thickness_um=(100, 500), scale_y_um=4.0))
    assert not extract_layers(logits, thickness_px=(31, 125)).bm_valid.any()


def test_a_path_does_not_follow_what_one_column_alone_says() -> None:
    ilm, bm = np.full((1, 21), 30), np.full((1, 21), 60)
    ilm[0, 10], bm[0, 10] = 4, 90
    logits = step_logits(ilm, bm, 96)
    assert extract_layers(logits).bm_px[0, 10] == pytest.approx(90)
    layers = extract_layers(logits, "viterbi", refine=False)
    assert (layers.ilm_px == 30).all()
    assert (layers.bm_px == 60).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "argmax"}, "'argmax'; expected one of map, posterior_mean, viterbi, transi"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"max_step": -1}, "max_step"),
        ({"cap": 0.0}, "cap"),
        ({"step_penalty": -1.0}, "step_penalty"),
        ({"thickness_um": (100, 500)}, "scale"),
        ({"thickness_um": (1, 5), "thickness_px": (1, 5), "scale_y_um": 4.0}, "one window"),
        ({"thickness_um": (100, 500), "scale_y_um": 0.0}, "scale_y_um must be above 0"),
        ({"thickness_um": (100, 500), "scale_y_um": [4.0, 4.0, 4.0]}, "3 scales.*2 images"),
        ({"thickness_px": (9.0, 5.0)}, "thickness"),
        ({"max_sigma_px": float("nan")}, "max_sigma_px"),
    ],
)
def test_a_setting_out_of_its_range_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        extract_layers(noise(0), **settings)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 2, 8, 8), (1, 3, 0, 8), (1, 3, 8, 0)], ids=str)
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \(B, 3, H, W\)"):
        extract_layers(np.zeros(shape))
    with pytest.raises(InputError, match=r"expected \(B, 3, H, W\)"):
        extract_layers(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [np.bool_, np.complex64])
def test_what_is_no_number_is_refused(dtype: Any) -> None:
    with pytest.raises(InputError, match="expected real numbers"):
        extract_layers(np.zeros((1, 3, 4, 4), dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("plane", [0, 1, 2])
@pytest.mark.parametrize("method", [*ORDERED, "transition"])
def test_a_number_that_is_not_finite_is_named_with_its_place(
    method: Any, plane: int, value: float
) -> None:
    logits = noise(2).astype(np.float32)
    logits[1, plane, 5, 7] = value
    with pytest.raises(InputError, match=rf"image 1, class {plane}, row 5, column 7 are {value}"):
        extract_layers(logits, method)


def test_arrays_need_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = noise(1)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert extract_layers(logits).ilm_px.shape == (2, 30)


@pytest.mark.gpu
@pytest.mark.parametrize("method", [*ORDERED, "transition"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_gives_what_the_cpu_gives(method: Any, dtype: torch.dtype) -> None:
    logits = torch.from_numpy(noise(9, (9, 3, 60, 40))).to(dtype)
    agree(extract_layers(logits.cuda(), method), extract_layers(logits, method), 1e-9)
