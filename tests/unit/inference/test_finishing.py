from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import ConfigurationError
from pipeline.inference.finishing import Finish


def logits(channels: int) -> Tensor:
    return 3 * torch.randn(channels, 4, 5, 6, generator=torch.Generator().manual_seed(0))


def test_nothing_asked_for_gives_the_logits() -> None:
    given = logits(2)
    found = Finish()(given)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, given)


def test_probabilities_in_uint8_are_within_half_a_step() -> None:
    given = logits(2)
    finish = Finish("sigmoid", dtype="uint8")
    found = finish(given)
    assert found.dtype == np.uint8
    scale = finish.settings()["scale"]
    np.testing.assert_allclose(found * scale, torch.sigmoid(given), rtol=0, atol=0.5 / 255 + 1e-6)


def test_float16_keeps_three_digits() -> None:
    found = Finish("sigmoid", dtype="float16")(logits(1))
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, torch.sigmoid(logits(1)), rtol=1e-3, atol=1e-7)


def test_a_threshold_holds_voxels_that_reach_it() -> None:
    given = torch.logit(torch.tensor([[0.25, 0.5, 0.75]], dtype=torch.float64))
    np.testing.assert_array_equal(Finish("sigmoid", threshold=0.5)(given), [[0, 1, 1]])


def test_labels_are_the_most_probable_class() -> None:
    given = logits(3)
    found = Finish("softmax", labels=True)(given)
    assert found.shape == (1, 4, 5, 6)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0], torch.softmax(given, 0).argmax(0))


def test_a_selected_channel_is_that_of_the_softmax_of_all() -> None:
    found = Finish("softmax", select=1)(logits(3))
    np.testing.assert_array_equal(found, Finish("softmax")(logits(3))[1:2])


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_channels_announced_are_those_that_come(activation: Any, dtype: str) -> None:
    for finish in (Finish(activation, dtype=dtype), Finish(activation, dtype=dtype, select=2)):
        assert len(finish(logits(3))) == finish.channels(3)
        assert finish(logits(3)).dtype == finish.dtype


@for_all(
    shape=st.tuples(st.integers(2, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 40)),
    low=st.tuples(*[st.integers(0, 8)] * 3),
    finish=st.sampled_from([Finish("sigmoid"), Finish("softmax"), Finish("softmax", select=1)]),
    threads=st.sampled_from([1, 2]),
)
def test_a_voxel_does_not_depend_on_what_is_finished_with_it(
    shape: tuple[int, ...], low: tuple[int, ...], finish: Finish, threads: int
) -> None:
    given = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    box = (slice(None), *(slice(min(a, n - 1), None) for a, n in zip(low, shape[1:], strict=True)))
    torch.set_num_threads(threads)
    apart = finish(given[box])
    torch.set_num_threads(1)
    np.testing.assert_array_equal(apart, finish(given)[box])


@pytest.mark.filterwarnings("error")
def test_the_largest_logits_are_certain() -> None:
    given = torch.tensor([[-200.0, 200.0, -1e30, 1e30]])
    np.testing.assert_array_equal(Finish("sigmoid")(given), [[0, 1, 0, 1]])
    both = torch.cat([given, -given])
    np.testing.assert_array_equal(Finish("softmax")(both), [[0, 1, 0, 1], [1, 0, 1, 0]])


def test_activations_are_those_of_torch() -> None:
    for channels, activation in ((1, "sigmoid"), (3, "softmax")):
        expected = torch.sigmoid(logits(1)) if channels == 1 else torch.softmax(logits(3), 0)
        found = Finish(activation)(logits(channels))  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


def test_bfloat16_logits_are_written() -> None:
    assert Finish()(logits(1).bfloat16()).dtype == np.float32


def test_the_logits_are_left_as_they_are() -> None:
    given = logits(2)
    for finish in (Finish("sigmoid", dtype="uint8"), Finish("softmax", threshold=0.3, select=0)):
        finish(given)
    torch.testing.assert_close(given, logits(2), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("finish", "expected"),
    [
        (Finish("sigmoid"), "mean"),
        (Finish("sigmoid", threshold=0.5), "max"),
        (Finish("softmax", labels=True), "nearest"),
    ],
    ids=["probability", "mask", "labels"],
)
def test_coarser_levels_suit_what_is_written(finish: Finish, expected: str) -> None:
    assert finish.reduce == expected


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"activation": "relu"}, "activation must be"),
        ({"activation": "sigmoid", "dtype": "int8"}, "dtype must be one of"),
        ({"dtype": "uint8"}, "set activation"),
        ({"threshold": 0.5}, "set activation"),
        ({"activation": "sigmoid", "threshold": 128}, "threshold must be a probability"),
        ({"activation": "sigmoid", "labels": True}, "set activation to softmax"),
        ({"activation": "softmax", "labels": True, "threshold": 0.5}, "neither threshold"),
        ({"activation": "softmax", "labels": True, "select": 0}, "nor select"),
    ],
)
def test_a_setting_without_a_meaning_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        Finish(**settings)


@pytest.mark.parametrize(
    ("finish", "given", "reason"),
    [
        (Finish("sigmoid", select=2), 2, "select is 2, the network gives 2"),
        (Finish("sigmoid", select=-1), 2, "count from 0"),
        (Finish("softmax"), 1, "set activation to sigmoid"),
        (Finish("softmax", labels=True), 257, "do not fit into uint8"),
    ],
    ids=["too high", "negative", "one class", "many classes"],
)
def test_channels_that_do_not_suit_are_refused(finish: Finish, given: int, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        finish.channels(given)
