from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from pipeline.errors import ConfigurationError, DivergedError, ResourceError
from pipeline.training.losses import DiceLoss
from pipeline.training.monitor import Monitor
from pipeline.training.ordering import OrderedBatches
from pipeline.training.saving import CheckpointHandler
from pipeline.training.step import TrainingStep

SAMPLES = 11  # by 4: two whole batches and one of 3; by 2 and groups of 2: the last group is short
TOLERANCE = 1e-10


def normalised(norm: str = "group") -> nn.Module:
    """Return a small double-precision network whose samples do not see each other."""
    torch.manual_seed(0)
    layers = {
        "group": nn.GroupNorm(2, 4),
        "instance": nn.InstanceNorm2d(4, affine=True),
        "batch": nn.BatchNorm2d(4),
    }
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), layers[norm], nn.Tanh(), nn.Conv2d(4, 1, 1)
    ).double()


class Labelled(torch.utils.data.Dataset[Any]):
    """Double-precision images and labels with names; item `bad` is not a number."""

    def __init__(self, bad: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(SAMPLES, 1, 6, 6, generator=generator, dtype=torch.float64)
        self.labels = (torch.rand(self.images.shape, generator=generator) < 0.4).double()
        if bad is not None:
            self.images[bad, 0, 2, 3] = math.nan

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: Any) -> dict[str, Any]:
        index = index[1] if isinstance(index, tuple) else index
        found = {"image": self.images[index], "label": self.labels[index]}
        return found | {"name": f"eye_{index}.png"}


class Recorded:
    """Keeps the gradient that every update used."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.gradients: list[Tensor] = []
        optimizer.register_step_pre_hook(lambda *_: self.gradients.append(flat(network, "grad")))


def flat(network: nn.Module, what: str = "data") -> Tensor:
    return torch.cat([getattr(p, what).reshape(-1) for p in network.parameters()]).clone()


def make_trainer(
    batch_size: int,
    *,
    network: nn.Module | None = None,
    loss: Any = None,
    epochs: int = 3,
    data: Labelled | None = None,
    handlers: tuple[Any, ...] = (),
    **settings: Any,
) -> SupervisedTrainer:
    """Return a trainer with a `TrainingStep`; its `recorded` keeps the gradients."""
    network = network or normalised()
    data = data or Labelled()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    step = TrainingStep(
        batch_size=batch_size, samples=SAMPLES, **{"accumulation_steps": 1} | settings
    )
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=DataLoader(data, batch_size=batch_size),
        network=network,
        optimizer=optimizer,
        loss_function=loss or DiceLoss(per_sample=True, ignore_label=None),
        iteration_update=step,
        decollate=False,
        train_handlers=handlers,
    )
    trainer.recorded = Recorded(network, optimizer)
    trainer.step = step
    return trainer


def assert_same_training(trainer: Any, expected: Any) -> None:
    """Hold every update's gradient and the weights at the end against each other."""
    assert len(trainer.recorded.gradients) == len(expected.recorded.gradients)
    for found, wanted in zip(trainer.recorded.gradients, expected.recorded.gradients, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) <= TOLERANCE
    found, wanted = flat(trainer.network), flat(expected.network)
    assert float((found - wanted).norm() / wanted.norm()) <= TOLERANCE


def trained(batch_size: int, **settings: Any) -> Any:
    trainer = make_trainer(batch_size, **settings)
    trainer.run()
    return trainer


class FailsAt:
    """Runs out of memory at given calls: in the network's forward pass, or inside backward.

    A call of more than `fits` samples fails too, as on a device that is too small.
    """

    def __init__(
        self, network: nn.Module, where: str, error: Exception, calls: set[int], fits: int = 99
    ) -> None:
        self.where, self.error, self.calls, self.fits = where, error, calls, fits
        self.count = itertools.count(1)
        self.sizes: list[int] = []
        network[2].register_forward_hook(self._forward)  # in the middle: some gradients are added

    def _fail(self, size: int) -> None:
        if next(self.count) in self.calls or size > self.fits:
            raise self.error

    def _forward(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.sizes.append(len(output))
        if self.where == "forward":
            self._fail(len(output))
        else:
            output.register_hook(lambda gradient: self._fail(len(gradient)))


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize("norm", ["group", "instance"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 2), (1, 4), (4, 1), (3, 4), (11, 1)])
def test_accumulation_equals_one_batch(norm: str, batch_size: int, accumulation: int) -> None:
    whole = trained(batch_size * accumulation, network=normalised(norm))
    parts = trained(batch_size, network=normalised(norm), accumulation_steps=accumulation)
    assert_same_training(parts, whole)


def test_accumulation_equals_one_batch_where_the_gradient_is_clipped() -> None:
    free = trained(4)
    whole = trained(4, clip_norm=0.01)
    assert_same_training(trained(2, accumulation_steps=2, clip_norm=0.01), whole)
    assert max(float(g.norm()) for g in whole.recorded.gradients) <= 0.01 * (1 + 1e-9)
    assert min(float(g.norm()) for g in free.recorded.gradients) > 0.01


def test_a_loss_per_sample_is_averaged() -> None:
    loss = nn.BCEWithLogitsLoss(reduction="none")
    assert_same_training(trained(2, accumulation_steps=2, loss=loss), trained(4, loss=loss))


@pytest.mark.parametrize("error", [CUDA, CPU, MemoryError()], ids=["cuda", "cpu", "python"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_running_out_of_memory_changes_neither_gradients_nor_weights(
    error: Exception, where: str, accumulation: int, caplog: pytest.LogCaptureFixture
) -> None:
    network = normalised()
    FailsAt(network, where, error, calls={2, 9})
    trainer = trained(4, network=network, accumulation_steps=accumulation)
    assert_same_training(trainer, trained(4 * accumulation))
    assert trainer.step.pieces == 4
    assert "out of memory: batches are now computed in 2 pieces" in caplog.text
    assert "out of memory: batches are now computed in 4 pieces" in caplog.text


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("fits", "pieces"), [(3, 2), (2, 2), (1, 4)])
def test_pieces_shrink_until_they_fit_and_stay_so(where: str, fits: int, pieces: int) -> None:
    network = normalised()
    hook = FailsAt(network, where, CUDA, calls=set(), fits=fits)
    trainer = trained(4, network=network)
    assert_same_training(trainer, trained(4))
    assert trainer.step.pieces == pieces
    assert max(hook.sizes[-6:]) <= fits


def test_a_sample_that_does_not_fit_is_an_error_that_says_what_to_do() -> None:
    network = normalised()
    FailsAt(network, "forward", CUDA, calls=set(), fits=0)
    with pytest.raises(ResourceError, match=r"one sample at a time \(CUDA out of .*patch_size"):
        trained(4, network=network)


def test_another_error_is_not_taken_for_memory() -> None:
    network = normalised()
    FailsAt(network, "forward", RuntimeError("shapes do not match"), calls={2})
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trained(4, network=network)


def test_output_has_what_monais_own_step_gives() -> None:
    seen: list[dict[str, Tensor]] = []
    trainer = make_trainer(4, epochs=1)
    trainer.step.pieces = 3
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output))
    trainer.run()
    reference = normalised()
    for place, output in enumerate(seen[:1]):
        image = Labelled().images[4 * place : 4 * place + 4]
        assert torch.equal(output["image"], image)
        torch.testing.assert_close(output["pred"], reference(image).detach())
        wanted = trainer.loss_function(reference(image), output["label"])
        torch.testing.assert_close(float(output["loss"]), float(wanted.detach()))
    assert [len(output["pred"]) for output in seen] == [4, 4, 3]


def test_events_come_in_monais_order_and_see_the_prediction() -> None:
    fired: list[str] = []
    trainer = make_trainer(4, epochs=1)
    for name in ("FORWARD", "LOSS", "BACKWARD", "MODEL"):
        event = getattr(IterationEvents, f"{name}_COMPLETED")
        trainer.add_event_handler(event, lambda _, name=name: fired.append(name))
    trainer.add_event_handler(
        IterationEvents.FORWARD_COMPLETED, lambda engine: engine.state.output["pred"].shape
    )
    trainer.run()
    assert fired == ["FORWARD", "LOSS", "BACKWARD", "MODEL"] * 3


# What is not finite


class Spoilt(nn.Module):
    """A loss whose value is finite and whose gradient is not, in batches with sample 4."""

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        loss = (pred**2).mean()
        if any(torch.equal(mine, Labelled().labels[4]) for mine in label):
            loss = loss + (pred * 0).sqrt().mean()
        return loss


def test_a_loss_that_is_not_finite_names_the_files_of_the_batch() -> None:
    with pytest.raises(DivergedError, match=r"iteration 3: the loss is nan in a batch of eye_4"):
        trained(2, data=Labelled(bad=5))
    assert DivergedError.exit_code == 6


def test_a_gradient_that_is_not_finite_names_the_files_of_the_group() -> None:
    message = r"iteration 4: the gradient's norm is nan in a batch of eye_4.png, eye_5.png, eye_6"
    with pytest.raises(DivergedError, match=message):
        trained(2, loss=Spoilt(), accumulation_steps=2)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("cause", ["loss", "gradient"])
def test_a_group_that_is_not_finite_is_left_out_whole(
    cause: str, accumulation: int, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"accumulation_steps": accumulation, "epochs": 1}
    data = Labelled(bad=4 if cause == "loss" else None)
    loss = Spoilt() if cause == "gradient" else nn.BCEWithLogitsLoss()
    trainer = trained(2, data=data, loss=loss, skip_not_finite=1, **settings)
    groups = math.ceil(6 / accumulation)
    assert len(trainer.recorded.gradients) == groups - 1
    assert trainer.step.skipped == 1
    assert "left out (1 of 1)" in caplog.text
    assert bool(flat(trainer.network).isfinite().all())
    if accumulation == 1:  # the others as if the batch did not exist
        rest = make_trainer(2, data=data, loss=loss, **settings)
        batches = [[0, 1], [2, 3], [6, 7], [8, 9], [10]]
        rest.data_loader = [DataLoader(data).collate_fn([data[i] for i in b]) for b in batches]
        rest.state.epoch_length = 5
        rest.step.samples = 9
        rest.run()
        assert_same_training(trainer, rest)


def test_a_group_that_is_left_out_leaves_no_trace_in_running_statistics() -> None:
    network, norm = normalised(), nn.BatchNorm2d(1).double()
    network.append(norm)
    trainer = make_trainer(2, network=network, data=Labelled(bad=4), skip_not_finite=1, epochs=1)
    trainer.run()
    assert trainer.step.skipped == 1
    assert bool(norm.running_mean.isfinite().all())
    assert int(norm.num_batches_tracked) == 5


def test_more_than_the_allowed_number_stops_the_run() -> None:
    trainer = make_trainer(2, data=Labelled(bad=5), skip_not_finite=2)
    with pytest.raises(DivergedError, match=r"iteration 15"):
        trainer.run()
    assert trainer.step.skipped == 3


def test_a_loss_that_is_not_finite_is_told_as_zero_and_the_rest_goes_on() -> None:
    losses: list[float] = []
    trainer = make_trainer(2, data=Labelled(bad=5), skip_not_finite=1, epochs=1)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(float(engine.state.output["loss"]))
    )
    trainer.run()
    assert losses[2] == 0
    assert all(0 < loss < 1 for loss in losses[:2] + losses[3:])


def test_no_good_checkpoint_is_overwritten(tmp_path: Path) -> None:
    def handler(trainer_network: nn.Module) -> CheckpointHandler:
        monitor = Monitor(Engine(lambda *_: None), "val_dice")
        return CheckpointHandler(
            str(tmp_path), trainer_network, {}, {}, monitor, every=1, accumulation_steps=2
        )

    network = normalised()
    trainer = make_trainer(
        2, network=network, data=Labelled(bad=7), handlers=(handler(network),), accumulation_steps=2
    )
    with pytest.raises(DivergedError):
        trainer.run()
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["iteration"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in saved["model"].values())


# Mixed precision


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains_on_a_cpu(precision: str) -> None:
    losses: list[float] = []
    network = normalised().float()
    dtypes: set[torch.dtype] = set()
    network[0].register_forward_hook(lambda _m, _i, output: dtypes.add(output.dtype))
    data = Labelled()
    data.images, data.labels = data.images.float(), data.labels.float()
    trainer = make_trainer(4, network=network, data=data, epochs=12, precision=precision)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: losses.append(float(engine.state.output["loss"]))
    )
    trainer.run()
    assert dtypes == {getattr(torch, precision)}
    assert next(network.parameters()).dtype == torch.float32
    assert losses[-1] < losses[0]


def test_loss_scaling_leaves_out_an_overflow_and_halves_the_scale() -> None:
    network = normalised().float()
    data = Labelled()
    data.images, data.labels = data.images.float(), data.labels.float()
    trainer = make_trainer(4, network=network, data=data, epochs=1, precision="float16")
    trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = flat(network)
    trainer.run()
    assert trainer.step.scaler.get_scale() == 2.0**117  # three overflows
    assert torch.equal(flat(network), before)
    assert trainer.step.skipped == 0


def test_an_overflow_without_loss_scaling_left_is_not_finite() -> None:
    trainer = make_trainer(2, loss=Spoilt(), precision="float16", skip_not_finite=1, epochs=1)
    trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.run()
    assert trainer.step.skipped == 1
    assert len(trainer.recorded.gradients) == 5


# State


def test_the_state_goes_on_where_it_was() -> None:
    first = TrainingStep(2, 4, SAMPLES, precision="float16", skip_not_finite=3)
    first.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=7)
    first.scaler.scale(torch.ones(1))
    first.pieces, first.skipped = 2, 3
    second = TrainingStep(2, 4, SAMPLES, precision="float16", skip_not_finite=3)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert (second.pieces, second.skipped) == (2, 3)
    assert second.scaler.state_dict()["scale"] == 8.0


def test_a_training_interrupted_after_memory_ran_out_goes_on_in_pieces() -> None:
    network = normalised()
    FailsAt(network, "forward", CUDA, calls={1})
    step = trained(4, network=network, epochs=1).step
    other = TrainingStep(1, 4, SAMPLES)
    other.load_state_dict(step.state_dict())
    assert other.pieces == 2


@pytest.mark.parametrize("changed", [(1, 4, SAMPLES), (2, 8, SAMPLES), (2, 4, SAMPLES + 1)])
def test_another_plan_is_refused(changed: tuple[int, int, int]) -> None:
    state = TrainingStep(2, 4, SAMPLES).state_dict()
    with pytest.raises(ConfigurationError, match=r"were \[4, 2, 11\] when .*resume: false"):
        TrainingStep(*changed).load_state_dict(state)


def test_as_many_samples_in_more_processes_are_the_same_plan() -> None:
    state = TrainingStep(2, 4, SAMPLES).state_dict()
    TrainingStep(2, 2, SAMPLES, rank=1, processes=2).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulation_steps": 0}, "accumulation_steps must be at least 1, got 0"),
        ({"precision": "half"}, "one of float32, bfloat16, float16, got 'half'"),
        ({"clip_norm": 0.0}, "clip_norm must be null or above 0, got 0.0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TrainingStep(**{"accumulation_steps": 1, "batch_size": 1, "samples": 3} | settings)


# What is told


def notes(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "not exactly those of one undivided" in text]


def run_with(accumulation: int, norm: str, loss: Any, out_of_memory: bool) -> None:
    network = normalised(norm)
    if out_of_memory:
        FailsAt(network, "forward", CUDA, calls={3})
    trained(2, network=network, loss=loss, accumulation_steps=accumulation, epochs=2)


@pytest.mark.parametrize(("accumulation", "out_of_memory"), [(2, False), (1, True), (2, True)])
def test_a_recipe_that_breaks_the_equality_says_so_once(
    accumulation: int, out_of_memory: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run_with(accumulation, "batch", DiceLoss(), out_of_memory)
    assert len(notes(caplog)) == 2
    assert "BatchNorm2d" in notes(caplog)[0]
    assert "DiceLoss pools" in notes(caplog)[1]


@pytest.mark.parametrize(
    ("accumulation", "norm", "loss"),
    [(1, "batch", DiceLoss()), (2, "group", DiceLoss(per_sample=True))],
)
def test_nothing_is_said_where_nothing_is_divided_or_broken(
    accumulation: int, norm: str, loss: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run_with(accumulation, norm, loss, False)
    assert notes(caplog) == []


def test_items_of_several_samples_weigh_as_many() -> None:
    """A dataset that gives two patches per item: the plan counts items, the network samples."""
    pairs = [torch.utils.data.default_collate([Labelled()[i], Labelled()[i + 1]]) for i in (0, 4)]
    trainer = make_trainer(1, epochs=1, accumulation_steps=2)
    trainer.step.samples = 2
    trainer.data_loader, trainer.state.epoch_length = pairs, 2
    trainer.run()
    whole = make_trainer(4, epochs=1)
    whole.step.samples = 4
    joined: Callable[[str], Tensor] = lambda key: torch.cat([pair[key] for pair in pairs])  # noqa: E731
    whole.data_loader = [{"image": joined("image"), "label": joined("label")}]
    whole.state.epoch_length = 1
    whole.run()
    assert_same_training(trainer, whole)


def test_batches_of_the_ordered_sampler_fit_the_plan() -> None:
    data = Labelled()
    batches = OrderedBatches(data, 2, seed=0)
    whole = OrderedBatches(data, 4, seed=0)
    parts = make_trainer(2, accumulation_steps=2, data=data)
    parts.data_loader = DataLoader(data, batch_sampler=batches)
    one = make_trainer(4, data=data)
    one.data_loader = DataLoader(data, batch_sampler=whole)
    parts.run()
    one.run()
    assert_same_training(parts, one)
