"""Schedules under MONAI's LrScheduleHandler: their course, and that a resumed run keeps to it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from pipeline.errors import ConfigurationError
from pipeline.training.checkpoints import read_checkpoint, write_checkpoint
from pipeline.training.schedules import ValidatedPlateau, warm_up, with_own_length

EPOCHS, LENGTH = 4, 3
STEPS = EPOCHS * LENGTH
RATE = 0.1
Make = Callable[[Optimizer, Engine], Any]


def plateau(optimizer: Optimizer, validator: Engine) -> ValidatedPlateau:
    inner = lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)
    return ValidatedPlateau(inner, validator, "val_dice")


def sequential(optimizer: Optimizer, _: Engine) -> lr_scheduler.LRScheduler:
    parts: list[lr_scheduler.LRScheduler] = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
        lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 4),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [4])


PLAIN: dict[str, Make] = {
    "cosine": lambda o, _: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "restarts": lambda o, _: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "step": lambda o, _: lr_scheduler.StepLR(o, 2, 0.5),
    "milestones": lambda o, _: lr_scheduler.MultiStepLR(o, [2, 7], 0.5),
    "exponential": lambda o, _: lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lambda o, _: lr_scheduler.PolynomialLR(o, STEPS, 0.9),
    "one-cycle": lambda o, _: lr_scheduler.OneCycleLR(o, max_lr=RATE, total_steps=2 * STEPS),
    "plateau": plateau,
}


def warmed(make: Make) -> Make:
    return lambda optimizer, validator: warm_up(make(optimizer, validator), 4, 0.1)


SCHEDULES = {
    **PLAIN,
    "torch's own sequence": sequential,
    **{f"warm-up, {name}": warmed(make) for name, make in PLAIN.items()},
}


class Stopped(Exception):  # noqa: N818 - stands for a kill
    """The process ends."""


@dataclass
class Run:
    """A run of equal batches, that is saved and killed after an iteration."""

    path: Path
    make: Make
    epoch_level: bool = False
    stop_after: int = 999
    dice: tuple[float, ...] = (0.5, 0.4, 0.4, 0.3)
    interval: int = 1
    order: str = "before"

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=RATE, momentum=0.9)
        cases = [{"image": torch.ones(2), "label": torch.ones(1)}] * LENGTH
        self.evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(cases[:1], batch_size=1),
            network=self.network,
        )
        self.evaluator.add_event_handler(Events.EPOCH_COMPLETED, self.score)
        self.schedule = self.make(self.optimizer, self.evaluator)
        self.rates: list[float] = []
        handler = LrScheduleHandler(self.schedule, print_lr=True, epoch_level=self.epoch_level)
        handlers = [handler, ValidationHandler(self.interval, self.evaluator)]
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=EPOCHS,
            train_data_loader=DataLoader(cases, batch_size=1),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=nn.MSELoss(),
            decollate=False,
            train_handlers=handlers if self.order == "before" else handlers[::-1],
        )
        self.trainer.add_event_handler(Events.ITERATION_STARTED, self.note_rate)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.end_iteration)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.end_epoch)

    def score(self, evaluator: Engine) -> None:
        evaluator.state.metrics["val_dice"] = self.dice[evaluator.state.epoch - 1]

    def note_rate(self) -> None:
        self.rates.append(self.optimizer.param_groups[0]["lr"])

    def end_iteration(self) -> None:
        if self.trainer.state.iteration % LENGTH:
            self.save()

    def end_epoch(self) -> None:
        self.save()

    def parts(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "optimizer": self.optimizer,
            "lr_scheduler": self.schedule,
        }

    def save(self) -> None:
        if self.trainer.state.iteration == self.stop_after:
            states = {name: part.state_dict() for name, part in self.parts().items()}
            write_checkpoint(self.path, {"iteration": self.stop_after, "states": states})
            raise Stopped

    def start(self) -> Run:
        if self.stop_after > STEPS:
            self.trainer.run()
        else:
            with pytest.raises(Stopped):
                self.trainer.run()
        return self

    def resume(self) -> Run:
        content = read_checkpoint(self.path)

        def restore() -> None:
            for name, part in self.parts().items():
                part.load_state_dict(content["states"][name])
            self.trainer.state.iteration = content["iteration"]
            self.trainer.state.epoch = content["iteration"] // LENGTH

        self.trainer.add_event_handler(Events.STARTED, restore)
        return self.start()


@pytest.mark.parametrize("stop_after", [4, 6])
@pytest.mark.parametrize("epoch_level", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_resumed_schedule_is_the_uninterrupted_one(
    tmp_path: Path, name: str, epoch_level: bool, stop_after: int
) -> None:
    settings: dict[str, Any] = {"make": SCHEDULES[name], "epoch_level": epoch_level}
    whole = Run(tmp_path / "whole.pt", **settings).start()
    Run(tmp_path / "parts.pt", stop_after=stop_after, **settings).start()
    parts = Run(tmp_path / "parts.pt", **settings).resume()
    assert parts.rates == whole.rates[stop_after:]
    assert parts.schedule.state_dict() == whole.schedule.state_dict()
    assert len(set(whole.rates)) > 1
    for found, expected in zip(parts.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(found, expected)


def rates(make: Make, steps: int) -> list[float]:
    """Step a schedule by hand and return the rate of each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE, momentum=0.9)
    schedule = make(optimizer, Engine(lambda *_: None))
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", PLAIN)
def test_warm_up_rises_linearly_and_then_the_schedule_begins(name: str) -> None:
    plain = rates(PLAIN[name], 8)
    rising = [plain[0] * (0.1 + 0.9 * step / 4) for step in range(4)]
    assert rates(warmed(PLAIN[name]), 12) == pytest.approx(rising + plain)


def test_warm_up_of_no_steps_is_the_schedule_itself() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
    assert warm_up(schedule, 0) is schedule
    assert optimizer.param_groups[0]["lr"] == RATE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps of the warm-up must be at least 0, got -1"),
        ({"steps": 2, "start_factor": 0.0}, r"start_factor of the warm-up must be in \(0, 1\]"),
        ({"steps": 2, "start_factor": 1.5}, r"start_factor of the warm-up must be in \(0, 1\]"),
    ],
)
def test_warm_up_checks_its_settings(settings: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    with pytest.raises(ConfigurationError, match=message):
        warm_up(lr_scheduler.ExponentialLR(optimizer, 0.9), **settings)


def test_warm_up_refuses_a_plateau_that_nobody_tells_the_metric() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    with pytest.raises(ConfigurationError, match="ReduceLROnPlateau inside a ValidatedPlateau"):
        warm_up(lr_scheduler.ReduceLROnPlateau(optimizer), 2)


@pytest.mark.parametrize(
    ("order", "epoch_level", "lowered"),
    [
        ("before", False, [7, 10]),  # with the end of the epoch's first iteration
        ("after", True, [6, 9]),
        ("after", False, [7, 10]),
        ("before", True, [9, 12]),
    ],
)
def test_plateau_is_found_after_a_validation(
    tmp_path: Path, order: str, epoch_level: bool, lowered: list[int]
) -> None:
    """The metric is worse in epochs 2 and 3, and better in the fourth."""
    run = Run(tmp_path, plateau, epoch_level, dice=(0.5, 0.4, 0.4, 0.6), order=order).start()
    after = [*run.rates[1:], run.optimizer.param_groups[0]["lr"]]  # each iteration
    steps = [i for i, (a, b) in enumerate(zip(run.rates, after, strict=True), 1) if a != b]
    assert steps == lowered


def test_plateau_counts_validations_and_not_epochs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Validated in epochs 2 and 4; the second is worse."""
    caplog.set_level(logging.INFO)
    dice = (0.9, 0.5, 0.1, 0.4)
    run = Run(tmp_path, plateau, dice=dice, interval=2).start()
    assert run.rates == [RATE] * STEPS
    run.schedule.step()
    assert run.optimizer.param_groups[0]["lr"] == RATE / 2
    assert run.schedule.scheduler.last_epoch == 2
    assert "val_dice is on a plateau: learning rate 0.05" in caplog.text
    run.schedule.step()
    assert run.schedule.scheduler.last_epoch == 2


def test_plateau_names_the_metrics_that_there_are(tmp_path: Path) -> None:
    def make(optimizer: Optimizer, validator: Engine) -> ValidatedPlateau:
        return ValidatedPlateau(lr_scheduler.ReduceLROnPlateau(optimizer), validator, "val_iou")

    with pytest.raises(ConfigurationError, match="is 'val_iou'; expected one of val_dice"):
        Run(tmp_path / "last.pt", make).trainer.run()


def cosine(total: int) -> Any:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    return lr_scheduler.CosineAnnealingLR(optimizer, total)


def test_saved_state_takes_the_length_of_a_longer_run() -> None:
    short, long = cosine(4), cosine(8)
    for _ in range(3):
        short.optimizer.step()
        short.step()
    long.load_state_dict(with_own_length(long, short.state_dict()))
    assert (long.T_max, long.last_epoch) == (8, 3)


def test_saved_state_takes_the_length_inside_a_warm_up() -> None:
    short, long = warm_up(cosine(4), 2), warm_up(cosine(8), 2)
    saved = short.state_dict()
    state = with_own_length(long, saved)
    assert [part.get("T_max") for part in state["_schedulers"]] == [None, 8]
    assert [part.get("T_max") for part in saved["_schedulers"]] == [None, 4]


def test_state_of_anything_else_stays_as_it_is() -> None:
    network = nn.Linear(1, 1)
    saved = network.state_dict()
    assert with_own_length(network, saved) is saved
