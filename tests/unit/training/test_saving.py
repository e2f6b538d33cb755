"""A tiny run on 8 x 8 tensors, whole and in two parts."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from torch import Tensor, nn

from pipeline.errors import CheckpointError, ConfigurationError
from pipeline.training import saving
from pipeline.training.averaging import AveragedNetwork, EMAHandler
from pipeline.training.checkpoints import read_checkpoint
from pipeline.training.epoch_metrics import BatchMetrics, ValidationLoss
from pipeline.training.history import History, read_history
from pipeline.training.monitor import Monitor
from pipeline.training.saving import CheckpointHandler

EPOCHS = 4
DEFINITION = {
    "bundle": "phantom",
    "architecture": "default",
    "network_def": {"_target_": "Sequential", "width": 4},
    "preprocessing": [{"_target_": "NormalizeIntensityd"}],
}


class Stopped(Exception):  # noqa: N818 - stands for a kill
    """The process ends."""


class Scored:
    """Sets the monitored metric, so that a test says which epochs are good."""

    def __init__(self, dice: dict[int, float]) -> None:
        self.dice = dice

    def attach(self, evaluator: Engine) -> None:
        evaluator.add_event_handler(Events.EPOCH_COMPLETED, self.score)

    def score(self, evaluator: Engine) -> None:
        epoch = evaluator.state.epoch
        evaluator.state.metrics["val_dice"] = self.dice.get(epoch, epoch / 10)
        evaluator.state.metrics["threshold"] = 0.3 + epoch / 100


@dataclass
class Run:
    """A run of four epochs in `folder`, validated every `interval` epochs."""

    folder: Path
    dice: dict[int, float] = field(default_factory=dict)
    epochs: int = EPOCHS
    stop_after: int = 99
    resume: Any = "auto"
    interval: int = 1
    patience: int = 9
    width: int = 4
    definition: dict[str, Any] = field(default_factory=lambda: DEFINITION)
    averaging: bool = True
    add_state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(1, self.width, 3, padding=1),
            nn.BatchNorm2d(self.width),
            nn.Conv2d(self.width, 1, 1),
        )
        self.average = AveragedNetwork(self.network, 0.9)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=0.05, total_steps=3 * self.epochs
        )
        loss = nn.BCEWithLogitsLoss()
        self.evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(self.cases(2), batch_size=1),
            network=self.average.module,
            val_handlers=[ValidationLoss(loss), Scored(self.dice)],
        )
        self.monitor = Monitor(self.evaluator, "val_dice", patience=self.patience)
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=self.epochs,
            train_data_loader=DataLoader(self.cases(6), batch_size=2),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=loss,
            decollate=False,
            train_handlers=[
                LrScheduleHandler(self.scheduler, print_lr=False, epoch_level=False),
                EMAHandler(self.average, self.network),
                BatchMetrics(),
                ValidationHandler(self.interval, self.evaluator),
                History(str(self.folder / "history.yaml"), self.monitor, self.optimizer),
                self.saving(),
            ],
        )
        if self.stop_after < self.epochs:
            event = Events.EPOCH_COMPLETED(once=self.stop_after)
            self.trainer.add_event_handler(event, self.stop)

    @staticmethod
    def cases(count: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(count)
        images = torch.randn(count, 1, 8, 8, generator=generator)
        return [{"image": image, "label": (image > 0.5).float()} for image in images]

    def saving(self) -> CheckpointHandler:
        return CheckpointHandler(
            str(self.folder),
            self.network,
            state={
                "average": EMAHandler(self.average, self.network),
                "optimizer": self.optimizer,
                "lr_scheduler": self.scheduler,
                **self.add_state,
            },
            definition=self.definition,
            monitor=self.monitor,
            averaged=self.average.module if self.averaging else None,
            resume=self.resume,
        )

    @staticmethod
    def stop() -> None:
        raise Stopped

    def start(self) -> Run:
        if self.stop_after < self.epochs:
            with pytest.raises(Stopped):
                self.trainer.run()
        else:
            self.trainer.run()
        return self

    def read(self, name: str) -> dict[str, Any]:
        return read_checkpoint(self.folder / f"{name}.pt")

    def history(self) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in entry.items() if k != "seconds"}
            for entry in read_history(self.folder / "history.yaml")
        ]


def same(found: Any, expected: Any) -> bool:
    """Return whether nested plain data and tensors are equal, bit by bit."""
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_two_parts_are_one_whole(tmp_path: Path, stop_after: int, interval: int) -> None:
    whole = Run(tmp_path / "whole", interval=interval).start()
    Run(tmp_path / "parts", interval=interval, stop_after=stop_after).start()
    parts = Run(tmp_path / "parts", interval=interval, resume=True).start()
    assert parts.trainer.state.epoch == EPOCHS
    assert parts.trainer.state.iteration == whole.trainer.state.iteration
    for name in ("last", "previous", "best", "swa"):
        assert same(parts.read(name), whole.read(name)), name
    assert parts.history() == whole.history()
    assert parts.monitor.state_dict() == whole.monitor.state_dict()


def test_resume_continues_every_part_of_the_state(tmp_path: Path) -> None:
    first = Run(tmp_path, stop_after=2).start()
    second = Run(tmp_path)
    seen: dict[str, Any] = {}

    def look(engine: Engine) -> None:
        seen.update(
            epoch=engine.state.epoch,
            iteration=engine.state.iteration,
            network=same(second.network.state_dict(), first.network.state_dict()),
            optimizer=same(second.optimizer.state_dict(), first.optimizer.state_dict()),
            scheduler=second.scheduler.last_epoch,
            average=same(second.average.state_dict(), first.average.state_dict()),
            best=second.monitor.best,
        )

    second.trainer.add_event_handler(Events.EPOCH_STARTED(once=3), look)
    second.start()
    assert seen == {
        "epoch": 3, "iteration": 6, "network": True, "optimizer": True, "scheduler": 6,
        "average": True, "best": 0.2,
    }  # fmt: skip


def test_files_and_what_is_in_them(tmp_path: Path) -> None:
    run = Run(tmp_path, dice={2: 0.9}).start()
    names = {path.name for path in tmp_path.glob("*.pt")}
    assert names == {"best.pt", "last.pt", "previous.pt", "swa.pt"}
    epochs = {name: run.read(name)["epoch"] for name in ("best", "last", "previous", "swa")}
    assert epochs == {"best": 2, "last": 4, "previous": 3, "swa": 4}
    best = run.read("best")
    assert {k: best[k] for k in DEFINITION} == DEFINITION
    assert best["threshold"] == pytest.approx(0.32)
    assert best["metrics"]["val_dice"] == 0.9
    assert "training_state" not in best
    averaged = dict(run.average.module.state_dict())
    assert same(run.read("swa")["model"], averaged)
    assert same(run.read("last")["model"], dict(run.network.state_dict()))
    assert not same(averaged, dict(run.network.state_dict()))


def test_best_holds_the_weights_that_were_evaluated(tmp_path: Path) -> None:
    averaged = Run(tmp_path / "a").start()
    assert same(averaged.read("best")["model"], dict(averaged.average.module.state_dict()))
    plain = Run(tmp_path / "b", averaging=False).start()
    assert same(plain.read("best")["model"], dict(plain.network.state_dict()))
    assert not (tmp_path / "b" / "swa.pt").exists()


def test_threshold_of_an_epoch_without_validation_is_the_latest_chosen(tmp_path: Path) -> None:
    run = Run(tmp_path, interval=3).start()  # validated in epoch 3 alone
    assert run.read("previous")["threshold"] == pytest.approx(0.33)
    assert run.read("last")["threshold"] == pytest.approx(0.33)
    assert run.read("last")["metrics"] == {}
    assert run.read("swa")["threshold"] == pytest.approx(0.33)


def test_worse_epoch_does_not_overwrite_the_best(tmp_path: Path) -> None:
    dice = {1: 0.5, 2: 0.8, 3: 0.1, 4: 0.79}
    Run(tmp_path, dice=dice, stop_after=2).start()
    before = (tmp_path / "best.pt").read_bytes()
    Run(tmp_path, dice=dice).start()
    assert (tmp_path / "best.pt").read_bytes() == before
    assert [e["new_best"] for e in read_history(tmp_path / "history.yaml")] == [
        True, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_metric_that_is_not_finite_never_makes_the_best(tmp_path: Path, value: float) -> None:
    run = Run(tmp_path / "some", dice={1: 0.01, 2: value, 3: value, 4: value}).start()
    assert run.read("best")["epoch"] == 1
    Run(tmp_path / "all", dice=dict.fromkeys(range(1, 5), value)).start()
    assert not (tmp_path / "all" / "best.pt").exists()


@pytest.mark.parametrize("writes", [2, 3, 4])
def test_kill_between_two_checkpoints_loses_no_best_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    dice = {1: 0.5, 2: 0.8, 3: 0.1, 4: 0.2}  # epochs 1 and 2 write two files each
    whole = Run(tmp_path / "whole", dice=dice).start()
    written: list[str] = []
    original = saving.write_checkpoint

    def write(path: Path, content: dict[str, Any], **settings: Any) -> Path:
        written.append(path.name)
        if len(written) == writes:
            raise Stopped
        return original(path, content, **settings)

    monkeypatch.setattr(saving, "write_checkpoint", write)
    with pytest.raises(Stopped):
        Run(tmp_path / "parts", dice=dice).trainer.run()
    monkeypatch.undo()
    parts = Run(tmp_path / "parts", dice=dice).start()
    for name in ("last", "best"):
        assert same(parts.read(name), whole.read(name)), name
    assert parts.history() == whole.history()


def test_damaged_last_checkpoint_is_replaced_by_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Run(tmp_path / "whole").start()
    Run(tmp_path / "parts", stop_after=3).start()
    last = tmp_path / "parts" / "last.pt"
    last.write_bytes(last.read_bytes()[:-100])
    parts = Run(tmp_path / "parts").start()
    assert "last.pt: damaged" in caplog.text
    assert "previous.pt instead" in caplog.text
    assert same(parts.read("last"), whole.read("last"))
    assert parts.history() == whole.history()


def test_without_a_good_one_the_run_stops(tmp_path: Path) -> None:
    Run(tmp_path, stop_after=3).start()
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"previous\.pt: damaged"):
        Run(tmp_path).trainer.run()


def test_only_one_damaged_checkpoint_stops_the_run(tmp_path: Path) -> None:
    Run(tmp_path, stop_after=1).start()
    (tmp_path / "last.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"last\.pt: damaged"):
        Run(tmp_path).trainer.run()


def test_resume_can_be_demanded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"last\.pt: no such checkpoint"):
        Run(tmp_path, resume=True).trainer.run()


def test_resume_can_be_refused(tmp_path: Path) -> None:
    Run(tmp_path, stop_after=2).start()
    anew = Run(tmp_path, resume=False, stop_after=1).start()
    assert anew.read("last")["epoch"] == 1
    assert [entry["epoch"] for entry in anew.history()] == [1]


def test_resume_setting_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="resume is 'yes'; expected true, false or auto"):
        Run(tmp_path, resume="yes")


def test_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    first = Run(tmp_path).start()
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.pt") if p.name != "swa.pt"}
    second = Run(tmp_path).start()
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.pt") if p.name != "swa.pt"} == before
    assert same(second.read("swa")["model"], dict(first.average.module.state_dict()))


def test_finished_run_goes_on_with_more_epochs_along_the_longer_schedule(tmp_path: Path) -> None:
    Run(tmp_path / "parts", epochs=2).start()
    parts = Run(tmp_path / "parts").start()
    whole = Run(tmp_path / "whole").start()
    assert [entry["epoch"] for entry in parts.history()] == [1, 2, 3, 4]
    assert [entry["learning_rate"] for entry in parts.history()[2:]] == [
        entry["learning_rate"] for entry in whole.history()[2:]
    ]


def test_run_that_stopped_early_stays_stopped_until_patience_is_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    dice = {1: 0.5, 2: 0.4, 3: 0.4, 4: 0.4}
    assert Run(tmp_path, dice=dice, patience=2).start().trainer.state.epoch == 3
    again = Run(tmp_path, dice=dice, patience=2).start()
    assert again.read("last")["epoch"] == 3
    assert "early stopping ended this run" in caplog.text
    assert Run(tmp_path, dice=dice, patience=3).start().read("last")["epoch"] == 4


def message(run: Run) -> str:
    with pytest.raises(CheckpointError) as caught:
        run.trainer.run()
    text = str(caught.value)
    assert text.startswith(f"{run.folder / 'last.pt'}: ")
    assert text.endswith("; to start anew, set resume to false")
    assert "\n" not in text
    return text


def test_another_network_is_refused_by_name(tmp_path: Path) -> None:
    saved = DEFINITION | {"architecture": "unet"}
    Run(tmp_path, definition=saved, stop_after=1).start()
    other = DEFINITION | {"network_def": {"_target_": "RoiNet"}}
    assert "run with configs/unet.yaml merged in" in message(Run(tmp_path, definition=other))


def test_other_preprocessing_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, stop_after=1).start()
    other = DEFINITION | {"preprocessing": [{"_target_": "ScaleIntensityd"}]}
    assert "its preprocessing[0] is NormalizeIntensityd()" in message(
        Run(tmp_path, definition=other)
    )


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    Run(tmp_path, stop_after=1).start()
    assert "holds another architecture" in message(Run(tmp_path, width=5))


def test_missing_state_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, stop_after=1).start()
    scaler = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    assert "has no state of scaler" in message(Run(tmp_path, add_state={"scaler": scaler}))


def test_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, stop_after=1).start()
    changed = Run(tmp_path)
    changed.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    assert "its state of optimizer does not fit: loaded state dict" in message(changed)


def test_evaluated_checkpoint_cannot_be_resumed_from(tmp_path: Path) -> None:
    Run(tmp_path, stop_after=1).start()
    for suffix in (".pt", ".pt.sha256"):
        (tmp_path / f"best{suffix}").replace(tmp_path / f"last{suffix}")
    assert "has no state of average, lr_scheduler, monitor, optimizer" in message(Run(tmp_path))


def test_history_of_the_run_is_plain_yaml(tmp_path: Path) -> None:
    Run(tmp_path).start()
    entries = yaml.safe_load((tmp_path / "history.yaml").read_text("utf-8"))
    assert set(entries[0]) == {"epoch", "train", "val", "learning_rate", "seconds", "new_best"}
    assert set(entries[0]["val"]) == {"val_loss", "val_dice", "threshold"}
    assert set(entries[0]["train"]) == {"loss", "dice", "iou"}
