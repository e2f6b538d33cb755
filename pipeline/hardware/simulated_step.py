"""A training step on tensors without data, as `pipeline.training` computes it on real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from pipeline.errors import ConfigurationError, first_line
from pipeline.hardware.storages import LiveStorages

__all__ = [
    "FIRST",
    "LATER",
    "OPTIMIZER",
    "MakeLoss",
    "MakeNetwork",
    "MakeOptimizer",
    "SimulatedStep",
    "SimulatedUpdates",
    "StepSettings",
    "batch_of",
    "use_channels_last",
]

MakeNetwork = Callable[[], nn.Module]
MakeLoss = Callable[[], Callable[..., Any]]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]

FIRST, LATER, OPTIMIZER = "first step", "later step", "optimizer"  # the parts of an update

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class StepSettings(TypedDict, total=False):
    """What `estimate_training_memory` and `fit_batch` take by name; see the former."""

    target_shape: Sequence[int] | None
    target_dtype: str
    make_target: Callable[[int], Any] | None
    precision: str
    accumulation: int
    averaged: bool
    foreach: bool | None
    channels_last: bool
    prepare: Callable[[nn.Module], object] | None


@dataclass(frozen=True)
class SimulatedStep:
    """What is computed: the arguments of `estimate_training_memory`."""

    make_loss: MakeLoss
    make_optimizer: MakeOptimizer
    input_shape: tuple[int, ...]
    target_shape: Sequence[int] | None = None
    target_dtype: str = "float32"
    make_target: Callable[[int], Any] | None = None
    precision: str = "float32"
    accumulation: int = 1
    averaged: bool = False
    foreach: bool | None = None
    channels_last: bool = False
    prepare: Callable[[nn.Module], object] | None = None

    def __post_init__(self) -> None:
        if len(self.input_shape) < 2 or min(self.input_shape) < 1:
            raise ConfigurationError(
                f"input_shape must be (B, C, ...), all at least 1, got {self.input_shape!r}"
            )
        if self.precision not in ("float32", *_DTYPES):
            known = ", ".join(("float32", *_DTYPES))
            raise ConfigurationError(f"precision must be one of {known}, got {self.precision!r}")
        if self.accumulation < 1:
            raise ConfigurationError(f"accumulation must be at least 1, got {self.accumulation!r}")

    def at(self, batch: int, accumulation: int) -> SimulatedStep:
        """Return the step with another batch."""
        return replace(self, input_shape=(batch, *self.input_shape[1:]), accumulation=accumulation)

    def batch(self) -> tuple[Tensor, Any]:
        """Return an input and its target, None where the loss takes none."""
        settings: StepSettings = {
            "target_shape": self.target_shape,
            "target_dtype": self.target_dtype,
            "make_target": self.make_target,
        }
        return batch_of(self.input_shape, settings)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return what surrounds forward and loss."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast("cpu", dtype=_DTYPES[self.precision])


def batch_of(
    input_shape: Sequence[int],
    settings: StepSettings,
    fill: Callable[..., Tensor] = torch.empty,
) -> tuple[Tensor, Any]:
    """Return an input and its target as `settings` describe it, None where there is none.

    Args:
        input_shape: `(B, C, ...)`.
        settings: `target_shape` and `target_dtype`, or `make_target`.
        fill: makes a tensor of a shape.

    Raises:
        ConfigurationError: torch has no such type.
    """
    size = input_shape[0]
    make_target, target_shape = settings.get("make_target"), settings.get("target_shape")
    if make_target is not None:
        return fill(tuple(input_shape)), make_target(size)
    if target_shape is None:
        return fill(tuple(input_shape)), None
    name = settings.get("target_dtype", "float32")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigurationError(
            f"target_dtype must be a type of torch such as int64, got {name!r}"
        )
    return fill(tuple(input_shape)), fill((size, *target_shape), dtype=dtype)


class SimulatedUpdates:
    """Compute updates of a network as `pipeline.training` does.

    Args:
        network: whose updates.
        step: what is computed of it.
        storages: what counts.

    Attributes:
        layers: activations by module that wait for the latest backward pass.
        notes: what was computed otherwise than asked for.
    """

    def __init__(self, network: nn.Module, step: SimulatedStep, storages: LiveStorages) -> None:
        self.network = network
        self.step = step
        self.storages = storages
        self.loss = step.make_loss()
        self.layers: Mapping[str, int] = {}
        self.notes: list[str] = []

    def run(self, optimizer: torch.optim.Optimizer) -> None:
        """Compute one update."""
        optimizer.zero_grad(set_to_none=True)
        batches = []  # a group's batches stay until its end, in case one is computed again
        for number in range(self.step.accumulation):
            self.storages.phase = LATER if number else FIRST
            output = None  # that of the batch before
            with self.storages.making("inputs"):
                batches.append(self.step.batch())
            output = self._forward_and_backward(*batches[-1])
        self.storages.phase = OPTIMIZER
        with self.storages.making("optimizer"):
            optimizer.step()
        del output  # until here, for metrics

    def _forward_and_backward(self, inputs: Tensor, target: Any) -> Any:
        with self.step.autocast():
            try:
                output = self.network(inputs)
            except (RuntimeError, ValueError) as error:
                raise ConfigurationError(
                    f"{type(self.network).__name__} cannot be computed without data "
                    f"({first_line(error)}), so its memory cannot be estimated; set batch_size "
                    "to a number"
                ) from error
            loss = self._loss_of(output, target)
        self.layers = self.storages.by_layer()
        loss.backward()
        return output

    def _loss_of(self, output: Any, target: Any) -> Tensor:
        arguments = (output,) if target is None else (output, target)
        if not self.notes:
            try:
                loss: Tensor = self.loss(*arguments).mean()
                return loss
            except (RuntimeError, TypeError, ValueError) as error:
                self.notes.append(
                    f"the loss cannot be computed without data ({first_line(error)}): a mean of "
                    "the output stands for it, and its own memory is missing"
                )
        parts = [part for part in tree_iter(output) if isinstance(part, Tensor)]
        return torch.stack([part.float().mean() for part in parts]).mean()


def use_channels_last(network: nn.Module) -> None:
    """Do what `network.to(memory_format=torch.channels_last)` does, which fails without data."""
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 4:
                moved = weight.detach().contiguous(memory_format=torch.channels_last)
                setattr(module, name, nn.Parameter(moved, weight.requires_grad))
