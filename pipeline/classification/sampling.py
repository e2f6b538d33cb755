"""Unequal classes: how often each is drawn in an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from monai.transforms import Compose
from numpy.typing import NDArray
from torch.utils.data import Dataset

from pipeline.errors import ConfigurationError
from pipeline.training.ordering import Key, KeyedDataset, derived_seed

__all__ = ["Balance", "BalancedDataset", "balanced_indices", "sample_weights"]

Balance = Literal["none", "sqrt", "inverse"]

_POWERS: dict[str, float] = {"none": 0.0, "sqrt": 0.5, "inverse": 1.0}


def sample_weights(labels: Sequence[int], balance: Balance = "inverse") -> NDArray[np.float64]:
    """Return how often each sample is to be drawn in an epoch as long as the data; the mean is 1.

    Args:
        labels: class of each sample.
        balance: `inverse` draws every class equally often, `sqrt` in proportion to the square root
            of its size, `none` each sample once.

    Raises:
        ConfigurationError: no samples, or another balance.

    Example:
        >>> sample_weights([0, 0, 0, 1], "inverse").round(2).tolist()
        [0.67, 0.67, 0.67, 2.0]
    """
    if balance not in get_args(Balance):
        raise ConfigurationError(
            f"balance is {balance!r}, expected one of {', '.join(get_args(Balance))}"
        )
    if not len(labels):
        raise ConfigurationError("no training samples to balance")
    _, place, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    weights = counts[place] ** -_POWERS[balance]
    return np.asarray(weights / weights.mean())


def balanced_indices(
    labels: Sequence[int], balance: Balance, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Return the samples of an epoch, as many as there are labels, ordered by class.

    They follow from the arguments alone. A sample of weight `w` is drawn `floor(w)` or `ceil(w)`
    times and each class in its share to within one sample: what is left to chance is which samples
    of a large class are left out, another part in every epoch.

    Args:
        labels: class of each sample.
        balance: as in `sample_weights`.
        seed: the run's seed.
        epoch: its number.

    Raises:
        ConfigurationError: as `sample_weights`.
    """
    weights = sample_weights(labels, balance)
    total = len(weights)
    rng = np.random.Generator(np.random.PCG64(derived_seed(seed, epoch, "balance")))
    order = np.lexsort((rng.permutation(total), np.asarray(labels)))
    reached = np.cumsum(weights[order])
    marks = (np.arange(total) + rng.random()) * (reached[-1] / total)
    chosen: NDArray[np.int64] = order[np.searchsorted(reached, marks, side="right")]
    return chosen


class BalancedDataset(KeyedDataset):
    """A `KeyedDataset` whose epochs draw rare classes more often and frequent ones less.

    Item `(epoch, place)` follows from seed, epoch and place alone, so that `OrderedBatches` and
    `DataOrder` resume it as they do a `KeyedDataset`. An image that is drawn twice in an epoch is
    augmented differently each time. With balance `none` it is a `KeyedDataset`.

    Args:
        dataset: the dataset; `dataset[index]` applies `transform`.
        transform: the random transforms inside.
        seed: the run's seed.
        labels: class of each item of `dataset`.
        balance: `none`, `sqrt` or `inverse`.

    Raises:
        ConfigurationError: another balance, or another number of labels than items.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        transform: Compose,
        seed: int,
        labels: Sequence[int],
        balance: Balance = "none",
    ) -> None:
        self.labels = np.asarray(labels, np.int64)
        self.balance: Balance = balance
        sample_weights(labels, balance)  # refuses what is wrong before training starts
        self._drawn = _Drawn(dataset)
        super().__init__(self._drawn, transform, seed)
        if len(self) != len(self.labels):
            raise ConfigurationError(
                f"{len(self.labels)} labels for {len(self)} training samples; give one for each"
            )

    def __getitem__(self, key: Key | int) -> Any:
        """Return what `epoch` draws at `place`; a place alone means epoch 0."""
        epoch, place = key if isinstance(key, tuple) else (0, key)
        if self.balance != "none" and self._drawn.epoch != epoch:
            self._drawn.indices = self.indices(epoch)
            self._drawn.epoch = epoch
        return super().__getitem__((epoch, place))

    def indices(self, epoch: int) -> NDArray[np.int64]:
        """Return the items of the dataset that `epoch` draws, by place."""
        if self.balance == "none":
            return np.arange(len(self.labels))
        return balanced_indices(self.labels.tolist(), self.balance, self.seed, epoch)


class _Drawn(Dataset[Any]):
    """The items of a dataset in the places an epoch gives them."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.indices: NDArray[np.int64] | None = None
        self.epoch: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, place: int) -> Any:
        return self.dataset[place if self.indices is None else int(self.indices[place])]
