from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import CacheDataset
from monai.transforms import Compose, Lambdad, RandGaussianNoised
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.classification.sampling import (
    Balance,
    BalancedDataset,
    balanced_indices,
    sample_weights,
)
from pipeline.errors import ConfigurationError
from pipeline.training.ordering import KeyedDataset, OrderedBatches

LABELS = [0] * 40 + [1] * 8 + [2] * 2

labels = st.lists(st.integers(0, 6), min_size=1, max_size=200)
balances = st.sampled_from(get_args(Balance))


def dataset(kind: type[KeyedDataset], seed: int = 5, **settings: Any) -> Any:
    transform = Compose([Lambdad("index", torch.as_tensor), RandGaussianNoised("image", prob=1.0)])
    data = [{"index": n, "image": torch.zeros(1, 2, 2)} for n in range(len(LABELS))]
    cached = CacheDataset(data, transform, progress=False, copy_cache=False)
    return kind(cached, transform, seed, **settings)


def epoch_of(items: Any, epoch: int, workers: int = 0, skip: int = 0) -> list[tuple[int, float]]:
    batches = OrderedBatches(items, 4, seed=5)
    batches.begin(epoch, skip)
    loader = DataLoader(items, batch_sampler=batches, num_workers=workers)
    return [
        (int(index), float(image.as_subclass(Tensor).sum()))
        for batch in loader
        for index, image in zip(batch["index"], batch["image"], strict=True)
    ]


@given(labels=labels, balance=balances)
def test_weights_are_1_on_average_and_equal_within_a_class(
    labels: list[int], balance: Balance
) -> None:
    weights = sample_weights(labels, balance)
    assert weights.mean() == pytest.approx(1)
    for label in set(labels):
        assert np.ptp(weights[np.asarray(labels) == label]) == 0


def test_inverse_gives_classes_one_weight_and_sqrt_the_root_of_their_size() -> None:
    for balance, expected in (("inverse", [1, 1, 1]), ("sqrt", np.sqrt([40, 8, 2]))):
        weights = sample_weights(LABELS, balance)
        totals = np.bincount(LABELS, weights)
        np.testing.assert_allclose(totals / totals.sum(), expected / np.sum(expected))
    assert sample_weights(LABELS, "none").tolist() == [1.0] * 50


@given(labels=labels, balance=balances, seed=st.integers(0, 99), epoch=st.integers(0, 99))
def test_an_epoch_draws_every_sample_by_its_weight(
    labels: list[int], balance: Balance, seed: int, epoch: int
) -> None:
    chosen = balanced_indices(labels, balance, seed, epoch)
    assert len(chosen) == len(labels)
    weights = sample_weights(labels, balance)
    times = np.bincount(chosen, minlength=len(labels))
    assert (times >= np.floor(weights - 1e-9)).all()
    assert (times <= np.ceil(weights + 1e-9)).all()
    wanted = np.bincount(labels, weights)
    assert np.abs(np.bincount(labels, times) - wanted).max() < 1 + 1e-9


def test_epochs_leave_out_other_samples_of_a_large_class() -> None:
    first, again, second = (balanced_indices(LABELS, "inverse", 3, epoch) for epoch in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert set(first.tolist()) != set(second.tolist())
    seen = {n for epoch in range(12) for n in balanced_indices(LABELS, "inverse", 3, epoch)}
    assert seen == set(range(50))


def test_without_balance_it_is_a_keyed_dataset() -> None:
    balanced = dataset(BalancedDataset, labels=LABELS, balance="none")
    assert epoch_of(balanced, 2) == epoch_of(dataset(KeyedDataset), 2)


def test_an_image_drawn_twice_is_varied_twice() -> None:
    drawn = epoch_of(dataset(BalancedDataset, labels=LABELS, balance="inverse"), 1)
    rare = [noise for index, noise in drawn if index >= 48]
    assert len(rare) > 10
    assert len(set(rare)) == len(rare)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_draws_what_the_whole_one_draws(workers: int) -> None:
    settings: dict[str, Any] = {"labels": LABELS, "balance": "inverse"}
    whole = epoch_of(dataset(BalancedDataset, **settings), 3)
    items = dataset(BalancedDataset, **settings)
    epoch_of(items, 2)  # what went before does not matter
    assert epoch_of(items, 3, workers, skip=5) == whole[20:]


def test_two_processes_draw_together_what_one_draws() -> None:
    items = dataset(BalancedDataset, labels=LABELS, balance="sqrt")
    shares = [OrderedBatches(items, 5, 5, rank, processes=2) for rank in (0, 1)]
    together = [key for pair in zip(*shares, strict=True) for batch in pair for key in batch]
    assert sorted(together) == sorted(
        key for batch in OrderedBatches(items, 10, 5) for key in batch
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": LABELS, "balance": "equal"}, "balance is 'equal', expected one of none, sqrt"),
        ({"labels": LABELS[:-1]}, "49 labels for 50 training samples"),
        ({"labels": []}, "no training samples to balance"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        dataset(BalancedDataset, **settings)
