"""Measure a training step on a GPU: memory and time of forward, backward and optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pipeline.hardware.simulated_step import (
    MakeLoss,
    MakeNetwork,
    MakeOptimizer,
    StepSettings,
    batch_of,
    use_channels_last,
)
from pipeline.hardware.tiers import DeviceProfile

__all__ = ["measured_lines"]

_WARM_UP = 2  # steps before the one that is measured: kernels are chosen, optimizer state is made
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def measured_lines(
    make_network: MakeNetwork,
    make_loss: MakeLoss,
    make_optimizer: MakeOptimizer,
    input_shape: Sequence[int],
    device: DeviceProfile,
    **settings: Unpack[StepSettings],
) -> tuple[str, ...]:
    """Return what each stage of a step takes on a GPU, a line each.

    A network of its own is trained for a few steps on empty images and then dropped; random states
    are left as they were.

    Args:
        make_network: as in `estimate_training_memory`, as the next three.
        make_loss: returns the loss.
        make_optimizer: returns the optimizer.
        input_shape: `(B, C, ...)` of a step.
        device: nothing is measured on another than CUDA.
        **settings: as in `estimate_training_memory`.
    """
    if device.kind != "cuda":
        return (f"memory: a measured step needs CUDA, and the device is {device.name}",)
    where = torch.device(device.name)
    with torch.random.fork_rng([where]):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(where)
        step = _Step(make_network, make_loss, make_optimizer, input_shape, where, settings)
        for _ in range(_WARM_UP):
            step.run(lambda name, run: run())
        lines: list[str] = []

        def measured(name: str, run: Callable[[], Any]) -> None:
            torch.cuda.synchronize(where)
            torch.cuda.reset_peak_memory_stats(where)
            start = time.perf_counter()
            run()
            torch.cuda.synchronize(where)
            seconds = time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated(where) - before
            lines.append(f"memory: measured {name}: {peak / 1e9:.3f} GB, {seconds * 1e3:.1f} ms")

        step.run(measured)
        reserved = torch.cuda.memory_reserved(where)
        del step
    torch.cuda.empty_cache()
    return (*lines, f"memory: measured reserve of the allocator: {reserved / 1e9:.3f} GB")


class _Step:
    """A training step in three stages."""

    def __init__(
        self,
        make_network: MakeNetwork,
        make_loss: MakeLoss,
        make_optimizer: MakeOptimizer,
        input_shape: Sequence[int],
        device: torch.device,
        settings: StepSettings,
    ) -> None:
        network = make_network().to(device).train()
        if settings.get("channels_last"):
            use_channels_last(network)
        prepare = settings.get("prepare")
        if prepare is not None:
            prepare(network)
        self.network = network
        self.loss = make_loss()
        if isinstance(self.loss, torch.nn.Module):
            self.loss = self.loss.to(device)
        self.optimizer = make_optimizer(network.parameters())
        batch = batch_of(input_shape, settings, torch.zeros)
        self.inputs, self.target = tree_map(lambda part: _moved(part, device), batch)
        dtype = _DTYPES.get(settings.get("precision", "float32"))
        self.autocast = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
        self.value: Tensor

    def run(self, stage: Callable[[str, Callable[[], Any]], Any]) -> None:
        """Compute a step, each of its stages by `stage`."""
        self.optimizer.zero_grad(set_to_none=True)
        stage("forward", self._forward)
        stage("backward", lambda: self.value.backward())
        del self.value
        stage("optimizer", self.optimizer.step)

    def _forward(self) -> None:
        arguments = () if self.target is None else (self.target,)
        with self.autocast:
            self.value = self.loss(self.network(self.inputs), *arguments).mean()


def _moved(part: Any, device: torch.device) -> Any:
    return part.to(device) if isinstance(part, Tensor) else part
