from __future__ import annotations

from math import isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, f1_score

from pipeline.errors import InputError
from pipeline.oct.mask_metrics import CLASSES, dice_per_class, mask_confusion

seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds)
def test_confusion_and_dice_equal_scikit_learn(seed: int) -> None:
    predicted, truth = np.random.default_rng(seed).integers(0, 3, (2, 4, 30), dtype=np.uint8)
    confusion = mask_confusion(predicted, truth)
    called, actual = predicted.ravel(), truth.ravel()
    np.testing.assert_array_equal(confusion, confusion_matrix(actual, called, labels=[0, 1, 2]))
    assert [*dice_per_class(confusion).values()] == pytest.approx(
        list(f1_score(actual, called, average=None, labels=[0, 1, 2]))
    )


@given(seed=seeds, ignore_label=st.sampled_from([-100, 255]))
def test_pixels_that_are_not_known_count_nowhere(seed: int, ignore_label: int) -> None:
    predicted, truth = np.random.default_rng(seed).integers(0, 3, (2, 5, 12))
    gaps = truth.copy()
    gaps[:, 3:7] = ignore_label
    kept = np.delete(np.arange(12), np.s_[3:7])
    np.testing.assert_array_equal(
        mask_confusion(predicted, gaps, ignore_label),
        mask_confusion(predicted[:, kept], truth[:, kept]),
    )


def test_a_class_that_nobody_has_is_not_scored() -> None:
    confusion = mask_confusion(np.array([[0, 0, 1]]), np.array([[0, 1, 1]]))
    dice = dice_per_class(confusion)
    assert tuple(dice) == CLASSES
    assert (dice["above_ilm"], dice["retina"]) == pytest.approx((2 / 3, 2 / 3))
    assert isnan(dice["below_bm"])


def test_other_values_and_other_shapes_are_refused() -> None:
    mask = np.zeros((2, 3), np.uint8)
    with pytest.raises(InputError, match="one shape"):
        mask_confusion(mask, mask.T)
    with pytest.raises(InputError, match="true mask holds values 255 to 255"):
        mask_confusion(mask, mask + 255)
    with pytest.raises(InputError, match="predicted mask holds values 255"):
        mask_confusion(mask + 255, mask, ignore_label=255)
