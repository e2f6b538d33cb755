"""What stands in the event files of a run, and what is left behind when it ends."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from pipeline.errors import ConfigurationError, ResourceError
from pipeline.training import tensorboard
from pipeline.training.panels import PanelCollector
from pipeline.training.tensorboard import TensorBoardHandler, write_test_scalars
from pipeline.training.throughput import Throughput

ITERATIONS = 2
EVERYTHING = {"log_activations": True, "image_log_frequency": 1, "activation_log_frequency": 1}


class Figures:
    """Sets the metrics that other handlers would compute, and which epochs are a new best."""

    def __init__(self, validator: Engine, new_best: tuple[int, ...] = ()) -> None:
        self.validator = validator
        self.new_best = new_best

    def attach(self, trainer: Engine) -> None:
        self.validator.add_event_handler(Events.EPOCH_COMPLETED, self.after_validation)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.after_training)

    @staticmethod
    def after_validation(validator: Engine) -> None:
        epoch = validator.state.epoch
        validator.state.metrics.update(
            val_loss=1.0, val_dice=torch.tensor(epoch / 10), val_iou=np.float32(epoch / 20),
            threshold=0.5, confusion=torch.eye(2),
        )  # fmt: skip

    def after_training(self, trainer: Engine) -> None:
        trainer.state.metrics.update(train_dice=trainer.state.epoch / 5, train_iou=0.25)
        trainer.state.new_best = trainer.state.epoch in self.new_best


class FailsAt:
    """Raises in an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def attach(self, trainer: Engine) -> None:
        trainer.add_event_handler(Events.EPOCH_COMPLETED(once=self.epoch), self.fail)

    @staticmethod
    def fail() -> None:
        raise ZeroDivisionError("as planned")


def make_trainer(
    log_dir: Path,
    *,
    epochs: int = 1,
    done: int = 0,
    interval: int = 1,
    new_best: tuple[int, ...] = (),
    before: tuple[Any, ...] = (),
    after: tuple[Any, ...] = (),
    shuffle: bool = False,
    **settings: Any,
) -> SupervisedTrainer:
    """Return a trainer of a tiny network on 8x8 images that goes on after `done` epochs."""
    torch.manual_seed(0)
    items = [{"image": torch.rand(1, 8, 8), "label": torch.ones(1, 8, 8)} for _ in range(6)]
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 1, 1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    validator = SupervisedEvaluator(
        device="cpu", network=network, val_data_loader=DataLoader(Dataset(items), batch_size=3)
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=DataLoader(Dataset(items[:4]), batch_size=2, shuffle=shuffle),
        network=network,
        optimizer=optimizer,
        loss_function=nn.BCEWithLogitsLoss(),
        train_handlers=[
            LrScheduleHandler(schedule, print_lr=False),
            ValidationHandler(interval=interval, validator=validator),
            Figures(validator, new_best),
            *before,
            TensorBoardHandler(log_dir, validator, **settings),
            *after,
        ],
    )
    if done:
        trainer.state.epoch, trainer.state.iteration = done, done * ITERATIONS
    trainer.validator = validator
    return trainer


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def steps(folder: Path, tag: str, kind: Callable[..., Any] = EventAccumulator.Scalars) -> list[int]:
    return [event.step for event in kind(events(folder), tag)]


def values(folder: Path, tag: str) -> list[float]:
    return [event.value for event in events(folder).Scalars(tag)]


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


@pytest.fixture
def open_writers() -> Callable[[], list[str]]:
    """Names the threads of event files that the test opened and nobody closed."""
    earlier = set(threading.enumerate())

    def find() -> list[str]:
        gc.collect()
        started = set(threading.enumerate()) - earlier
        return [str(thread) for thread in started if "AsyncWriter" in type(thread).__name__]

    return find


# --- what is written


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs, validated and drawn in each, with everything switched on."""
    folder = tmp_path_factory.mktemp("run")
    settings = {"learning_rate": 0.1, "amp": False, "network": {"depths": [1, 2]}, "seed": None}
    make_trainer(folder / "tensorboard", epochs=4, hyperparameters=settings, **EVERYTHING).run()
    return folder / "tensorboard"


@pytest.mark.parametrize(
    "tag", ["train/loss", "train/dice", "train/iou", "val/loss", "val/dice", "val/iou",
            "val/threshold", "learning_rate"]
)  # fmt: skip
def test_epoch_series_have_the_epoch_as_step(run: Path, tag: str) -> None:
    assert steps(run, tag) == [1, 2, 3, 4]


def test_metrics_of_any_scalar_type_are_written_and_tables_left_out(run: Path) -> None:
    assert values(run, "val/dice") == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert values(run, "val/iou") == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert "val/confusion" not in events(run).Tags()["scalars"]


def test_the_loss_of_an_epoch_is_the_mean_of_its_iterations(run: Path) -> None:
    assert steps(run / "iterations", "train/loss_iteration") == list(range(1, 9))
    each = np.reshape(values(run / "iterations", "train/loss_iteration"), (4, ITERATIONS))
    assert values(run, "train/loss") == pytest.approx(list(each.mean(axis=1)))


def test_the_learning_rate_is_the_one_the_epoch_was_trained_with(run: Path) -> None:
    assert values(run, "learning_rate") == pytest.approx([0.1, 0.05, 0.025, 0.0125])


@pytest.mark.parametrize("name", ["dice", "iou"])
def test_comparison_has_one_tag_in_a_run_of_each_side(run: Path, name: str) -> None:
    for side in ("train", "val"):
        assert events(run / side).Tags()["scalars"] == ["comparison/dice", "comparison/iou"]
        compared = values(run / side, f"comparison/{name}")
        assert compared == values(run, f"{side}/{name}")


def test_no_other_run_appears(run: Path) -> None:
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"iterations", "train", "val"}
    assert all(len(list(path.glob("events*"))) == 1 for path in [run, run / "train", run / "val"])


def test_panels_show_four_cases(run: Path) -> None:
    image = events(run).Images("val/predictions")[0]
    assert (image.width, image.height) == (3 * 8 + 2 * 4, 4 * (8 + 4))


def test_activations_have_statistics_and_a_histogram_per_layer(run: Path) -> None:
    tags = events(run).Tags()
    assert tags["histograms"] == ["activations/0", "activations/2"]
    for name in ("mean", "std", "zeros_share", "max_abs"):
        assert steps(run, f"activations/2/{name}") == [1, 2, 3, 4]
    assert all(0 < found.histogram_value.num <= 3 * 64 for found in events(run).Histograms(
        "activations/2"))  # fmt: skip


def test_the_graph_is_written(run: Path) -> None:
    assert "Conv2d" in str(events(run).Graph())


def test_settings_stand_beside_the_final_metrics(run: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    assert values(run, "final/val_dice") == pytest.approx([0.4])
    assert values(run, "final/train_dice") == pytest.approx([0.8])
    content = events(run).PluginTagToContent("hparams")["_hparams_/session_start_info"]
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert set(settings) == {"learning_rate", "amp", "network.depths"}
    assert settings["network.depths"].string_value == "[1, 2]"


# --- when it is written


def test_panels_come_every_so_many_epochs_and_at_each_new_best(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=7, new_best=(1, 4), image_log_frequency=3).run()
    assert steps(tmp_path, "val/predictions", EventAccumulator.Images) == [1, 3, 4, 6]


def test_a_due_panel_waits_for_the_next_validation(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=8, interval=2, image_log_frequency=3).run()
    assert steps(tmp_path, "val/predictions", EventAccumulator.Images) == [4, 6]


def test_an_epoch_without_validation_repeats_no_old_value(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=4, interval=2, new_best=(1, 2, 3, 4), log_images=False).run()
    assert steps(tmp_path, "val/dice") == [2, 4]
    assert steps(tmp_path / "val", "comparison/dice") == [2, 4]
    assert steps(tmp_path, "train/dice") == [1, 2, 3, 4]
    assert events(tmp_path).Tags()["images"] == []


def test_switched_off_parts_are_absent(tmp_path: Path) -> None:
    make_trainer(tmp_path, log_images=False, log_graph=False).run()
    tags = events(tmp_path).Tags()
    assert (tags["images"], tags["histograms"], tags["graph"]) == ([], [], False)


def test_a_resumed_run_neither_repeats_nor_loses_a_step(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=4, **EVERYTHING).run()
    time.sleep(1.01)  # event files are read in the order of their names, which count seconds
    make_trainer(tmp_path, epochs=5, done=2, **EVERYTHING).run()
    for tag in ("train/loss", "val/dice", "learning_rate", "activations/0/mean"):
        assert steps(tmp_path, tag) == [1, 2, 3, 4, 5]
    assert steps(tmp_path, "val/predictions", EventAccumulator.Images) == [1, 2, 3, 4, 5]
    assert steps(tmp_path / "val", "comparison/dice") == [1, 2, 3, 4, 5]
    assert steps(tmp_path / "iterations", "train/loss_iteration") == list(range(1, 11))


def test_a_resumed_run_keeps_the_rhythm_of_the_panels(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=6, done=4, image_log_frequency=3).run()
    assert steps(tmp_path, "val/predictions", EventAccumulator.Images) == [6]


def test_a_validation_before_training_is_not_taken_for_the_first_epoch(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=2, interval=2)
    trainer.add_event_handler(Events.STARTED, lambda: trainer.validator.run(0))
    trainer.run()
    assert steps(tmp_path, "val/dice") == [2]


def test_a_handler_listed_too_early_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, epochs=2, interval=9)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda e: trainer.validator.run(e.state.epoch)
    )
    trainer.run()
    assert "list it after the ValidationHandler" in caplog.text


def test_speed_has_a_group_of_its_own(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=2, before=(Throughput("cpu"),)).run()
    assert steps(tmp_path, "speed/loader_share") == [1, 2]
    tags = events(tmp_path).Tags()["scalars"]
    assert not any("speed" in tag for tag in tags if not tag.startswith("speed/"))


def test_a_run_that_fails_leaves_the_loss_of_every_iteration(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, epochs=3, before=(FailsAt(2),)).run()
    iterations = list(range(1, 2 * ITERATIONS + 1))
    assert steps(tmp_path / "iterations", "train/loss_iteration") == iterations


# --- what it leaves alone and behind


def test_training_computes_the_same_with_and_without_it(tmp_path: Path) -> None:
    watched = make_trainer(tmp_path, epochs=3, shuffle=True, new_best=(2,), **EVERYTHING)
    alone = make_trainer(tmp_path, epochs=3, shuffle=True, enabled=False)
    for trainer in (watched, alone):
        torch.manual_seed(1)
        trainer.run()
    torch.testing.assert_close(
        watched.network.state_dict(), alone.network.state_dict(), rtol=0, atol=0
    )


def test_nothing_stays_open_or_hooked_after_training(tmp_path: Path, open_writers: Any) -> None:
    trainer = make_trainer(tmp_path, epochs=2, **EVERYTHING)
    seen = []
    trainer.validator.add_event_handler(
        Events.ITERATION_STARTED, lambda: seen.append((hooks(trainer.network), len(open_writers())))
    )
    trainer.run()
    assert seen == [(2, 1), (0, 1), (2, 4), (0, 4)]  # hooks in the first batch of each validation
    assert hooks(trainer.network) == 0
    assert open_writers() == []


def test_an_error_is_raised_again_and_leaves_nothing_open(
    tmp_path: Path, open_writers: Any
) -> None:
    trainer = make_trainer(tmp_path, epochs=3, after=(FailsAt(2),), **EVERYTHING)
    with pytest.raises(ZeroDivisionError, match="as planned"):
        trainer.run()
    assert hooks(trainer.network) == 0
    assert open_writers() == []
    assert steps(tmp_path, "val/dice") == [1, 2]


def test_an_error_in_the_network_takes_the_hooks_off(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=2, **EVERYTHING)
    failing = trainer.network[1].register_forward_pre_hook(
        lambda module, _: None if module.training else FailsAt.fail()
    )
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    failing.remove()
    assert hooks(trainer.network) == 0


def test_listeners_added_later_still_hear_of_an_error(tmp_path: Path) -> None:
    heard: list[BaseException] = []
    trainer = make_trainer(tmp_path, epochs=2, after=(FailsAt(1),))
    trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda _, error: heard.append(error))
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert isinstance(heard[0], ZeroDivisionError)


def test_a_listener_that_cuts_it_off_leaves_nothing_open_once_the_trainer_is_gone(
    tmp_path: Path, open_writers: Any
) -> None:
    def cut(_: Engine, error: BaseException) -> None:
        raise error

    trainer = make_trainer(tmp_path, epochs=2, after=(FailsAt(1),))
    trainer.add_event_handler(Events.EXCEPTION_RAISED, cut)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert steps(tmp_path, "val/dice") == [1]
    gone = weakref.ref(trainer)
    del trainer
    assert open_writers() == []
    assert gone() is None


def test_disabled_leaves_no_file_and_no_import(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "tensorboard", epochs=2, new_best=(1,), enabled=False)
    trainer.run()
    assert list(tmp_path.iterdir()) == []
    script = (
        "import sys; from types import SimpleNamespace as S\n"
        "from pipeline.training.tensorboard import TensorBoardHandler\n"
        "TensorBoardHandler('logs', S(network=None), enabled=False).attach(None)\n"
        "sys.exit(any(name.split('.')[0] == 'tensorboard' for name in sys.modules))"
    )
    found = {**os.environ, "PYTHONPATH": str(Path(tensorboard.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=tmp_path, env=found)
    assert list(tmp_path.iterdir()) == []


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard.idist, "get_rank", lambda: 1)
    pictures = tmp_path / "pictures"
    make_trainer(tmp_path / "logs", new_best=(1,), pictures_dir=pictures, **EVERYTHING).run()
    write_test_scalars(tmp_path / "logs", {"dice": 0.5}, step=1)
    assert list(tmp_path.iterdir()) == []


# --- pictures


@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "disabled"])
def test_a_new_best_leaves_its_panels_as_pictures(tmp_path: Path, enabled: bool) -> None:
    pictures = tmp_path / "pictures"
    make_trainer(
        tmp_path / "tensorboard", epochs=3, new_best=(2,), enabled=enabled, pictures_dir=pictures
    ).run()
    assert sorted(path.name for path in pictures.iterdir()) == [
        f"best_{number}.png" for number in (1, 2, 3, 4)
    ]
    with Image.open(pictures / "best_1.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (3 * 8 + 2 * 4, 8))
    assert (tmp_path / "tensorboard").exists() == enabled


def test_a_domain_draws_its_own_panels_from_batch_and_output(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def red(item: dict[str, Any]) -> torch.Tensor:
        seen.append(set(item))
        picture = torch.zeros(3, 5, 2 + len(seen), dtype=torch.uint8)
        picture[0] = 255
        return picture

    pictures = tmp_path / "pictures"
    make_trainer(tmp_path / "logs", new_best=(1,), panels=red, pictures_dir=pictures).run()
    assert len(seen) == 4
    assert {"image", "label", "pred"} <= seen[0]
    with Image.open(pictures / "best_1.png") as picture:
        assert picture.getpixel((0, 0)) == (255, 0, 0)
    image = events(tmp_path / "logs").Images("val/predictions")[0]
    assert (image.width, image.height) == (6, 4 * (5 + 4))


def test_a_panel_of_the_wrong_kind_is_refused() -> None:
    collector = PanelCollector(to_rgb=lambda item: torch.zeros(1, 8, 8))
    validator = make_trainer(Path("unused"), enabled=False).validator
    collector.attach(validator)
    with pytest.raises(
        ConfigurationError, match=r"uint8 \(3, H, W\), got torch.float32 \(1, 8, 8\)"
    ):
        validator.run()


# --- test figures, settings, errors


def test_test_figures_stand_in_a_run_of_their_own(tmp_path: Path, open_writers: Any) -> None:
    write_test_scalars(tmp_path, {"dice": 0.81, "test_iou": 0.7, "fov": "given"}, step=12)
    assert events(tmp_path / "test").Tags()["scalars"] == ["test/dice", "test/iou"]
    assert steps(tmp_path / "test", "test/dice") == [12]
    assert open_writers() == []


@pytest.mark.parametrize("setting", ["image_log_frequency", "activation_log_frequency"])
@pytest.mark.parametrize("wrong", [0, "5", True], ids=["zero", "text", "bool"])
def test_a_frequency_below_one_is_refused(tmp_path: Path, setting: str, wrong: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"{setting}: expected a whole number.*got {wrong!r}"
    ):
        make_trainer(tmp_path, **{setting: wrong})


def test_an_unknown_layer_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no module '7'; did you mean"):
        make_trainer(tmp_path, log_activations=True, activation_layers=["7"])


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(ResourceError, match=r"file/logs: TensorBoard events cannot be written"):
        make_trainer(tmp_path / "file" / "logs").run()
