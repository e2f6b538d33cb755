from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.transforms import Compose
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from pipeline.classification.joint_scales import JointScales
from pipeline.classification.losses import ClassificationLoss
from pipeline.classification.multiscale import OneScale, multiscale_objective
from pipeline.errors import ConfigurationError, DivergedError
from pipeline.training.ordering import DataOrder, KeyedDataset, OrderedBatches
from pipeline.training.step import TrainingStep

SAMPLES = 11  # by 4: two whole batches and one of 3; by 2 and groups of 2: the last group is short
SCALES = [8, 12, 16]
TOLERANCE = 1e-10


def normalised(dropout: float = 0.0) -> nn.Module:
    """Return a small double-precision classifier whose samples do not see each other."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()


class Labelled(Dataset[Any]):
    """Images and classes; of `bad`, one pixel is not a number."""

    def __init__(self, bad: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (SAMPLES, 3, 16, 16)
        self.images = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(0, 3, (SAMPLES,), generator=generator)
        if bad is not None:
            self.images[bad, 0, 2, 3] = math.nan

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index], "name": f"bee_{index}"}


def objective(mode: str = "joint", epochs: int = 3, **settings: Any) -> OneScale | JointScales:
    given = {"scales": SCALES, "evaluation_scale": 16, "max_epochs": epochs, "seed": 5}
    return multiscale_objective(mode, **given | settings)  # type: ignore[arg-type]


def make_trainer(
    what: Any,
    batch_size: int = 4,
    *,
    epochs: int = 3,
    network: nn.Module | None = None,
    data: Any = None,
    **settings: Any,
) -> Any:
    """Return a trainer; its `sizes` are those of the network's inputs, its `gradients` updates'."""
    network = network or normalised()
    data = KeyedDataset(data or Labelled(), Compose([]), seed=5)
    batches = OrderedBatches(data, batch_size, seed=5)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    step = TrainingStep(
        batch_size=batch_size,
        samples=len(data),
        objective=what,
        **{"accumulation_steps": 1} | settings,
    )
    trainer: Any = SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=DataLoader(data, batch_sampler=batches),
        network=network,
        optimizer=optimizer,
        loss_function=ClassificationLoss(),
        iteration_update=step,
        decollate=False,
        train_handlers=[DataOrder(batches, seed=5)],
    )
    trainer.step, trainer.sizes, trainer.gradients = step, [], []
    network[0].register_forward_pre_hook(lambda _, given: trainer.sizes.append(given[0].shape[2]))
    optimizer.register_step_pre_hook(lambda *_: trainer.gradients.append(flat(network, "grad")))
    return trainer


def flat(network: nn.Module, what: str = "data") -> Tensor:
    return torch.cat([getattr(p, what).reshape(-1) for p in network.parameters()]).clone()


def trained(what: Any, batch_size: int = 4, **settings: Any) -> Any:
    trainer = make_trainer(what, batch_size, **settings)
    trainer.run()
    return trainer


def assert_same_training(trainer: Any, expected: Any) -> None:
    assert len(trainer.gradients) == len(expected.gradients)
    for found, wanted in zip(trainer.gradients, expected.gradients, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) <= TOLERANCE
    torch.testing.assert_close(
        flat(trainer.network), flat(expected.network), rtol=0, atol=TOLERANCE
    )


# Inside the house's trainer


@pytest.mark.parametrize("mode", ["joint", "random", "progressive"])
@pytest.mark.parametrize("target", ["largest", "mean"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 2), (1, 4), (11, 1)])
def test_accumulation_equals_one_batch(
    mode: str, target: str, batch_size: int, accumulation: int
) -> None:
    what = objective(mode, consistency_target=target)
    whole = trained(what, batch_size * accumulation, clip_norm=0.05)
    parts = trained(what, batch_size, accumulation_steps=accumulation, clip_norm=0.05)
    assert_same_training(parts, whole)


@pytest.mark.parametrize("mode", ["joint", "random"])
@pytest.mark.parametrize("target", ["largest", "mean"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_running_out_of_memory_in_any_pass_changes_nothing(
    mode: str, target: str, accumulation: int
) -> None:
    what = objective(mode, consistency_target=target)
    network, calls = normalised(), iter(range(1, 10**6))

    def fail(*_: object) -> None:
        if next(calls) in (2, 10):  # with two passes, one call is in the first, one in the second
            raise torch.OutOfMemoryError("CUDA out of memory")

    network[2].register_forward_hook(fail)
    trainer = trained(what, 4, network=network, accumulation_steps=accumulation)
    assert trainer.step.pieces == 4
    assert_same_training(trainer, trained(what, 4 * accumulation))


@pytest.mark.parametrize("target", ["largest", "mean"])
def test_little_memory_trains_as_much_memory_does(target: str) -> None:
    runs = [
        trained(
            objective(consistency_target=target, memory_efficient=way),
            2,
            network=normalised(dropout=0.3),
            accumulation_steps=2,
            clip_norm=0.05,
        )
        for way in (True, False)
    ]
    assert_same_training(*runs)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("target", ["largest", "mean"])
def test_mixed_precision_trains_and_loss_scaling_is_undone(precision: str, target: str) -> None:
    data = Labelled()
    data.images = data.images.float()
    what, losses = objective(consistency_target=target), []
    trainer = make_trainer(
        what, 4, network=normalised().float(), data=data, epochs=12, precision=precision
    )
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: losses.append(float(engine.state.output["loss"]))
    )
    trainer.run()
    assert losses[-1] < losses[0]
    full = trained(what, 4, network=normalised().float(), data=data, epochs=1)
    error = (trainer.gradients[0] - full.gradients[0]).norm() / full.gradients[0].norm()
    assert float(error) < 0.05


def test_a_loss_that_is_not_finite_names_the_files_and_can_be_left_out() -> None:
    with pytest.raises(DivergedError, match=r"the loss is nan in a batch of .*bee_4"):
        trained(objective(), 4, data=Labelled(bad=4))
    trainer = trained(objective(), 4, data=Labelled(bad=4), epochs=1, skip_not_finite=1)
    assert trainer.step.skipped == 1
    assert len(trainer.gradients) == 2
    assert bool(flat(trainer.network).isfinite().all())


def test_the_trainers_prediction_is_the_largest_scales() -> None:
    trainer = make_trainer(objective(), 11, epochs=1)
    start = normalised()
    trainer.run()
    output = trainer.state.output
    torch.testing.assert_close(output["pred"], start(output["image"]).detach())
    assert output["image"].shape[2:] == (16, 16)


def test_a_wrapped_subset_never_leaks_its_parent() -> None:
    """Looking for a `.dataset` inside finds the whole set, validation images included."""
    chosen, data = [1, 3, 4, 8, 9], Labelled()
    subset = Subset(data, chosen)
    seen: list[Tensor] = []
    trainer = make_trainer(objective(), 2, data=subset, epochs=2)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: seen.extend(engine.state.output["image"])
    )
    trainer.run()
    found = [next(i for i in range(SAMPLES) if torch.equal(data.images[i], x)) for x in seen]
    assert sorted(found[:5]) == sorted(found[5:]) == chosen


# Sizes


def test_a_progressive_run_sees_its_phases() -> None:
    what = objective("progressive", epochs=4, epoch_shares=[1, 1, 2])
    assert trained(what, 4, epochs=4).sizes == [8] * 3 + [12] * 3 + [16] * 6
    assert what.facts == ("scales: 8 px in epochs 1 to 1, 12 px in epochs 2 to 2, "
                          "16 px in epochs 3 to 4",)  # fmt: skip


def test_a_single_run_sees_the_evaluation_scale() -> None:
    assert set(trained(objective("single", evaluation_scale=12), 4).sizes) == {12}


def test_a_joint_run_sees_all_scales_in_every_step() -> None:
    assert trained(objective(), 11, epochs=1).sizes == [16, 12, 8]
    two_passes = objective(consistency_target="mean")
    assert trained(two_passes, 11, epochs=1).sizes == [8, 12, 16, 12, 8]


@pytest.mark.parametrize("mode", ["random", "progressive"])
def test_a_resumed_run_sees_what_the_uninterrupted_one_sees(mode: str) -> None:
    """In the middle of an epoch too: nothing but the iteration has to be saved."""
    what = objective(mode, epochs=6)
    whole = trained(what, 2, epochs=6).sizes
    if mode == "random":
        assert len(set(whole)) == 3
    resumed = make_trainer(what, 2, epochs=6)
    resumed.load_state_dict({"iteration": 16, "max_epochs": 6, "epoch_length": 6})
    resumed.run()
    assert resumed.sizes == whole[16:]


def test_a_random_size_is_that_of_the_whole_update() -> None:
    groups = trained(objective("random"), 2, accumulation_steps=3, epochs=4).sizes
    assert len(set(groups)) == 3
    for start in range(0, len(groups), 3):
        assert len(set(groups[start : start + 3])) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "both"}, "mode must be one of single, progressive, random, joint, got 'both'"),
        ({"evaluation_scale": 0}, "evaluation_scale must be a size in pixels such as 128, got 0"),
        ({"mode": "single", "scales": []}, "scales must be a list"),
        ({"mode": "progressive", "evaluation_scale": 12}, "must be evaluation_scale, got 12"),
        ({"consistency_type": "js"}, "consistency_type must be one of kl, mse, cosine"),
        ({"consistency_weight": -1}, "consistency_weight must be 0 or more, got -1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        objective(**{"mode": "joint"} | settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "16, 12, 8 px in every step, one after another, consistency kl towards the largest"),
        ({"consistency_target": "mean"}, "in two passes, consistency kl towards the mean x 1"),
        ({"consistency_weight": 0}, "one after another, no term"),
        ({"memory_efficient": False}, "in one graph"),
        ({"mode": "random"}, "one of 16, 12, 8 px for every update"),
        ({"mode": "single"}, "scales: 16 px"),
    ],
)
def test_the_head_of_the_log_says_what_is_trained_at(settings: dict[str, Any], words: str) -> None:
    assert words in objective(**settings).facts[0]
