"""The memory of a training step, known before it is run.

An update is computed with fake tensors, which have shapes and no data, while `LiveStorages` adds up
what is alive; the optimizer has its state from an update before. The result is the memory of
tensors in eager mode, exact on a CPU. A GPU adds its context, workspaces of cuDNN and cuBLAS, and
rounding by the allocator; compiling changes the peak.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from pipeline.errors import ConfigurationError, first_line
from pipeline.hardware.batch_memory import BatchMemory, highest
from pipeline.hardware.fake_tensors import without_data
from pipeline.hardware.simulated_step import (
    FIRST,
    OPTIMIZER,
    MakeLoss,
    MakeNetwork,
    MakeOptimizer,
    SimulatedStep,
    SimulatedUpdates,
    StepSettings,
    use_channels_last,
)
from pipeline.hardware.storages import CATEGORIES, LiveStorages

__all__ = ["MemoryEstimate", "estimate_training_memory", "fit_batch"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of a training step in bytes.

    Args:
        peak_bytes: the most that is alive at once.
        categories: what it is made of at that moment; the sum is `peak_bytes`.
        largest: the most that each category holds at any moment of a step.
        allocated_bytes: the peak on a CPU, with the copies that convolutions make inside.
        layers: activations that wait for the backward pass, by the module that made them, the
            largest first; the loss is called `loss`.
        notes: what a reader of the figures should know.
        timeline: part of the update and sum, whenever something was added.
    """

    peak_bytes: int
    categories: Mapping[str, int]
    largest: Mapping[str, int]
    allocated_bytes: int
    layers: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    timeline: tuple[tuple[str, int], ...] = field(default=(), repr=False)


def estimate_training_memory(
    make_network: MakeNetwork,
    make_loss: MakeLoss,
    make_optimizer: MakeOptimizer,
    input_shape: Sequence[int],
    **settings: Unpack[StepSettings],
) -> MemoryEstimate:
    """Return what a training step takes, without running it and without taking it.

    Everything is built anew by the callables, so that nothing of the caller's is touched; nor is
    any random state.

    Args:
        make_network: returns the network, on the CPU.
        make_loss: returns the loss, called with the output, and the target where there is one.
        make_optimizer: returns the optimizer of the parameters that it is given.
        input_shape: `(B, C, ...)`.
        **settings: `target_shape`: of one sample's target, and `target_dtype`, such as `int64`;
            `make_target`: returns a batch's target instead, given its size;
            `precision`: of forward and loss, `float32`, `bfloat16` or `float16`;
            `accumulation`: batches per update, whose inputs stay until then;
            `averaged`: a copy of the weights is kept, as for averaging them;
            `foreach`: how the optimizer goes over parameters, as it is by itself on a GPU (True)
            and on a CPU (False); None leaves the optimizer as it is made;
            `channels_last`: the network's weights are kept in this layout;
            `prepare`: changes the network in place, as `checkpoint_blocks` does.

    Raises:
        ConfigurationError: a setting is out of range, or the network or the optimizer needs data.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> estimate = estimate_training_memory(
        ...     partial(nn.Linear, 10, 10, bias=False),
        ...     lambda: torch.sum,
        ...     partial(torch.optim.SGD, lr=0.1),
        ...     (1, 10),
        ... )
        >>> estimate.largest["parameters"], estimate.largest["gradients"]
        (400, 400)
    """
    step = SimulatedStep(make_loss, make_optimizer, tuple(input_shape), **settings)
    with without_data():
        estimate = _Trained(make_network, step).measured(step)
    _log(estimate.notes)
    return estimate


def fit_batch(
    make_network: MakeNetwork,
    make_loss: MakeLoss,
    make_optimizer: MakeOptimizer,
    input_shape: Sequence[int],
    **settings: Unpack[StepSettings],
) -> BatchMemory:
    """Return how the memory of an update depends on the batch.

    The same operators run whatever the batch, so that two updates, of one and of two samples in a
    step, tell for every moment how much is alive with any number of them.

    Args:
        make_network: as in `estimate_training_memory`, as the rest.
        make_loss: returns the loss.
        make_optimizer: returns the optimizer.
        input_shape: `(B, C, ...)`; the batch is not looked at.
        **settings: without `accumulation`: any number of steps is covered.

    Raises:
        ConfigurationError: as in `estimate_training_memory`.
    """
    step = SimulatedStep(make_loss, make_optimizer, tuple(input_shape), **settings)
    with without_data():
        trained = _Trained(make_network, step.at(2, accumulation=1))
        two = trained.measured(step.at(2, accumulation=2))
        one = _measured_alone(trained, step)
        if one is not None and _phases(one) == _phases(two):
            fitted = _fitted(1, one, two)
        else:  # with one sample every layout is contiguous, and some operators take another way
            fitted = _fitted(2, two, trained.measured(step.at(3, accumulation=2)))
    _log(fitted.notes)
    return fitted


def _measured_alone(trained: _Trained, step: SimulatedStep) -> MemoryEstimate | None:
    """Return the memory of one sample, None where batch norm refuses a single value."""
    try:
        return trained.measured(step.at(1, accumulation=2))
    except ConfigurationError as error:
        logger.debug("one sample alone: %s", error)
        return None


def _fitted(small: int, one: MemoryEstimate, two: MemoryEstimate) -> BatchMemory:
    """Return the lines through the timelines of two steps of `small` samples and of one more."""
    if _phases(one) != _phases(two):
        each = two.peak_bytes - one.peak_bytes
        note = "the operators depend on the batch: the estimate is a line through two batches"
        return BatchMemory(((one.peak_bytes - small * each, each),), notes=(*one.notes, note))
    moments = [
        (phase, (low - small * (high - low), high - low))
        for (phase, low), (_, high) in zip(one.timeline, two.timeline, strict=True)
    ]
    # An update of one step has the first step and the optimizer, with one batch less held.
    held = one.largest["inputs"] // (2 * small)
    single = [line for phase, line in moments if phase == FIRST]
    single += [(base, each - held) for phase, (base, each) in moments if phase == OPTIMIZER]
    later = [line for phase, line in moments if phase != FIRST]
    return BatchMemory(highest(single), highest(later), held, one.notes)


def _log(notes: Sequence[str]) -> None:
    for note in notes:
        logger.info("memory estimate: %s", note)


def _phases(estimate: MemoryEstimate) -> list[str]:
    return [phase for phase, _ in estimate.timeline]


class _Trained:
    """A network and an optimizer that keeps its state, as they are after an update.

    Args:
        make_network: returns the network.
        step: of that update.
    """

    def __init__(self, make_network: MakeNetwork, step: SimulatedStep) -> None:
        try:
            self.network = make_network().train()
        except (RuntimeError, ValueError) as error:
            raise ConfigurationError(
                f"the network cannot be built without data ({first_line(error)}), so its memory "
                "cannot be estimated; set batch_size to a number"
            ) from error
        if step.channels_last:
            use_channels_last(self.network)
        if step.prepare is not None:
            step.prepare(self.network)
        self.optimizer = step.make_optimizer(self.network.parameters())
        if step.foreach is not None:
            for group in self.optimizer.param_groups:
                group["foreach"] = step.foreach
        SimulatedUpdates(self.network, step, LiveStorages()).run(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)

    def measured(self, step: SimulatedStep) -> MemoryEstimate:
        """Return the memory of another update."""
        storages = LiveStorages()
        storages.claim(self.network.parameters(), "parameters")
        storages.claim(self.network.buffers(), "buffers")
        storages.claim(_tensors(self.optimizer.state.values()), "optimizer")
        hooks = storages.claim_gradients(self.network) + storages.follow_layers(self.network)
        try:
            with storages:
                kept = _weights(self.network, storages) if step.averaged else []
                updates = SimulatedUpdates(self.network, step, storages)
                updates.run(self.optimizer)
                del kept
        finally:
            for hook in hooks:
                hook.remove()
            self.optimizer.zero_grad(set_to_none=True)
        layers = sorted(updates.layers.items(), key=lambda item: -item[1])
        return MemoryEstimate(
            storages.peak_bytes,
            {name: storages.at_peak[name] for name in CATEGORIES},
            {name: storages.largest[name] for name in CATEGORIES},
            storages.allocated_bytes,
            tuple((name, size) for name, size in layers if size),
            tuple(updates.notes),
            tuple(storages.timeline),
        )


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [part for part in tree_iter(list(values)) if isinstance(part, Tensor)]


def _weights(network: nn.Module, storages: LiveStorages) -> list[Tensor]:
    with storages.making("averaged"):
        return [tensor.detach().clone() for tensor in network.state_dict().values()]
