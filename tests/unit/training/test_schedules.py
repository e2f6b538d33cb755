"""Schedules under the ScheduleHandler: their course, and that a resumed run keeps to it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from pipeline.errors import ConfigurationError
from pipeline.training.checkpoints import read_checkpoint, write_checkpoint
from pipeline.training.schedule_handler import ScheduleHandler
from pipeline.training.schedules import (
    LOWERED,
    ValidatedPlateau,
    one_cycle,
    scale_rates,
    warm_up,
    with_own_length,
)
from pipeline.training.step import TrainingStep

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
    unit: Any = "update"
    accumulation: int = 1
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
        handler = ScheduleHandler(self.schedule, self.unit, self.accumulation)
        handlers = [handler, ValidationHandler(self.interval, self.evaluator)]
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=EPOCHS,
            train_data_loader=DataLoader(cases, batch_size=1),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=nn.MSELoss(),
            iteration_update=TrainingStep(self.accumulation, 1, LENGTH),
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


@pytest.mark.parametrize(
    ("name", "unit", "accumulation", "stop_after"),
    [(name, "update", 2, 5) for name in SCHEDULES]  # within an epoch, after its first group
    + [
        (name, *kind)
        for name in ("restarts", "plateau", "warm-up, one-cycle", "warm-up, plateau")
        for kind in (("update", 1, 4), ("update", 2, 6), ("epoch", 1, 4))
    ],
)
def test_resumed_schedule_is_the_uninterrupted_one(
    tmp_path: Path, name: str, unit: str, accumulation: int, stop_after: int
) -> None:
    run = functools.partial(Run, make=SCHEDULES[name], unit=unit, accumulation=accumulation)
    whole = run(tmp_path / "whole.pt").start()
    run(tmp_path / "parts.pt", stop_after=stop_after).start()
    parts = run(tmp_path / "parts.pt").resume()
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
    ("order", "unit", "lowered"),
    [
        ("before", "update", [7, 10]),  # with the end of the epoch's first iteration
        ("after", "epoch", [6, 9]),
        ("after", "update", [7, 10]),
        ("before", "epoch", [9, 12]),
    ],
)
def test_plateau_is_found_after_a_validation(
    tmp_path: Path, order: str, unit: str, lowered: list[int]
) -> None:
    """The metric is worse in epochs 2 and 3, and better in the fourth."""
    run = Run(tmp_path, plateau, unit, dice=(0.5, 0.4, 0.4, 0.6), order=order).start()
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


def cycle(total: int, pct_start: float, make: Any = one_cycle, **settings: Any) -> list[float]:
    """Return the rates of a one-cycle schedule; it is stepped after the last one too."""
    settings |= {"max_lr": 0.5, "total_steps": total, "pct_start": pct_start}
    return rates(lambda o, _: make(o, cycle_momentum=False, **settings), total)


@settings(max_examples=150, deadline=None)
@example(total=1, pct_start=0.05, three_phase=False)
@example(total=21, pct_start=0.05, three_phase=False)
@example(total=49, pct_start=1 / 49, three_phase=False)  # their product is just below 1
@given(total=st.integers(1, 60), pct_start=st.floats(0, 0.999), three_phase=st.booleans())
def test_one_cycle_is_that_of_torch(total: int, pct_start: float, three_phase: bool) -> None:
    try:
        expected = cycle(total, pct_start, lr_scheduler.OneCycleLR, three_phase=three_phase)
    except ZeroDivisionError:
        return  # below
    assert cycle(total, pct_start, three_phase=three_phase) == expected


@pytest.mark.parametrize("total", [3, 4, 10, 20, 100])
def test_one_cycle_warms_up_in_two_steps_where_torch_divides_by_zero(
    total: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ZeroDivisionError):
        cycle(total, 1 / total, lr_scheduler.OneCycleLR)
    found = cycle(total, 1 / total)
    assert found[:2] == pytest.approx([0.5 / 25, 0.5])
    assert found[1:] == sorted(found[1:], reverse=True)
    assert found[total - 1] == pytest.approx(0.5 / 25 / 1e4)
    assert "it takes two" in caplog.text


@pytest.mark.parametrize(("total", "pct_start"), [(1, 1.0), (2, 0.5), (9, 1.0)])
def test_one_cycle_without_a_descent_is_refused(total: int, pct_start: float) -> None:
    message = rf"schedule of {total} steps with pct_start {pct_start} has a part without a step"
    with pytest.raises(ConfigurationError, match=message):
        cycle(total, pct_start)


SCALED: dict[str, Make] = {
    **SCHEDULES,
    "constant": lambda o, _: lr_scheduler.ConstantLR(o, 0.5, 5),
    "cosine to a floor": lambda o, _: lr_scheduler.CosineAnnealingLR(o, 4, eta_min=0.03),
    "restarts to a floor": lambda o, _: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2, 0.03),
    "cyclic": lambda o, _: lr_scheduler.CyclicLR(o, 0.1, 0.5, 3, cycle_momentum=False),
    "lambda": lambda o, _: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplied": lambda o, _: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "chained": lambda o, _: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 5), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
}


def course(make: Make, scaled_at: int, factor: float) -> list[list[float]]:
    """Return the rates of two groups in each of 14 steps, as optimizer and schedule say them."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (RATE, RATE / 7)]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9)
    validator = Engine(lambda *_: None)
    schedule = make(optimizer, validator)
    found = []
    for step in range(14):
        validator.state.epoch, validator.state.metrics = step + 1, {"val_dice": -step // 3}
        if step == scaled_at:
            scale_rates(optimizer, schedule, factor)
        said = schedule.get_last_lr()
        found.append([group["lr"] for group in optimizer.param_groups])
        assert said == found[-1]
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("scaled_at", [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize("name", SCALED)
def test_scaled_schedule_keeps_its_course_at_the_lower_rate(name: str, scaled_at: int) -> None:
    plain = course(SCALED[name], scaled_at, 1.0)
    lower = course(SCALED[name], scaled_at, 0.25)
    assert lower[:scaled_at] == plain[:scaled_at]
    for found, expected in zip(lower[scaled_at:], plain[scaled_at:], strict=True):
        assert found == pytest.approx([rate / 4 for rate in expected], rel=1e-12)


def test_floor_of_a_plateau_is_scaled_too() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    inner = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, min_lr=0.04)
    scale_rates(optimizer, ValidatedPlateau(inner, Engine(lambda *_: None), "val_loss"), 0.5)
    for loss in (1.0, 2.0, 3.0):
        inner.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)


def test_factors_are_kept_in_the_groups_of_the_optimizer() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    scale_rates(optimizer, None, 0.5)
    scale_rates(optimizer, None, 0.5)
    assert optimizer.state_dict()["param_groups"][0][LOWERED] == 0.25


def test_rate_that_is_a_tensor_is_scaled_in_place_and_once() -> None:
    rate = torch.tensor(0.1)  # torch shares it between the groups
    groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimizer = torch.optim.Adam(groups, lr=rate, capturable=False, foreach=False)
    scale_rates(optimizer, lr_scheduler.ExponentialLR(optimizer, 0.9), 0.5)
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    assert float(rate) == pytest.approx(0.05)
