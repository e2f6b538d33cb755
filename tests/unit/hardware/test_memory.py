from __future__ import annotations

import logging
import random
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from monai.networks.nets import DenseNet, UNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.errors import ConfigurationError
from pipeline.hardware.batch_memory import BatchMemory
from pipeline.hardware.memory import MemoryEstimate, estimate_training_memory, fit_batch
from pipeline.training.block_checkpointing import checkpoint_blocks
from pipeline.training.losses import DiceBCELoss

ADAM = partial(torch.optim.AdamW, lr=0.001)
SGD = partial(torch.optim.SGD, lr=0.001)
CROSS_ENTROPY: dict[str, Any] = {"target_shape": (), "target_dtype": "int64"}

# Real networks at small shapes: what builds the network and the loss, the input, the target.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], tuple[int, ...], Any]] = {
    "2-D classifier": (
        partial(DenseNet, 2, 3, 10, init_features=8, growth_rate=8, block_config=(1,)),
        nn.CrossEntropyLoss, (4, 3, 64, 64), CROSS_ENTROPY,
    ),
    "2-D U-Net": (
        partial(UNet, 2, 1, 3, channels=(8, 16, 32), strides=(2, 2), norm="batch"),
        nn.CrossEntropyLoss, (2, 1, 64, 96),
        {"target_shape": (64, 96), "target_dtype": "int64"},
    ),
    "3-D U-Net": (
        partial(UNet, 3, 1, 1, channels=(16, 32), strides=(2,)),
        DiceBCELoss, (2, 1, 32, 32, 32), {"target_shape": (1, 32, 32, 32)},
    ),
}  # fmt: skip


class Layers(nn.Module):
    """Return three sizes, as a network under deep supervision does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 1, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> list[Tensor]:
        full = self.second(self.drop(torch.relu(self.first(images))))
        return [full, nn.functional.avg_pool2d(full, 2), nn.functional.avg_pool2d(full, 4)]


def tiny() -> nn.Module:
    """2 parameters and 400 bytes of activations per sample."""
    return nn.Sequential(nn.Conv2d(1, 1, 1))


def estimate(case: str, **settings: Any) -> MemoryEstimate:
    network, loss, shape, target = CASES[case]
    return estimate_training_memory(network, loss, ADAM, shape, **target, **settings)


# The truth


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_the_memory_of_a_real_step(case: str, counted: ModuleType) -> None:
    network, loss, shape, target = CASES[case]
    step = counted.Step(network, loss, ADAM, shape, {**target, "channels_last": False})
    found = step.estimate()
    assert found.peak_bytes == pytest.approx(counted.storage_bytes(step), rel=0.01)
    assert found.allocated_bytes == pytest.approx(counted.allocator_bytes(step), rel=0.10)


@pytest.mark.parametrize("case", CASES)
def test_the_memory_of_every_batch_is_known_from_two(case: str) -> None:
    network, loss, shape, target = CASES[case]
    growth = fit_batch(network, loss, ADAM, shape, **target)
    for batch in (1, 5, 32):
        larger = estimate_training_memory(network, loss, ADAM, (batch, *shape[1:]), **target)
        assert growth.at(batch) == pytest.approx(larger.peak_bytes, rel=0.01)
        assert growth.largest_batch(growth.at(batch)) == batch


def test_the_memory_of_several_steps_is_known_from_two() -> None:
    network, loss, shape, target = CASES["2-D U-Net"]
    growth = fit_batch(network, loss, ADAM, shape, **target)
    assert growth.at(shape[0], 2) > growth.at(shape[0])
    for steps in (2, 5):
        found = estimate("2-D U-Net", accumulation=steps)
        assert growth.at(shape[0], steps) == found.peak_bytes


def test_with_few_samples_the_optimizer_is_the_peak_and_with_many_the_activations() -> None:
    wide = partial(nn.Conv2d, 4, 256, 5)
    growth = fit_batch(wide, lambda: torch.mean, ADAM, (1, 4, 8, 8))
    inputs, output = 4 * 4 * 8 * 8, 4 * 256 * 4 * 4
    assert growth.at(2) - growth.at(1) == inputs + output  # which live until the update's end
    assert growth.at(2000) - growth.at(1999) == inputs + 2 * output  # and the output's gradient


def test_a_network_that_needs_two_samples_is_fitted_with_two() -> None:
    def pooled() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8))

    growth = fit_batch(pooled, lambda: torch.mean, ADAM, (1, 1, 16, 16))
    found = estimate_training_memory(pooled, lambda: torch.mean, ADAM, (9, 1, 16, 16))
    assert growth.at(9) == found.peak_bytes


# Categories


def test_categories_are_what_a_person_counts() -> None:
    """A linear layer from 10 to 10: 400 bytes of weights, their gradient, twice as Adam's state."""
    found = estimate_training_memory(
        partial(nn.Linear, 10, 10, bias=False), lambda: torch.sum, ADAM, (5, 10)
    )
    assert found.largest["parameters"] == found.largest["gradients"] == 400
    assert found.largest["inputs"] == 200
    assert 800 < found.largest["optimizer"] <= 800 + 4 + 2 * 400  # its step, and what it works with
    assert sum(found.categories.values()) == found.peak_bytes
    assert found.categories["averaged"] == found.categories["buffers"] == 0


@pytest.mark.parametrize("case", CASES)
def test_the_categories_make_the_peak(case: str) -> None:
    found = estimate(case)
    network = CASES[case][0]()
    assert sum(found.categories.values()) == found.peak_bytes <= found.allocated_bytes
    assert found.largest["parameters"] == sum(p.nbytes for p in network.parameters())
    assert found.largest["buffers"] == sum(b.nbytes for b in network.buffers())
    assert found.largest["gradients"] == found.largest["parameters"]


def test_layers_tell_what_waits_for_the_backward_pass() -> None:
    network = CASES["2-D U-Net"][0]
    found = estimate("2-D U-Net")
    sizes = [size for _, size in found.layers]
    assert sizes == sorted(sizes, reverse=True)
    names = {name for name, _ in network().named_modules()} | {"UNet", "loss"}
    assert {name for name, _ in found.layers} <= names
    assert sum(sizes) <= found.largest["activations"]


def test_a_frozen_parameter_has_no_gradient() -> None:
    def half_frozen() -> nn.Module:
        network = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
        network[0].requires_grad_(False)
        return network

    found = estimate_training_memory(half_frozen, lambda: torch.sum, SGD, (1, 10))
    assert (found.largest["parameters"], found.largest["gradients"]) == (800, 400)


# Settings


def test_averaged_weights_are_a_copy_more() -> None:
    more = estimate("2-D U-Net", averaged=True).peak_bytes - estimate("2-D U-Net").peak_bytes
    network = CASES["2-D U-Net"][0]()
    assert more == sum(tensor.nbytes for tensor in network.state_dict().values())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_halves_much_of_the_activations(precision: str) -> None:
    whole, half = estimate("3-D U-Net"), estimate("3-D U-Net", precision=precision)
    assert 0.4 < half.largest["activations"] / whole.largest["activations"] < 0.9
    assert half.largest["parameters"] == whole.largest["parameters"]


def test_blocks_computed_again_take_less() -> None:
    network, loss, shape, target = CASES["2-D U-Net"]
    plain = fit_batch(network, loss, ADAM, shape, **target)
    again = fit_batch(network, loss, ADAM, shape, **target, prepare=checkpoint_blocks)
    assert again.at(64) < 0.8 * plain.at(64)
    assert again.at(64) == estimate_training_memory(
        network, loss, ADAM, (64, *shape[1:]), **target, prepare=checkpoint_blocks
    ).peak_bytes  # fmt: skip


def test_an_optimizer_that_takes_all_parameters_at_once_takes_more() -> None:
    """As it does by itself on a GPU."""
    linear = partial(nn.Sequential, *[nn.Linear(64, 64) for _ in range(8)])
    one, all_at_once = (
        estimate_training_memory(linear, lambda: torch.sum, ADAM, (1, 64), foreach=foreach)
        for foreach in (False, True)
    )
    assert all_at_once.largest["optimizer"] > 1.2 * one.largest["optimizer"]


def test_channels_last_changes_what_convolutions_copy_and_not_the_tensors() -> None:
    plain, last = (estimate("2-D U-Net", channels_last=layout) for layout in (False, True))
    assert plain.peak_bytes == last.peak_bytes == last.allocated_bytes < plain.allocated_bytes


def test_a_target_is_made_by_shape_by_function_or_not_at_all() -> None:
    network, loss, shape, _ = CASES["2-D U-Net"]
    by_function = estimate_training_memory(
        network, loss, ADAM, shape, make_target=lambda batch: torch.zeros(batch, 64, 96).long()
    )
    assert by_function.peak_bytes == estimate("2-D U-Net").peak_bytes
    without = estimate_training_memory(tiny, lambda: torch.mean, SGD, (1, 1, 10, 10))
    assert without.largest["inputs"] == 400


def test_a_masked_loss_with_labels_of_three_kinds_is_computed() -> None:
    loss = partial(DiceBCELoss, ignore_label=2)
    found = estimate_training_memory(
        partial(nn.Conv3d, 1, 1, 3, padding=1), loss, SGD, (2, 1, 8, 8, 8),
        target_shape=(1, 8, 8, 8), target_dtype="uint8",
    )  # fmt: skip
    assert found.notes == ()


def test_a_network_that_returns_a_list_is_computed() -> None:
    def loss(outputs: list[Tensor], target: Tensor) -> Tensor:
        full, half, quarter = outputs
        return ((full - target) ** 2).mean() + half.mean() + quarter.mean()

    found = estimate_training_memory(
        Layers, lambda: loss, ADAM, (2, 1, 16, 16), target_shape=(1, 16, 16)
    )
    assert found.notes == ()
    assert found.largest["activations"] > 2 * 4 * 16 * 16 * 4


@pytest.mark.parametrize("kind", ["item", "nonzero", "numpy", "branch"])
def test_a_loss_that_needs_values_is_replaced_and_said(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def loss(outputs: list[Tensor], target: Tensor) -> Tensor:
        full = outputs[0]
        if kind == "item":
            return full.mean() * float(target.sum())
        if kind == "nonzero":
            return full[target > 0.5].mean()
        if kind == "numpy":
            return full.mean() * target.numpy().sum()
        return full.mean() if target.any() else full.sum()

    with caplog.at_level(logging.INFO, logger="pipeline.hardware.memory"):
        found = estimate_training_memory(
            Layers, lambda: loss, ADAM, (2, 1, 16, 16), target_shape=(1, 16, 16)
        )
        growth = fit_batch(Layers, lambda: loss, ADAM, (2, 1, 16, 16), target_shape=(1, 16, 16))
    assert found.peak_bytes > found.largest["parameters"]
    assert "a mean of the output stands for it" in found.notes[0] == growth.notes[0]
    assert caplog.text.count("memory estimate: the loss") == 2


class Undecided(nn.Module):
    """Go by the values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) if inputs.sum() > 0 else inputs


def test_a_network_that_needs_values_is_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigurationError, match=r"Undecided cannot be computed .*set batch_size"):
        estimate_training_memory(Undecided, lambda: torch.mean, SGD, (1, 2))


def test_a_network_that_is_built_from_a_range_of_numbers_is_built() -> None:
    def graded() -> nn.Module:
        rates = [float(rate) for rate in torch.linspace(0, 0.5, 4)]
        return nn.Sequential(nn.Linear(2, 2), *[nn.Dropout(rate) for rate in rates])

    assert estimate_training_memory(graded, lambda: torch.mean, SGD, (1, 2)).peak_bytes > 0


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((4,), {}, r"input_shape must be \(B, C, ...\), all at least 1, got \(4,\)"),
        ((0, 1, 8, 8), {}, "all at least 1"),
        ((1, 1, 8, 8), {"precision": "half"}, "precision must be one of .*, got 'half'"),
        ((1, 1, 8, 8), {"accumulation": 0}, "accumulation must be at least 1, got 0"),
        ((1, 1, 8, 8), {"target_shape": (1,), "target_dtype": "long int"}, "got 'long int'"),
    ],
    ids=["one axis", "no samples", "precision", "accumulation", "target"],
)
def test_settings_out_of_range_are_refused(
    shape: tuple[int, ...], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        estimate_training_memory(tiny, lambda: torch.mean, SGD, shape, **settings)


# The process


def test_no_random_state_is_touched() -> None:
    def noisy() -> nn.Module:
        random.random()
        np.random.rand()  # noqa: NPY002 - what a foreign network may call
        torch.manual_seed(0)
        return Layers()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    estimate_training_memory(noisy, lambda: lambda outputs: outputs[0].mean(), ADAM, (1, 1, 8, 8))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1][1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_answer_is_the_same_every_time() -> None:
    assert estimate("2-D U-Net") == estimate("2-D U-Net")


def test_no_memory_is_taken() -> None:
    """A step of a terabyte, in a process that grows by less than 200 MB."""
    network = partial(nn.Conv2d, 3, 64, 3)
    before = psutil.Process().memory_info().rss
    found = estimate_training_memory(network, lambda: torch.mean, SGD, (4096, 3, 1000, 1000))
    assert found.peak_bytes > 10**12
    assert psutil.Process().memory_info().rss - before < 200e6


def test_tensors_made_afterwards_have_data() -> None:
    estimate("2-D U-Net")
    assert float(torch.arange(3).sum()) == 3


def test_a_checkpoint_inside_a_network_is_followed() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)])

        def forward(self, inputs: Tensor) -> Tensor:
            return checkpoint(self.body, inputs, use_reentrant=False)

    def plain() -> nn.Module:
        return nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)])

    again, whole = (
        estimate_training_memory(made, lambda: torch.mean, SGD, (4096, 32), prepare=None)
        for made in (Again, plain)
    )
    kept = [dict(found.layers) for found in (again, whole)]
    assert sum(kept[0].values()) < 0.5 * sum(kept[1].values())


# A line over the batch


def test_a_line_is_read_both_ways() -> None:
    memory = BatchMemory.affine(100, 50)
    assert [memory.at(batch) for batch in (1, 2, 10)] == [150, 200, 600]
    assert [memory.largest_batch(limit) for limit in (99, 149, 150, 320)] == [0, 0, 1, 4]


def test_the_highest_line_counts() -> None:
    memory = BatchMemory(((1000, 0), (100, 50)))
    assert [memory.at(batch) for batch in (1, 18, 20)] == [1000, 1000, 1100]
    assert [memory.largest_batch(limit) for limit in (999, 1000, 1100)] == [0, 18, 20]
