"""Data order and augmentation that depend on seed, epoch and index alone.

Every random decision of training is derived from a counter instead of a generator that runs along.
A run that is killed and resumed then draws what the uninterrupted run draws, in the middle of an
epoch too, for any number of loader workers, and nothing but epoch and iteration has to be saved.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sized
from typing import Any, Protocol

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch.utils.data import Dataset, Sampler

__all__ = ["DataOrder", "KeyedDataset", "OrderedBatches", "derived_seed"]

Key = tuple[int, int]


def derived_seed(*parts: int | str) -> int:
    """Return a 32-bit seed that follows from `parts` alone, on every machine.

    Example:
        >>> derived_seed(42, 3, "order") == derived_seed(42, 3, "order")
        True
    """
    # numpy integers print differently from Python's: cast, so that equal parts give equal seeds
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=4).digest(), "little")


class _Randomizable(Protocol):
    def set_random_state(self, seed: int | None = None) -> Any: ...


class KeyedDataset(Dataset[Any]):
    """A dataset whose item `(epoch, index)` is always the same, random transforms included.

    Args:
        dataset: the dataset; `dataset[index]` applies `transform`.
        transform: the random transforms inside, a MONAI `Compose`; they are seeded for each item.
        seed: the run's seed.
    """

    def __init__(self, dataset: Dataset[Any], transform: _Randomizable, seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        """Return the number of items in an epoch."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Key | int) -> Any:
        """Return item `index` as `epoch` draws it; an index alone means epoch 0."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        drawn = derived_seed(self.seed, epoch, index, "item")
        self.transform.set_random_state(seed=drawn)
        # Transforms that use a global generator against MONAI's advice are covered too.
        random.seed(drawn)
        np.random.seed(drawn)  # noqa: NPY002 - seeding the global generator is the point
        _seed_torch(drawn)
        return self.dataset[index]


def _seed_torch(seed: int) -> None:
    """Do what `torch.manual_seed` does, without the half millisecond it takes for absent GPUs."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


class OrderedBatches(Sampler[list[Key]]):
    """Batches of `(epoch, index)` keys in an order that follows from seed and epoch.

    Give it to a DataLoader as `batch_sampler`, over a `KeyedDataset`; a `DataOrder` among the
    trainer's handlers tells it the epoch and, in a resumed run, what to leave out.

    Args:
        dataset: its length is the number of items.
        batch_size: items per batch and process.
        seed: the run's seed.
        rank: number of this process.
        processes: how many processes share an epoch. Each takes every `processes`-th item of a
            batch of `batch_size * processes`, so that together they see what one process with
            the larger batch sees. A process for which an epoch's last batch has no item left gets
            its first item, which `TrainingStep` does not count.
    """

    def __init__(
        self, dataset: Sized, batch_size: int, seed: int, rank: int = 0, processes: int = 1
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        if not 0 <= rank < processes:
            raise ValueError(f"rank must be in [0, {processes}), got {rank!r}")
        if len(dataset) < processes:
            raise ValueError(f"{len(dataset)} items are too few for {processes} processes")
        self.items = len(dataset)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.epoch = 0
        self.skip = 0

    def begin(self, epoch: int, skip: int = 0) -> None:
        """Make the next iteration over the batches that of `epoch`, without its first `skip`."""
        self.epoch = epoch
        self.skip = skip

    def __len__(self) -> int:
        """Return the number of batches in an epoch; the last may be smaller."""
        return -(-self.items // (self.batch_size * self.processes))

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield the batches of the present epoch that are still to come."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch, "order"))
        order: list[int] = torch.randperm(self.items, generator=generator).tolist()
        step = self.batch_size * self.processes
        for start in range(self.skip * step, len(order), step):
            batch = order[start : start + step]
            mine = batch[self.rank :: self.processes] or batch[:1]
            yield [(self.epoch, index) for index in mine]


class DataOrder:
    """Tell the batches which epoch begins, and seed torch before every step.

    List it among `train::handlers`. The seed of a step is for dropout and whatever else draws
    inside the network; each process has its own.

    Args:
        batches: the loader's batch sampler.
        seed: the run's seed.
    """

    def __init__(self, batches: OrderedBatches, seed: int) -> None:
        self.batches = batches
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin_step)

    def _begin_epoch(self, engine: Engine) -> None:
        before = (engine.state.epoch - 1) * len(self.batches)
        # Not 0 only in a resumed run, whose first epoch may begin in the middle.
        self.batches.begin(engine.state.epoch, skip=engine.state.iteration - before)

    def _begin_step(self, engine: Engine) -> None:
        rank = self.batches.rank
        own = (rank,) if rank else ()
        _seed_torch(derived_seed(self.seed, engine.state.iteration, "step", *own))
