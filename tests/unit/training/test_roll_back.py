"""A tiny run whose validation loss a test sets, with the handlers that a bundle lists."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.transforms import Compose, RandGaussianNoised
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from pipeline.errors import CheckpointError, ConfigurationError, DivergedError
from pipeline.training import roll_back
from pipeline.training.averaging import AveragedNetwork, SWAHandler
from pipeline.training.checkpoints import read_checkpoint
from pipeline.training.history import History, read_history
from pipeline.training.monitor import Monitor
from pipeline.training.ordering import DataOrder, KeyedDataset, OrderedBatches
from pipeline.training.processes import Validation, is_writer, join_processes, leave_processes
from pipeline.training.roll_back import RollBack
from pipeline.training.saving import CheckpointHandler
from pipeline.training.schedule_handler import ScheduleHandler
from pipeline.training.schedules import ValidatedPlateau, one_cycle, warm_up
from pipeline.training.step import TrainingStep

EPOCHS, LENGTH, RATE = 6, 3, 0.05
TWICE = (0.9, 0.5, math.nan, 0.7, 2.0, 0.45)  # losses by which a run goes back in epochs 3 and 5
EXPONENTIAL: dict[str, Any] = {"start_epoch": 1, "unit": "step", "learning_rate": None}
Make = Callable[[Optimizer, Engine], Any]

SCHEDULES: dict[str, Make] = {
    "one-cycle": lambda o, _: one_cycle(o, RATE, 2 * EPOCHS, 0.3),
    "restarts": lambda o, _: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "plateau": lambda o, validator: ValidatedPlateau(
        lr_scheduler.ReduceLROnPlateau(o, patience=0), validator, "val_loss"
    ),
    "long steps": lambda o, _: lr_scheduler.StepLR(o, 99),
    "exponential": lambda o, _: lr_scheduler.ExponentialLR(o, 0.9),
    "warm-up": lambda o, _: warm_up(lr_scheduler.CosineAnnealingLR(o, 8), 4),
}


class Stopped(Exception):  # noqa: N818 - stands for a kill
    """The process ends."""


class Scored:
    """Sets loss and monitored metric of an epoch."""

    def __init__(self, losses: tuple[float, ...], dice: tuple[float, ...]) -> None:
        self.losses, self.dice = losses, dice

    def attach(self, evaluator: Engine) -> None:
        evaluator.add_event_handler(Events.EPOCH_COMPLETED, self.score)

    def score(self, evaluator: Engine) -> None:
        place = evaluator.state.epoch - 1
        loss = self.losses[place]
        evaluator.state.metrics["val_loss"] = loss
        evaluator.state.metrics["val_dice"] = self.dice[place] if self.dice else -loss
        evaluator.state.metrics["threshold"] = 0.3 + place / 100


@dataclass
class Run:
    """Six epochs of two updates; the fourth is much worse than the second, which is the best."""

    folder: Path
    losses: tuple[float, ...] = (0.9, 0.5, 0.6, 2.0, 0.55, 0.4)
    dice: tuple[float, ...] = ()  # negative losses where empty
    roll_back: dict[str, Any] = field(default_factory=lambda: {"share": 0.5})
    schedule: str = "one-cycle"
    averaging: bool = True
    interval: int = 1
    stop_after: int = 999  # iterations
    every: int | None = None
    optimizer_type: type[Optimizer] = torch.optim.AdamW
    averaged: dict[str, Any] = field(default_factory=lambda: EXPONENTIAL)
    listed: bool = False  # among the handlers, instead of attached by the history

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Dropout(0.2), nn.Conv2d(2, 1, 1)
        )
        self.average = AveragedNetwork(self.network, 0.9)
        evaluated = self.average.module if self.averaging else self.network
        self.optimizer = self.optimizer_type(self.network.parameters(), lr=RATE)
        self.evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(cases(1), batch_size=1),
            network=evaluated,
            val_handlers=[Scored(self.losses, self.dice)],
        )
        self.scheduler = SCHEDULES[self.schedule](self.optimizer, self.evaluator)
        self.monitor = Monitor(self.evaluator, "val_dice", early_stopping=False)
        self.back = RollBack(
            str(self.folder),
            self.network,
            self.optimizer,
            self.monitor,
            self.scheduler,
            self.average if self.averaging else None,
            **self.roll_back,
        )
        self.step = TrainingStep(2, 2, 6)
        self.rates: list[float] = []
        self.train()

    def train(self) -> None:
        transform = Compose([RandGaussianNoised("image", prob=0.7)])
        dataset = KeyedDataset(Dataset(cases(6), transform), transform, seed=1)
        batches = OrderedBatches(dataset, 2, seed=1)
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=EPOCHS,
            train_data_loader=DataLoader(dataset, batch_sampler=batches),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=nn.BCEWithLogitsLoss(),
            iteration_update=self.step,
            decollate=False,
            train_handlers=[
                DataOrder(batches, seed=1),
                ScheduleHandler(self.scheduler, "update", 2),
                SWAHandler(self.average, self.network, self.optimizer, 2, **self.averaged),
                Validation(self.interval, self.evaluator),
                History(
                    str(self.folder / "history.yaml"), self.monitor, self.optimizer,
                    roll_back=None if self.listed else self.back,
                ),
                *([self.back] if self.listed else []),
                self.saving(),
            ],
        )  # fmt: skip
        self.trainer.add_event_handler(Events.ITERATION_STARTED, self.note_rate)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.stop)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.stop)

    def saving(self) -> CheckpointHandler:
        return CheckpointHandler(
            str(self.folder),
            self.network,
            state={
                "average": self.average,
                "optimizer": self.optimizer,
                "lr_scheduler": self.scheduler,
                "step": self.step,
                "roll_back": self.back,
            },
            definition={"bundle": "phantom"},
            monitor=self.monitor,
            averaged=self.average.module if self.averaging else None,
            every=self.every,
            accumulation_steps=2,
        )

    def note_rate(self) -> None:
        self.rates.append(self.optimizer.param_groups[0]["lr"])

    def stop(self) -> None:
        """End after an iteration, or after the end of the epoch that it ends."""
        at = self.trainer.state.iteration
        whole = at % LENGTH or self.trainer.last_event_name == Events.EPOCH_COMPLETED
        if at == self.stop_after and whole:
            raise Stopped

    def start(self) -> Run:
        if self.stop_after < EPOCHS * LENGTH:
            with pytest.raises(Stopped):
                self.trainer.run()
        else:
            self.trainer.run()
        return self

    def fails(self, kind: type[Exception], match: str) -> None:
        with pytest.raises(kind, match=match) as caught:
            self.trainer.run()
        assert "\n" not in str(caught.value)

    def read(self, name: str) -> dict[str, Any]:
        return read_checkpoint(self.folder / f"{name}.pt")

    def history(self) -> list[dict[str, Any]]:
        entries = read_history(self.folder / "history.yaml")
        return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def cases(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 1, 6, 6, generator=generator)
    return [{"image": image, "label": (image > 0.5).float()} for image in images]


def same(found: Any, expected: Any) -> bool:
    """Return whether nested plain data and tensors are equal, bit by bit."""
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """The uninterrupted run of `TWICE`, made once for each schedule."""
    return functools.cache(
        lambda schedule="one-cycle": Run(
            tmp_path_factory.mktemp("whole"), TWICE, schedule=schedule
        ).start()
    )


# Going back


@pytest.mark.parametrize(
    ("averaging", "optimizer_type"), [(True, torch.optim.AdamW), (False, torch.optim.SGD)]
)
def test_going_back_takes_the_best_weights_and_forgets_the_rest(
    tmp_path: Path, averaging: bool, optimizer_type: type[Optimizer]
) -> None:
    run = Run(tmp_path, stop_after=12, averaging=averaging, optimizer_type=optimizer_type).start()
    best, last = run.read("best"), run.read("last")
    assert (best["epoch"], last["epoch"]) == (2, 4)
    assert not same(run.read("previous")["model"], best["model"])
    assert same(last["model"], best["model"])
    if averaging:
        assert same(dict(run.average.module.state_dict()), best["model"])
        assert int(run.average.n_averaged) == 0
    state = last["training_state"]
    assert state["optimizer"]["state"] == {}
    assert state["roll_back"] == {"metric": "val_loss", "best_loss": 0.5, "count": 1}
    assert run.trainer.state.rolled_back == {
        "epoch": 2, "metrics": best["metrics"], "threshold": pytest.approx(0.31),
    }  # fmt: skip


@pytest.mark.parametrize("schedule", ["one-cycle", "plateau"])
def test_rates_are_lower_from_then_on(tmp_path: Path, schedule: str) -> None:
    plain = Run(tmp_path / "plain", schedule=schedule, roll_back={}).start()
    lower = Run(
        tmp_path / "lower", schedule=schedule, roll_back={"share": 0.5, "factor": 0.25}
    ).start()
    assert lower.rates[:12] == plain.rates[:12]
    assert lower.rates[12:] == pytest.approx([rate / 4 for rate in plain.rates[12:]], rel=1e-12)


def test_best_weights_are_those_of_the_new_path_once_it_is_better(tmp_path: Path) -> None:
    run = Run(tmp_path).start()
    assert run.read("best")["epoch"] == 6
    assert run.back.state_dict() == {"metric": "val_loss", "best_loss": 0.4, "count": 1}
    assert run.trainer.state.rolled_back is None


def test_run_may_go_back_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = Run(tmp_path, losses=(0.5, 2.0, 0.6, 3.0, 0.5, 0.5), schedule="long steps").start()
    assert run.back.count == 2
    assert run.rates == [RATE] * 6 + [RATE / 2] * 6 + [RATE / 4] * 6
    lines = [r.getMessage() for r in caplog.records if "back to the weights" in r.getMessage()]
    assert lines == [
        "val_loss is 2 in epoch 2, 0.5 in the best epoch 1, and may exceed it by 50%: "
        "back to the weights of epoch 1 at learning rate 0.025 (1 of 5)",
        "val_loss is 3 in epoch 4, 0.5 in the best epoch 1, and may exceed it by 50%: "
        "back to the weights of epoch 1 at learning rate 0.0125 (2 of 5)",
    ]


# What is told of it


def test_history_tells_which_epoch_was_gone_back_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = Run(tmp_path).start()
    assert [e.get("rolled_back_to") for e in run.history()] == [None, None, None, 2, None, None]
    (line,) = (r.getMessage() for r in caplog.records if "| back to" in r.getMessage())
    assert line.startswith("epoch 4/6 | ")
    assert "| back to epoch 2 |" in line


def test_what_a_checkpoint_says_is_said_of_its_weights(tmp_path: Path) -> None:
    """At the end of the epoch that was undone, and within the next one."""
    Run(tmp_path, stop_after=12).start()
    best, last = (read_checkpoint(tmp_path / f"{name}.pt") for name in ("best", "last"))
    assert best["metrics"]["threshold"] == pytest.approx(0.31)
    assert (last["metrics"], last["threshold"]) == (best["metrics"], best["threshold"])
    run = Run(tmp_path, stop_after=14, every=2).start()
    assert (run.read("last")["iteration"], run.read("last")["threshold"]) == (14, best["threshold"])


def test_listed_after_the_history_it_does_the_same(
    tmp_path: Path, finished: Callable[..., Run]
) -> None:
    run = Run(tmp_path, TWICE, listed=True).start()
    assert run.rates == finished().rates
    assert same(run.read("last"), finished().read("last"))


# When


@pytest.mark.parametrize(
    ("losses", "count"),
    [
        ((0.5, 0.75, 0.5), 0),  # not more than the share
        ((0.5, 0.7501, 0.5), 1),
        ((0.5, math.nan, math.inf), 2),
        ((0.5, -math.inf, 0.5), 1),
        ((-0.5, -0.3, -0.25), 0),
        ((-0.5, -0.2, -0.3), 1),
    ],
)
def test_what_is_much_worse(tmp_path: Path, losses: tuple[float, ...], count: int) -> None:
    run = Run(tmp_path, losses=losses, dice=(0.5, 0.1, 0.1), stop_after=9).start()
    assert run.back.count == count


def test_loss_is_compared_with_that_of_the_weights_to_go_back_to(tmp_path: Path) -> None:
    """The smallest loss is that of epoch 1; the best weights, by Dice, have 0.8."""
    losses, dice = (0.5, 0.8, 1.1, 1.1, 1.3, 1.1), (0.1, 0.9, 0.5, 0.5, 0.5, 0.5)
    assert Run(tmp_path, losses=losses, dice=dice).start().back.count == 1


@pytest.mark.parametrize("loss", [9.0, math.nan])
def test_epoch_with_a_new_best_is_not_undone(tmp_path: Path, loss: float) -> None:
    losses, dice = (0.5, loss, 9.5, 0.5, 0.5, 0.5), (0.1, 0.9, 0.5, 0.5, 0.5, 0.5)
    run = Run(tmp_path, losses=losses, dice=dice).start()
    assert run.back.count == 0
    assert run.read("best")["epoch"] == 2


def test_epochs_without_validation_do_not_count(tmp_path: Path) -> None:
    run = Run(tmp_path, interval=2, stop_after=15).start()
    assert run.back.count == 1  # epoch 4, once
    assert run.trainer.state.rolled_back is None


@pytest.mark.parametrize("metric", ["val_loss", "val_iou"])
def test_switched_off_it_changes_nothing(tmp_path: Path, metric: str) -> None:
    with_it = Run(tmp_path / "with", roll_back={"share": None, "metric": metric}).start()
    without = Run(tmp_path / "without")
    without.trainer.remove_event_handler(without.back.update, Events.EPOCH_COMPLETED)
    without.start()
    for name in ("last", "best", "swa"):
        assert same(with_it.read(name)["model"], without.read(name)["model"]), name
    assert with_it.rates == without.rates


# Resuming


@pytest.mark.parametrize(
    ("schedule", "stop_after"),
    [("one-cycle", at) for at in (8, 9, 11, 12)]
    + [(name, 11) for name in ("restarts", "plateau", "warm-up")],
)
def test_resumed_run_that_goes_back_is_the_uninterrupted_one(
    tmp_path: Path, finished: Callable[..., Run], schedule: str, stop_after: int
) -> None:
    """Killed before, with and after going back, at the ends of epochs and within them."""
    whole = finished(schedule)
    assert whole.back.count == 2
    Run(tmp_path, TWICE, schedule=schedule, stop_after=stop_after, every=2).start()
    resumed = Run(tmp_path, TWICE, schedule=schedule).start()
    assert len(resumed.rates) < len(whole.rates)
    assert resumed.rates == whole.rates[-len(resumed.rates) :]
    for name in ("last", "best", "swa"):
        assert same(resumed.read(name), whole.read(name)), name
    assert resumed.history() == whole.history()


def test_resumed_run_uses_the_checkpoint_before_if_the_last_is_damaged(
    tmp_path: Path, finished: Callable[..., Run]
) -> None:
    Run(tmp_path, TWICE, stop_after=9).start()  # went back in the last epoch
    (tmp_path / "last.pt").write_bytes(b"half")
    resumed = Run(tmp_path, TWICE).start()
    assert same(resumed.read("last"), finished().read("last"))


@pytest.mark.parametrize(("start_epoch", "stop_after"), [(1, 12), (3, 12), (5, 14)])
def test_rates_of_averaging_are_lower_too_and_resumed(
    tmp_path: Path, start_epoch: int, stop_after: int
) -> None:
    """Averaging begins before going back and after it; the rate moves within three epochs."""
    averaged = {"start_epoch": start_epoch, "learning_rate": 0.02, "anneal_epochs": 3}
    run = functools.partial(Run, schedule="exponential", averaged=averaged)
    plain = run(tmp_path / "plain", roll_back={}).start()
    whole = run(tmp_path / "whole").start()
    assert whole.rates[:12] == plain.rates[:12]
    assert whole.rates[12:] == pytest.approx([rate / 2 for rate in plain.rates[12:]])
    run(tmp_path / "parts", stop_after=stop_after, every=2).start()
    resumed = run(tmp_path / "parts").start()
    for name in ("last", "best", "swa"):
        assert same(resumed.read(name), whole.read(name)), name


def test_resumed_run_may_be_given_another_metric(tmp_path: Path) -> None:
    Run(tmp_path, stop_after=9).start()
    other = Run(tmp_path, roll_back={"share": 0.5, "metric": "threshold"}).start()
    assert other.back.count == 0  # until epoch 6, nothing to compare with
    assert other.back.best_loss == pytest.approx(0.35)


# Where it cannot


def test_limit_stops_the_run_and_keeps_the_epoch_before(tmp_path: Path) -> None:
    losses = (0.5, 2.0, 2.0, 2.0, 2.0, 2.0)
    settings: dict[str, Any] = {"losses": losses, "roll_back": {"share": 0.5, "limit": 2}}
    text = r"val_loss is 2 in epoch 4, .*went back 2 times before .*raise roll_back::limit"
    Run(tmp_path, **settings).fails(DivergedError, text)
    assert read_checkpoint(tmp_path / "last.pt")["epoch"] == 3
    Run(tmp_path, **settings).fails(DivergedError, text)  # once more, at the same place
    settings["roll_back"]["limit"] = 9
    assert Run(tmp_path, **settings).start().back.count == 5


def test_nothing_to_go_back_to_stops_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, losses=(math.nan,) * EPOCHS)
    run.fails(DivergedError, "val_loss is nan in epoch 1, and there is no best epoch")


def test_best_checkpoint_of_an_earlier_run_is_not_gone_back_to(tmp_path: Path) -> None:
    Run(tmp_path).start()
    for path in tmp_path.glob("last.pt*"):
        path.unlink()
    run = Run(tmp_path, losses=(math.nan,) * EPOCHS)
    run.fails(DivergedError, "there is no best epoch to go back to")


@pytest.mark.parametrize(
    ("content", "text"), [(None, r"best\.pt: no such checkpoint"), (b"x", r"best\.pt: damaged")]
)
def test_best_checkpoint_must_be_there(tmp_path: Path, content: bytes | None, text: str) -> None:
    Run(tmp_path, stop_after=9).start()
    if content:
        (tmp_path / "best.pt").write_bytes(content)
    else:
        (tmp_path / "best.pt").unlink()
    Run(tmp_path).fails(CheckpointError, text)
    assert read_checkpoint(tmp_path / "last.pt")["epoch"] == 3


def test_unknown_metric_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, roll_back={"share": 0.5, "metric": "val_los"})
    run.fails(ConfigurationError, "is 'val_los'; expected one of threshold, val_dice, val_loss")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": -0.1}, "share must be null or at least 0, got -0.1"),
        ({"share": math.nan}, "share must be null or at least 0, got nan"),
        ({"factor": 1.0}, r"factor must be in \(0, 1\), got 1.0"),
        ({"factor": 0.0}, r"factor must be in \(0, 1\), got 0.0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"roll_back::{message}"):
        Run(tmp_path, roll_back=settings)


# Several processes


def test_weights_come_from_the_process_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a process that does not see the files."""
    run = Run(tmp_path, stop_after=9).start()
    best = run.read("best")
    (tmp_path / "best.pt").unlink()
    monkeypatch.setattr(roll_back, "from_writer", lambda _: best)
    assert same(Run(tmp_path, stop_after=12).start().read("last")["model"], best["model"])


def act(folder: str) -> None:
    """What each of two processes does: the same batches, so that weights need no exchange."""
    torch.set_num_threads(1)
    mine = join_processes("cpu", timeout_minutes=2)
    run = Run(Path(folder), TWICE)
    run.trainer.run()
    assert is_writer() == (mine.rank == 0)
    found = {
        "count": run.back.count,
        "rates": run.rates,
        "network": run.network.state_dict(),
        "average": run.average.state_dict(),
    }
    torch.save(found, Path(folder) / f"found_{mine.rank}.pth")
    leave_processes()


@pytest.mark.slow
def test_two_processes_go_back_alike(
    tmp_path: Path, run_in_two: Callable[..., Any], finished: Callable[..., Run]
) -> None:
    (ended,) = run_in_two(__file__, [tmp_path])
    assert [code for code, _ in ended] == [0, 0], ended
    whole = finished()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found_{rank}.pth", weights_only=True)
        assert found["count"] == 2
        assert found["rates"] == whole.rates
        assert same(found["network"], dict(whole.network.state_dict()))
        assert same(found["average"], dict(whole.average.state_dict()))
