"""When a schedule is stepped; that a resumed run keeps to it is in test_schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from pipeline.errors import ConfigurationError
from pipeline.training.schedule_handler import ScheduleHandler, updates_per_epoch
from pipeline.training.schedules import one_cycle, warm_up
from pipeline.training.step import TrainingStep

EPOCHS, RATE = 3, 0.1
Make = Callable[[Optimizer], Any]

SCHEDULES: dict[str, Make] = {
    "one-cycle": lambda o: one_cycle(o, RATE, 12, 0.3),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "warm-up": lambda o: warm_up(lr_scheduler.CosineAnnealingLR(o, 9), 3),
}


@dataclass
class Run:
    """Three epochs of single samples; `bad` ones, counted from 1 in each epoch, are no numbers."""

    make: Make = SCHEDULES["exponential"]
    samples: int = 7
    accumulation: int = 2
    unit: Any = "update"
    bad: tuple[int, ...] = ()
    precision: Any = "float32"
    rates: list[float] = field(default_factory=list)
    updates: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        network = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9)
        self.schedule = self.make(self.optimizer)
        self.step = TrainingStep(
            self.accumulation, 1, self.samples, precision=self.precision, skip_not_finite=99
        )
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=EPOCHS,
            train_data_loader=DataLoader(self.cases(), batch_size=1),
            network=network,
            optimizer=self.optimizer,
            loss_function=nn.MSELoss(),
            iteration_update=self.step,
            decollate=False,
            train_handlers=[ScheduleHandler(self.schedule, self.unit, self.accumulation)],
        )
        self.trainer.add_event_handler(Events.ITERATION_STARTED, self.note_rate)
        self.optimizer.register_step_post_hook(self.count)

    def cases(self) -> list[dict[str, Tensor]]:
        values = [math.nan if i + 1 in self.bad else 1.0 for i in range(self.samples)]
        return [{"image": torch.full((2,), value), "label": torch.ones(1)} for value in values]

    def note_rate(self) -> None:
        within = (self.trainer.state.iteration - 1) % self.samples
        if within % self.accumulation == 0:
            self.rates.append(self.optimizer.param_groups[0]["lr"])

    def count(self, *_: Any) -> None:
        self.updates += 1


def looped(make: Make, updates: int) -> list[float]:
    """Return the rate of each update of a plain loop."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE, momentum=0.9)
    schedule = make(optimizer)
    rates = []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("samples", "accumulation"), [(4, 1), (7, 2), (8, 2), (10, 3)])
def test_every_update_has_the_rate_of_a_plain_loop(
    name: str, samples: int, accumulation: int
) -> None:
    run = Run(SCHEDULES[name], samples, accumulation)
    run.trainer.run()
    assert run.updates == EPOCHS * 4
    assert run.rates == looped(SCHEDULES[name], EPOCHS * 4)


@pytest.mark.parametrize("accumulation", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("samples", [1, 2, 5, 6])
def test_updates_per_epoch_are_those_of_the_training_step(samples: int, accumulation: int) -> None:
    run = Run(samples=samples, accumulation=accumulation)
    run.trainer.run()
    assert run.updates == EPOCHS * updates_per_epoch(samples, accumulation)
    assert run.schedule.last_epoch == run.updates


@pytest.mark.parametrize("bad", [(1,), (4,), (7,), tuple(range(1, 8))])
def test_update_that_was_left_out_counts(bad: tuple[int, ...]) -> None:
    run = Run(bad=bad)
    run.trainer.run()
    assert run.step.skipped == EPOCHS * (4 if len(bad) == 7 else 1)
    assert run.rates == looped(SCHEDULES["exponential"], EPOCHS * 4)


def test_overflow_of_loss_scaling_counts() -> None:
    run = Run(precision="float16")
    run.step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    run.trainer.run()
    assert run.updates < EPOCHS * 4
    assert run.rates == looped(SCHEDULES["exponential"], EPOCHS * 4)


def test_schedule_of_epochs_is_stepped_at_their_ends() -> None:
    run = Run(unit="epoch")
    run.trainer.run()
    expected = looped(SCHEDULES["exponential"], EPOCHS)
    assert run.rates == [rate for rate in expected for _ in range(4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": "step"}, "unit must be update or epoch, got 'step'"),
        ({"accumulation_steps": 0}, "accumulation_steps must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    with pytest.raises(ConfigurationError, match=message):
        ScheduleHandler(lr_scheduler.ExponentialLR(optimizer, 0.9), **settings)


def test_plateau_that_nobody_tells_the_metric_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    with pytest.raises(ConfigurationError, match="put it inside a ValidatedPlateau"):
        ScheduleHandler(lr_scheduler.ReduceLROnPlateau(optimizer))
