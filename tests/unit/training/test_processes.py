from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch import Tensor, nn

from pipeline.errors import ConfigurationError
from pipeline.training import processes
from pipeline.training.losses import DiceLoss
from pipeline.training.ordering import DataOrder, KeyedDataset, OrderedBatches
from pipeline.training.step import TrainingStep

SAMPLES = 13  # by 6: the last batch has one, and nothing for the second process


class NoTransform:
    def set_random_state(self, seed: int | None = None) -> None:
        """Nothing here is random."""


class Labelled(torch.utils.data.Dataset[Any]):
    """Double-precision images and labels with names; item `bad` is not a number."""

    def __init__(self, bad: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(SAMPLES, 1, 6, 6, generator=generator, dtype=torch.float64)
        self.labels = (torch.rand(self.images.shape, generator=generator) < 0.4).double()
        if bad is not None:
            self.images[bad] = torch.nan

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = {"image": self.images[index], "label": self.labels[index]}
        return found | {"name": f"eye_{index}.png"}


class Branched(nn.Module):
    """Group norm, a buffer, and parameters that no sample reaches."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.last = nn.Conv2d(4, 1, 1)
        self.idle = nn.Linear(2, 2)
        self.register_buffer("offset", torch.randn(1))
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(image)))) + self.offset


def make_trainer(
    batch_size: int,
    *,
    rank: int = 0,
    count: int = 1,
    seed: int = 0,
    bad: int | None = None,
    handlers: tuple[Any, ...] = (),
    **settings: Any,
) -> SupervisedTrainer:
    dataset = KeyedDataset(Labelled(bad), NoTransform(), seed=5)
    batches = OrderedBatches(dataset, batch_size, 5, rank, count)
    network = Branched(seed)
    step = TrainingStep(
        batch_size=batch_size, samples=SAMPLES, rank=rank, processes=count,
        **{"accumulation_steps": 2} | settings,
    )  # fmt: skip
    return SupervisedTrainer(
        device="cpu",
        max_epochs=3,
        train_data_loader=DataLoader(dataset, batch_sampler=batches),
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.1),
        loss_function=DiceLoss(per_sample=True, ignore_label=None),
        iteration_update=step,
        decollate=False,
        train_handlers=[DataOrder(batches, seed=5), *handlers],
    )


def trained(trainer: SupervisedTrainer) -> dict[str, Tensor]:
    trainer.run()
    return dict(trainer.network.state_dict())


def fails_at(network: nn.Module, call: int) -> None:
    """Make a network run out of memory once, after part of the gradient has been added."""
    calls: list[int] = []

    def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
        calls.append(1)
        if len(calls) == call:
            output.register_hook(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))

    network.norm.register_forward_hook(hook)


# Scenarios, the first thing that two processes do; what one returns is for the test


def asking_ignite_alone(mine: processes.Processes) -> Any:
    """Before anything else, since the first question is the one that would wait."""
    found = idist.get_rank() if mine.rank == 0 else None
    return found, processes.any_process(mine.rank == 0)


def training(mine: processes.Processes) -> Any:
    # another seed: the weights of process 0 must reach the other one
    return trained(make_trainer(3, rank=mine.rank, count=2, seed=mine.rank, clip_norm=0.05))


def out_of_memory_in_one(mine: processes.Processes) -> Any:
    trainer = make_trainer(3, rank=mine.rank, count=2)
    if mine.rank == 1:
        fails_at(trainer.network, 4)
    return trained(trainer)


def not_finite_in_one(mine: processes.Processes) -> Any:
    trainer = make_trainer(3, rank=mine.rank, count=2, bad=7, skip_not_finite=2)
    try:
        trainer.run()
    except ArithmeticError as error:
        return trainer.state.iteration, str(error)


def validation(mine: processes.Processes) -> Any:
    network = nn.Identity()
    validator = SupervisedEvaluator(
        device="cpu",
        network=network,
        val_data_loader=DataLoader(Dataset([{"image": torch.ones(1)}])),
    )
    ran: list[int] = []

    def measure(engine: Any) -> None:
        ran.append(engine.state.epoch)
        engine.state.metrics["val_dice"] = torch.tensor(0.1 * engine.state.epoch)

    validator.add_event_handler(Events.EPOCH_COMPLETED, measure)
    trainer = make_trainer(
        3,
        rank=mine.rank,
        count=2,
        handlers=(processes.Validation(interval=2, validator=validator),),
    )
    trainer.run()
    return ran, validator.state.epoch, validator.state.metrics


def failure_of_the_writer(mine: processes.Processes) -> Any:
    try:
        processes.from_writer(lambda: 1 / 0)
    except (ZeroDivisionError, processes.LaminaError) as error:
        return type(error).__name__


def different_iterations(mine: processes.Processes) -> Any:
    try:
        processes.share_weights(nn.Linear(1, 1), iteration=1 + 3 * mine.rank)
    except ConfigurationError as error:
        return str(error)


def plain_values(mine: processes.Processes) -> Any:
    return (
        processes.from_writer(lambda: {"rank": mine.rank}),
        processes.is_writer(),
        processes.sum_over_processes([1.5, mine.rank]),
        processes.any_process(mine.rank == 1),
        processes.any_process(False),
        processes.texts_of_processes("ab"[mine.rank]),
    )


def statistics(mine: processes.Processes) -> Any:
    network = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.Linear(2, 2))
    network.register_buffer("constant", torch.tensor(1.0 + mine.rank))
    network[0](torch.full((2, 2, 3, 3), 1.0 + mine.rank))
    network[1].running_mean += mine.rank
    network[1].eval()  # frozen
    processes.share_statistics(network)
    return dict(network.state_dict())


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        asking_ignite_alone,
        training,
        out_of_memory_in_one,
        not_finite_in_one,
        validation,
        failure_of_the_writer,
        different_iterations,
        statistics,
        plain_values,
    )
}


def act(folder: str) -> None:
    """Run every scenario in this process and keep what it returns."""
    torch.set_num_threads(1)
    mine = processes.join_processes("cpu", timeout_minutes=2)
    found = {name: scenario(mine) for name, scenario in SCENARIOS.items()}
    torch.save(found, Path(folder) / f"{mine.rank}.pt")
    processes.leave_processes()


@pytest.fixture(scope="module")
def found(
    run_in_two: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of two gloo processes found."""
    folder = tmp_path_factory.mktemp("processes")
    (ended,) = run_in_two(__file__, [folder])
    assert [code for code, _ in ended] == [0, 0], ended
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same_weights(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()  # no prefix
    for name, tensor in wanted.items():
        difference = (found[name] - tensor).norm() / tensor.norm()
        assert float(difference) <= 1e-10, name


@pytest.mark.cli
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_train_as_one_with_the_larger_batch(found: Any, rank: int) -> None:
    assert_same_weights(found[rank]["training"], trained(make_trainer(6, clip_norm=0.05)))


@pytest.mark.cli
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_may_run_out_of_memory(found: Any, rank: int) -> None:
    assert_same_weights(found[rank]["out_of_memory_in_one"], trained(make_trainer(6)))


@pytest.mark.cli
def test_a_loss_that_is_not_finite_in_one_stops_both_and_both_name_the_file(found: Any) -> None:
    (one, told), (other, told_too) = (each["not_finite_in_one"] for each in found)
    assert one == other
    assert told == told_too
    assert "eye_7.png" in told
    alone = make_trainer(6, bad=7, skip_not_finite=2)
    with pytest.raises(ArithmeticError, match=r"eye_7\.png"):
        alone.run()
    assert alone.state.iteration == one


@pytest.mark.cli
def test_validation_runs_in_one_and_both_know_its_metrics(found: Any) -> None:
    (ran, epoch, metrics), (ran_too, epoch_too, metrics_too) = (
        each["validation"] for each in found
    )
    assert (ran, ran_too) == ([2, 3], [])
    assert (epoch, epoch_too) == (3, 3)
    assert metrics_too == {"val_dice": pytest.approx(0.3)}
    assert float(metrics["val_dice"]) == metrics_too["val_dice"]


@pytest.mark.cli
def test_a_failure_of_the_writer_reaches_the_others(found: Any) -> None:
    told = [each["failure_of_the_writer"] for each in found]
    assert told == ["ZeroDivisionError", "LaminaError"]


@pytest.mark.cli
def test_processes_that_did_not_resume_together_are_refused(found: Any) -> None:
    for each in found:
        assert "at iterations 1, 4; output_dir must be one folder" in each["different_iterations"]


@pytest.mark.cli
def test_plain_values_travel(found: Any) -> None:
    for rank, each in enumerate(found):
        assert each["plain_values"] == (
            {"rank": 0}, rank == 0, [3.0, 1.0], True, False, ["a", "b"]
        )  # fmt: skip


@pytest.mark.cli
def test_one_process_may_ask_ignite_for_its_rank(found: Any) -> None:
    assert [each["asking_ignite_alone"] for each in found] == [(0, True), (None, True)]


@pytest.mark.cli
def test_running_statistics_become_the_means_of_all_processes(found: Any) -> None:
    one, other = (each["statistics"] for each in found)
    for state in (one, other):
        assert state["0.running_mean"].tolist() == pytest.approx([0.15, 0.15])
        assert state["0.num_batches_tracked"] == 1
    assert torch.equal(one["0.running_var"], other["0.running_var"])
    assert other["1.running_mean"].tolist() == [1.0, 1.0]  # not renewed in training
    assert (one["constant"], other["constant"]) == (1.0, 2.0)


# One process


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert processes.join_processes("cpu") == processes.Processes(0, 1, "cpu")
    assert processes.is_writer()
    assert processes.from_writer(lambda: 3) == 3
    assert processes.sum_over_processes([2, True]) == [2.0, 1.0]
    assert processes.any_process(True)
    assert processes.texts_of_processes("a") == ["a"]
    assert processes.texts_of_processes("") == []
    network = nn.BatchNorm2d(2)
    network.running_mean.fill_(0.5)
    processes.share_statistics(network)
    assert network.running_mean.tolist() == [0.5, 0.5]
    processes.leave_processes()


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda:1", 4, "device is 'cuda:1'; with several processes it must be auto, cuda or cpu"),
        ("auto", 1, "2 processes on this machine, which has 1 GPUs; start one process per GPU"),
        ("cuda", 0, "2 processes on this machine, which has 0 GPUs"),
    ],
)
def test_processes_need_a_gpu_each(
    device: str, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigurationError, match=message):
        processes.join_processes(device)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12))
def test_buckets_are_the_tensors_in_order_and_of_one_kind(shapes: list[tuple[int, bool]]) -> None:
    tensors = [torch.zeros(n, dtype=torch.float64 if wide else torch.float32) for n, wide in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_BUCKET_BYTES", 40)
        buckets = list(processes._buckets(tensors))
    assert [id(t) for bucket in buckets for t in bucket] == [id(t) for t in tensors]
    for bucket in buckets:
        assert len({t.dtype for t in bucket}) == 1
        assert len(bucket) == 1 or sum(t.nbytes for t in bucket) <= 40


def validated_epochs(interval: Any) -> list[int]:
    validator = SupervisedEvaluator(
        device="cpu",
        network=nn.Identity(),
        val_data_loader=DataLoader(Dataset([{"image": torch.ones(1)}])),
    )
    ran: list[int] = []
    validator.add_event_handler(Events.EPOCH_COMPLETED, lambda: ran.append(validator.state.epoch))
    make_trainer(3, handlers=(processes.Validation(interval, validator),)).run()
    return ran


@pytest.mark.parametrize(("interval", "epochs"), [(1, [1, 2, 3]), (2, [2, 3]), (3, [3]), (5, [3])])
def test_the_last_epoch_is_validated_wherever_the_interval_falls(
    interval: int, epochs: list[int]
) -> None:
    assert validated_epochs(interval) == epochs


@pytest.mark.parametrize("interval", [0, -1, 0.5, "2", None])
def test_an_interval_that_is_none_is_refused_before_training(interval: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"val_interval must be a whole number of epochs"):
        validated_epochs(interval)
