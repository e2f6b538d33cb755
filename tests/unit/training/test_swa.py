"""Stochastic weight averaging in a tiny run with batch norm, dropout and derived data order."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from monai.transforms import Compose, RandGaussianNoised
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from pipeline.errors import ConfigurationError
from pipeline.training.averaging import AveragedNetwork, EMAHandler, SWAHandler
from pipeline.training.checkpoints import read_checkpoint
from pipeline.training.epoch_metrics import ValidationLoss
from pipeline.training.history import History, read_history
from pipeline.training.monitor import Monitor
from pipeline.training.ordering import DataOrder, KeyedDataset, OrderedBatches
from pipeline.training.saving import CheckpointHandler
from pipeline.training.step import TrainingStep

EPOCHS, LENGTH = 4, 3
SCHEDULES = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=EPOCHS * LENGTH),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
}


class Stopped(Exception):  # noqa: N818 - stands for a kill
    """The process ends."""


def cases(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 1, 6, 6, generator=generator)
    return [{"image": image, "label": (image > 0.5).float()} for image in images]


@dataclass
class Run:
    """Four epochs of three steps, averaged from the second epoch on unless `averaging` differs."""

    folder: Path
    averaging: dict[str, Any] = field(default_factory=dict)
    decay: float | None = None
    schedule: str = "cosine"
    epoch_level: bool = False
    schedule_last: bool = False
    accumulation: int = 1
    workers: int = 0
    epochs: int = EPOCHS
    stop_after: int = 999  # iterations
    every: int | None = None
    batch_norm: bool = True
    averager: type[EMAHandler] | None = None

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(2) if self.batch_norm else nn.InstanceNorm2d(2)
        layers = [nn.Conv2d(1, 2, 3, padding=1), norm, nn.Dropout(0.2), nn.Conv2d(2, 1, 1)]
        self.network = nn.Sequential(*layers)
        self.average = AveragedNetwork(self.network, self.decay, warm_up=False)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.05)
        self.scheduler = SCHEDULES[self.schedule](self.optimizer)
        self.loss = nn.BCEWithLogitsLoss()
        transform = Compose([RandGaussianNoised("image", prob=0.7)])
        self.dataset = KeyedDataset(Dataset(cases(8), transform), transform, seed=1)
        self.batches = OrderedBatches(self.dataset, 3, seed=1)
        self.loader = DataLoader(self.dataset, batch_sampler=self.batches, num_workers=self.workers)
        self.evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(cases(2), batch_size=1),
            network=self.average.module,
            val_handlers=[ValidationLoss(self.loss)],
        )
        self.monitor = Monitor(self.evaluator, "val_loss", mode="min", early_stopping=False)
        self.step = TrainingStep(self.accumulation, 3, 8)
        self.rates: list[float] = []
        self.train()

    def handler(self) -> EMAHandler:
        if self.averager is not None:
            return self.averager(self.average, self.network, self.accumulation)
        settings = {"start_epoch": 2, "learning_rate": 0.01, "anneal_epochs": 2, **self.averaging}
        return SWAHandler(
            self.average,
            self.network,
            self.optimizer,
            self.accumulation,
            loader=self.loader,
            validator=self.evaluator,
            **settings,
        )

    def train(self) -> None:
        self.swa = self.handler()
        rates = [LrScheduleHandler(self.scheduler, print_lr=False, epoch_level=self.epoch_level)]
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=self.epochs,
            train_data_loader=self.loader,
            network=self.network,
            optimizer=self.optimizer,
            loss_function=self.loss,
            iteration_update=self.step,
            decollate=False,
            train_handlers=[
                DataOrder(self.batches, seed=1),
                *([self.swa, *rates] if self.schedule_last else [*rates, self.swa]),
                ValidationHandler(1, self.evaluator),
                History(str(self.folder / "history.yaml"), self.monitor, self.optimizer),
                CheckpointHandler(
                    str(self.folder),
                    self.network,
                    state={
                        "average": self.average,
                        "optimizer": self.optimizer,
                        "lr_scheduler": self.scheduler,
                        "step": self.step,
                    },
                    definition={"bundle": "phantom"},
                    monitor=self.monitor,
                    averaged=self.average.module,
                    every=self.every,
                    accumulation_steps=self.accumulation,
                ),
            ],
        )
        self.trainer.add_event_handler(Events.ITERATION_STARTED, self.note_rate)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.stop)

    def note_rate(self) -> None:
        self.rates.append(self.optimizer.param_groups[0]["lr"])

    def stop(self) -> None:
        if self.trainer.state.iteration == self.stop_after:
            raise Stopped

    def start(self) -> Run:
        if self.stop_after < self.epochs * LENGTH:
            with pytest.raises(Stopped):
                self.trainer.run()
        else:
            self.trainer.run()
        return self

    def read(self, name: str) -> dict[str, Any]:
        return read_checkpoint(self.folder / f"{name}.pt")

    def history(self) -> list[dict[str, Any]]:
        entries = read_history(self.folder / "history.yaml")
        return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def same(found: Any, expected: Any) -> bool:
    """Return whether nested plain data and tensors are equal, bit by bit."""
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}


RESUMED: dict[str, dict[str, Any]] = {
    "epochs": {},
    "steps": {"averaging": {"unit": "step", "every": 2}},
    "exponential": {"decay": 0.9, "schedule": "one-cycle"},
    "accumulated": {"accumulation": 2, "averaging": {"unit": "step"}, "epoch_level": True},
    "annealing": {"averaging": {"anneal_epochs": 10}, "schedule_last": True},
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The uninterrupted run of a kind, made once."""
    return functools.cache(lambda kind: Run(tmp_path_factory.mktemp(kind), **RESUMED[kind]).start())


@pytest.mark.parametrize(
    ("kind", "stop_after"),
    [("epochs", 2), ("epochs", 5), ("steps", 5)] + [(k, at) for k in RESUMED for at in (3, 8)],
)
def test_two_parts_are_one_whole(
    tmp_path: Path, whole_run: Callable[[str], Run], kind: str, stop_after: int
) -> None:
    """Averaging begins with iteration 4: the kill comes before, at and after it."""
    settings = RESUMED[kind]
    whole = whole_run(kind)
    Run(tmp_path, stop_after=stop_after, every=1, **settings).start()
    parts = Run(tmp_path, **settings).start()
    assert parts.trainer.state.iteration == whole.trainer.state.iteration == EPOCHS * LENGTH
    for name in ("last", "best", "swa"):
        assert same(parts.read(name), whole.read(name)), name
    assert parts.history() == whole.history()
    assert parts.rates == whole.rates[-len(parts.rates) :]


def test_two_parts_with_loader_workers_are_one_whole_without(
    tmp_path: Path, whole_run: Callable[[str], Run]
) -> None:
    whole = whole_run("epochs")
    Run(tmp_path, stop_after=8, workers=1, every=1).start()
    parts = Run(tmp_path, workers=1).start()
    for name in ("last", "swa"):
        assert same(parts.read(name), whole.read(name)), name


def test_finished_run_writes_the_same_average_again(tmp_path: Path) -> None:
    first = Run(tmp_path).start().read("swa")
    (tmp_path / "swa.pt").unlink()
    assert same(Run(tmp_path).start().read("swa"), first)


def test_finished_run_goes_on_as_if_it_had_not_ended(tmp_path: Path) -> None:
    """New statistics and the last validation are for swa.pt alone."""
    Run(tmp_path / "parts", epochs=3).start()
    parts = Run(tmp_path / "parts").start()
    whole = Run(tmp_path / "whole").start()
    for name in ("last", "swa"):
        assert same(parts.read(name), whole.read(name)), name


@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_before_the_first_update_the_average_is_the_network(
    tmp_path: Path, unit: str, accumulation: int
) -> None:
    run = Run(tmp_path, averaging={"unit": unit}, accumulation=accumulation, epoch_level=True)
    compared = []

    def compare() -> None:
        within = (run.trainer.state.iteration - 1) % LENGTH + 1
        if within % accumulation == 0 or within == LENGTH:
            begun = bool(run.average.n_averaged)
            equal = same(weights(run.average.module), weights(run.network))
            compared.append((run.trainer.state.iteration, begun, equal))

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, compare)
    run.start()
    first = {"epoch": 2 * LENGTH, "step": LENGTH + accumulation}[unit]
    assert [begun for _, begun, _ in compared] == [i >= first for i, _, _ in compared]
    # The first update is a copy too.
    assert all(equal for iteration, _, equal in compared if iteration <= first)
    assert not compared[-1][2]


def averaged_at(run: Run) -> tuple[list[int], list[dict[str, Tensor]]]:
    """Run, and return the iterations of the updates with the weights at each."""
    iterations, seen = [], []
    original = run.average.update_parameters

    def update(network: nn.Module) -> None:
        before = int(run.average.n_averaged)
        original(network)
        iterations.append(run.trainer.state.iteration)
        seen.append((before, weights(network)))

    run.average.update_parameters = update  # type: ignore[method-assign]
    run.start()
    # `follow` goes this way too, and leaves the count at 0.
    real = [i for i, (before, _) in enumerate(seen) if before]
    first = real[0] - 1
    chosen = [first, *real]
    return [iterations[i] for i in chosen], [seen[i][1] for i in chosen]


@pytest.mark.parametrize(
    ("unit", "every", "accumulation", "expected"),
    [
        ("epoch", 1, 1, [6, 9, 12]),
        ("epoch", 2, 1, [6, 12]),
        ("step", 1, 1, [4, 5, 6, 7, 8, 9, 10, 11, 12]),
        ("step", 2, 1, [4, 6, 8, 10, 12]),
        ("step", 1, 2, [5, 6, 8, 9, 11, 12]),
        ("step", 3, 2, [5, 9]),
    ],
)
def test_updates_come_when_stated_and_average_equally(
    tmp_path: Path, unit: str, every: int, accumulation: int, expected: list[int]
) -> None:
    settings = {"unit": unit, "every": every}
    run = Run(tmp_path, averaging=settings, accumulation=accumulation, epoch_level=True)
    iterations, seen = averaged_at(run)
    assert iterations == expected
    for name, parameter in run.average.module.named_parameters():
        mean = torch.stack([state[name] for state in seen]).mean(0)
        torch.testing.assert_close(parameter.detach(), mean)


def test_exponential_averaging_has_the_stated_factor(tmp_path: Path) -> None:
    run = Run(tmp_path, decay=0.75)
    _, seen = averaged_at(run)
    for name, parameter in run.average.module.named_parameters():
        first, second, third = (state[name] for state in seen)
        expected = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third
        torch.testing.assert_close(parameter.detach(), expected)


def test_exponential_averaging_is_one_case_of_it(tmp_path: Path) -> None:
    case = {"start_epoch": 1, "unit": "step", "learning_rate": None}
    for accumulation in (1, 2):
        settings: dict[str, Any] = {
            "decay": 0.8,
            "accumulation": accumulation,
            "epoch_level": True,
        }
        swa = Run(tmp_path / f"swa{accumulation}", averaging=case, **settings).start()
        ema = Run(tmp_path / f"ema{accumulation}", averager=EMAHandler, **settings).start()
        for name in ("last", "best"):
            assert same(swa.read(name), ema.read(name)), name


@pytest.mark.parametrize(
    ("schedule", "anneal_epochs", "epoch_level", "schedule_last"),
    [
        ("cosine", 0, False, False),
        ("cosine", 2, False, True),
        ("restarts", 1, True, False),
        ("restarts", 10, True, True),
        ("one-cycle", 2, False, False),
        ("exponential", 10, False, True),
    ],
)
def test_rate_is_that_of_torch_from_the_start_epoch_on(
    tmp_path: Path, schedule: str, anneal_epochs: int, epoch_level: bool, schedule_last: bool
) -> None:
    run = Run(
        tmp_path,
        averaging={"anneal_epochs": anneal_epochs},
        schedule=schedule,
        epoch_level=epoch_level,
        schedule_last=schedule_last,
    ).start()
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.05)
    plain = SCHEDULES[schedule](optimizer)
    expected = []
    for iteration in range(LENGTH):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if not epoch_level or iteration == LENGTH - 1:
            plain.step()
    oracle = SWALR(optimizer, 0.01, anneal_epochs)
    for _ in range(1, EPOCHS):
        oracle.step()
        expected += [optimizer.param_groups[0]["lr"]] * LENGTH
    assert run.rates == pytest.approx(expected, rel=1e-12)
    if not schedule_last:
        recorded = [entry["learning_rate"] for entry in run.history()]
        assert recorded[1:] == run.rates[LENGTH::LENGTH]


def test_without_a_rate_of_its_own_the_schedule_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, averaging={"learning_rate": None}).start()
    expected = [0.05 * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(EPOCHS * LENGTH)]
    assert run.rates == pytest.approx(expected)


@pytest.mark.parametrize("norm_batches", [None, 2])
def test_statistics_at_the_end_are_those_of_the_last_epochs_batches(
    tmp_path: Path, norm_batches: int | None
) -> None:
    run = Run(tmp_path, averaging={"norm_batches": norm_batches}).start()
    means = []
    run.batches.begin(EPOCHS)
    with torch.no_grad():
        for batch in itertools.islice(run.loader, norm_batches):
            means.append(run.average.module[0](batch["image"]).mean((0, 2, 3)))
    expected = torch.stack(means).mean(0)
    torch.testing.assert_close(run.average.module[1].running_mean, expected)
    torch.testing.assert_close(run.read("swa")["model"]["1.running_mean"], expected)
    saved = run.read("last")["training_state"]["average"]
    assert not torch.equal(saved["module.1.running_mean"], expected)


def test_reading_the_loader_leaves_the_data_order_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    before: dict[str, Any] = {}
    run.trainer.add_event_handler(
        Events.EPOCH_COMPLETED(once=EPOCHS),
        lambda: before.update(epoch=run.batches.epoch, skip=run.batches.skip),
    )
    run.start()
    assert before == {"epoch": run.batches.epoch, "skip": run.batches.skip}


def test_without_batch_norm_the_loader_is_not_read_again(tmp_path: Path) -> None:
    run = Run(tmp_path, batch_norm=False)
    read: list[int] = []

    def count(item: Any) -> Any:
        read.append(1)
        return item

    run.dataset.dataset.transform = Compose([count])
    run.start()
    assert len(read) == EPOCHS * 8
    assert same(run.read("swa")["model"], weights(run.average.module))


def test_average_is_saved_with_figures_of_its_own(tmp_path: Path) -> None:
    run = Run(tmp_path).start()
    swa, last = run.read("swa"), run.read("last")
    with torch.no_grad():
        run.average.module.eval()
        losses = [
            run.loss(run.average.module(case["image"][None]), case["label"][None])
            for case in cases(2)
        ]
    assert swa["metrics"]["val_loss"] == pytest.approx(float(sum(losses)) / 2)
    assert swa["metrics"]["val_loss"] != last["metrics"]["val_loss"]
    assert len(run.history()) == EPOCHS


def test_log_says_what_was_averaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Run(tmp_path).start()
    assert "averaged 3 sets of weights; statistics of 1 batch norm layers computed" in caplog.text
    assert "averaged: val_loss 0." in caplog.text


def test_start_beyond_the_end_is_told_and_leaves_the_plain_network(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, averaging={"start_epoch": 40}).start()
    assert "averaged from epoch 40 on and the run ends with epoch 4" in caplog.text
    assert "training ended in epoch 4, before weights were averaged" in caplog.text
    assert same(run.read("swa")["model"], weights(run.network))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_epoch": 0}, "start_epoch must be at least 1, got 0"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"anneal_epochs": -1}, "anneal_epochs must be at least 0, got -1"),
        ({"norm_batches": 0}, "norm_batches must be at least 1, got 0"),
        ({"unit": "iteration"}, "unit must be epoch or step, got 'iteration'"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
    ],
)
def test_settings_are_checked(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Run(tmp_path, averaging=settings)
