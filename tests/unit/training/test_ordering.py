from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from monai.data import CacheDataset, DataLoader
from monai.transforms import Compose, RandFlipd, RandGaussianNoised, RandLambdad, RandSpatialCropd
from torch.utils.data import ConcatDataset

from pipeline.training.ordering import DataOrder, KeyedDataset, OrderedBatches, derived_seed

parts = st.lists(st.integers(-(2**62), 2**62) | st.text(max_size=8), min_size=1, max_size=4)


def global_noise(image: torch.Tensor) -> torch.Tensor:
    """Draw from the three global generators, against MONAI's advice."""
    return image + random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002


def keyed(items: int = 7, seed: int = 3, repeats: int = 1) -> KeyedDataset:
    """Return images that every kind of random transform has changed."""
    transform = Compose(
        [
            RandSpatialCropd(keys="image", roi_size=(4, 4), random_size=False),
            RandFlipd(keys="image", prob=0.5),
            RandGaussianNoised(keys="image", prob=0.5, std=1.0),
            RandLambdad(keys="image", func=global_noise, prob=0.7),
        ]
    )
    data = [{"image": torch.full((1, 6, 6), float(i)), "name": str(i)} for i in range(items)]
    cached = CacheDataset(data, transform, progress=False, copy_cache=False)
    return KeyedDataset(ConcatDataset([cached] * repeats), transform, seed)


def image(dataset: KeyedDataset, key: Any) -> torch.Tensor:
    return torch.as_tensor(dataset[key]["image"]).clone()


def epoch_of(dataset: KeyedDataset, epoch: int, workers: int, skip: int = 0) -> list[Any]:
    batches = OrderedBatches(dataset, batch_size=2, seed=5)
    batches.begin(epoch, skip)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers)
    return [(batch["name"], torch.as_tensor(batch["image"]).clone()) for batch in loader]


def is_equal(left: list[Any], right: list[Any]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


@given(parts)
def test_a_derived_seed_fits_every_generator_and_depends_on_every_part(values: list[Any]) -> None:
    seed = derived_seed(*values)
    assert 0 <= seed < 2**32
    np.random.default_rng(seed)
    torch.Generator().manual_seed(seed)
    assert seed == derived_seed(*values)
    assert seed != derived_seed(*values, 0)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, bool])
def test_a_derived_seed_is_the_same_for_every_type_of_integer(kind: type) -> None:
    assert derived_seed(kind(1), 2, "item") == derived_seed(1, 2, "item")


def test_a_derived_seed_tells_a_number_from_its_text_and_keeps_its_value() -> None:
    assert derived_seed(1, "a") != derived_seed("1", "a")
    assert derived_seed(42, 3, "order") == 1661437247  # or old runs resume otherwise


def test_an_item_does_not_depend_on_what_was_drawn_before() -> None:
    dataset = keyed()
    alone = image(dataset, (2, 4))
    for key in [(2, 1), (1, 4), (2, 6), (9, 0)]:
        dataset[key]
    assert torch.equal(image(dataset, (2, 4)), alone)
    assert torch.equal(image(keyed(), (2, 4)), alone)


def test_an_item_differs_between_epochs_seeds_and_repeats_of_a_file() -> None:
    drawn = [image(keyed(repeats=2), key) for key in [(1, 4), (2, 4), (1, 4 + 7)]]
    drawn.append(image(keyed(repeats=2, seed=4), (1, 4)))
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize("index", [3, np.int64(3)])
def test_an_index_alone_means_epoch_zero(index: Any) -> None:
    assert torch.equal(image(keyed(), index), image(keyed(), (0, 3)))


def test_loader_workers_change_nothing() -> None:
    dataset = keyed(repeats=2)
    alone = [epoch_of(dataset, epoch, workers=0) for epoch in (1, 2)]
    assert is_equal(epoch_of(dataset, 1, workers=2), alone[0])
    assert is_equal(epoch_of(dataset, 2, workers=2), alone[1])
    assert not is_equal(alone[0], alone[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_left_of_an_epoch_is_its_end(workers: int) -> None:
    dataset = keyed(repeats=2)
    assert is_equal(epoch_of(dataset, 1, workers, skip=4), epoch_of(dataset, 1, 0)[4:])


@given(st.integers(1, 30), st.integers(1, 7), st.integers(0, 9))
def test_an_epoch_has_every_item_once_in_batches_of_the_size(n: int, size: int, epoch: int) -> None:
    batches = OrderedBatches(range(n), size, seed=1)
    batches.begin(epoch)
    found = list(batches)
    assert sorted(index for batch in found for _, index in batch) == list(range(n))
    assert {key[0] for batch in found for key in batch} == {epoch}
    assert [len(batch) for batch in found[:-1]] == [size] * (len(batches) - 1)
    assert len(found) == len(batches)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_processes_share_the_batches_that_one_process_would_see(
    n: int, size: int, processes: int, skip: int
) -> None:
    n = max(n, processes)
    whole = OrderedBatches(range(n), size * processes, seed=1)
    whole.begin(2, skip)
    shares = [OrderedBatches(range(n), size, 1, rank, processes) for rank in range(processes)]
    for share in shares:
        share.begin(2, skip)
    assert {len(share) for share in shares} == {len(whole)}
    for batch, *mine in zip(whole, *shares, strict=True):
        # in the last batch those for whom nothing is left get its first item once more
        left = len(batch)
        assert [share == batch[:1] for share in mine[left:]] == [True] * max(processes - left, 0)
        assert sorted(key for share in mine[:left] for key in share) == sorted(batch)
        assert max(map(len, mine)) - min(map(len, mine)) <= 1


def test_epochs_and_seeds_give_orders_of_their_own() -> None:
    orders = []
    for seed, epoch in [(1, 1), (1, 2), (2, 1)]:
        batches = OrderedBatches(range(20), 20, seed)
        batches.begin(epoch)
        orders.append([index for _, index in next(iter(batches))])
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"rank": 2, "processes": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"processes": 4}, "3 items are too few for 4 processes"),
    ],
)
def test_settings_are_checked(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrderedBatches(range(3), **({"batch_size": 1, "seed": 0} | settings))


def followed(epochs: int, done: int = 0, rank: int = 0, stop: int | None = None) -> list[Any]:
    """Run an engine of 4 iterations per epoch from iteration `done`; return keys and draws."""
    batches = OrderedBatches(range(14), 2, seed=1, rank=rank, processes=2)
    seen: list[Any] = []

    def step(engine: Engine, batch: list[tuple[int, int]]) -> None:
        seen.append((engine.state.epoch, tuple(batch), float(torch.rand(()))))
        if engine.state.iteration == stop:
            engine.terminate()

    def resume(engine: Engine) -> None:
        engine.state.iteration, engine.state.epoch = done, done // 4

    engine = Engine(step)
    engine.add_event_handler(Events.STARTED, resume)
    DataOrder(batches, seed=1).attach(engine)
    torch.manual_seed(random.randrange(1000))  # noise of another process
    loader = DataLoader(Identity(), batch_sampler=batches, collate_fn=list)
    engine.run(loader, max_epochs=epochs, epoch_length=len(batches))
    return seen


class Identity(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 14

    def __getitem__(self, key: Any) -> Any:
        return key


@pytest.mark.parametrize("done", range(1, 12))
def test_a_run_resumed_anywhere_sees_and_draws_what_the_uninterrupted_one_does(done: int) -> None:
    whole = followed(3)
    assert followed(3, stop=done) == whole[:done]
    assert followed(3, done=done) == whole[done:]


def test_the_epoch_in_the_keys_is_that_of_the_trainer() -> None:
    for epoch, keys, _ in followed(3):
        assert {key[0] for key in keys} == {epoch}


def test_processes_draw_differently_in_a_step() -> None:
    mine, other = ([draw for _, _, draw in followed(1, rank=rank)] for rank in (0, 1))
    assert not set(mine) & set(other)


def test_order_is_the_same_on_every_machine() -> None:
    batches = OrderedBatches(range(10), 10, seed=42)
    batches.begin(1)
    assert [index for _, index in next(iter(batches))] == [6, 2, 4, 3, 5, 9, 0, 7, 8, 1]
