from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.oct.pixel_maps import class_mask, confidence_map, first_transitions

seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds, levels=st.sampled_from([1, 3, 1000]))
def test_the_class_mask_is_the_argmax_ties_included(seed: int, levels: int) -> None:
    logits = np.random.default_rng(seed).integers(0, levels, (2, 3, 6, 7)).astype(np.float32)
    for given_form in (logits, torch.from_numpy(logits)):
        mask = class_mask(given_form)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, logits.argmax(axis=1))


@given(seed=seeds, scale=st.sampled_from([0.0, 1.0, 200.0]))
def test_the_confidence_is_the_largest_softmax(seed: int, scale: float) -> None:
    logits = scale * np.random.default_rng(seed).standard_normal((2, 3, 6, 7))
    expected = torch.from_numpy(logits).softmax(dim=1).amax(dim=1)
    for given_form in (logits, torch.from_numpy(logits)):
        confidence = confidence_map(given_form)
        assert confidence.dtype == np.float32
        np.testing.assert_allclose(confidence, expected, rtol=1e-6)


@pytest.mark.parametrize("largest", [3e38, 1e308])
def test_the_confidence_of_the_largest_numbers_is_one(largest: float) -> None:
    logits = np.array([largest, -largest, 0.0]).reshape(1, 3, 1, 1)
    logits = logits.astype(np.float32) if largest < 1e39 else logits
    assert confidence_map(logits).item() == 1


def test_maps_refuse_another_shape() -> None:
    for maps in (class_mask, confidence_map):
        with pytest.raises(InputError, match=r"expected \(B, 3, H, W\)"):
            maps(np.zeros((3, 4, 4)))


def test_the_first_transitions_are_read_from_the_top() -> None:
    columns = ["001122", "010122", "002222", "111222", "220011", "001111"]
    mask = np.array([[int(cell) for cell in column] for column in columns], np.uint8).T[None]
    expected = [[[2, 1, np.nan, np.nan, 4, 2]], [[4, 4, np.nan, 3, np.nan, np.nan]]]
    np.testing.assert_array_equal(first_transitions(mask), expected)


@pytest.mark.gpu
def test_a_gpu_gives_the_maps_of_the_cpu() -> None:
    logits = torch.randn((2, 3, 20, 30), generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(class_mask(logits.cuda()), class_mask(logits))
    np.testing.assert_allclose(confidence_map(logits.cuda()), confidence_map(logits), rtol=1e-6)
