"""What a training step takes, as a table for the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Unpack

from pipeline.hardware.batch_memory import BatchMemory
from pipeline.hardware.machine_settings import memory_limit
from pipeline.hardware.measured_step import measured_lines
from pipeline.hardware.memory import MemoryEstimate, estimate_training_memory, fit_batch
from pipeline.hardware.simulated_step import MakeLoss, MakeNetwork, MakeOptimizer, StepSettings
from pipeline.hardware.tiers import DeviceProfile, device_profile

__all__ = ["log_memory_profile", "memory_table", "size_text"]

logger = logging.getLogger(__name__)

_LAYERS = 15


def log_memory_profile(
    make_network: MakeNetwork,
    make_loss: MakeLoss,
    make_optimizer: MakeOptimizer,
    input_shape: Sequence[int],
    *,
    device: str | DeviceProfile | None = None,
    estimate_activations: bool = True,
    detailed_memory: bool = False,
    profile_training_step: bool = False,
    **settings: Unpack[StepSettings],
) -> tuple[str, ...]:
    """Write to the log what a training step takes, and return the lines.

    Args:
        make_network: as in `estimate_training_memory`, as the next three.
        make_loss: returns the loss.
        make_optimizer: returns the optimizer.
        input_shape: `(B, C, ...)` of a step.
        device: where the run computes; its memory is what the figures are compared with.
        estimate_activations: also activations, the total and the largest batch; the rest depends
            on the network alone.
        detailed_memory: also the layers with the largest activations.
        profile_training_step: also figures measured on a GPU, stage by stage.
        **settings: as in `estimate_training_memory`.

    Raises:
        ConfigurationError: as in `estimate_training_memory`.
    """
    machine = device if isinstance(device, DeviceProfile) else device_profile(device)
    makers = make_network, make_loss, make_optimizer
    estimate = estimate_training_memory(*makers, input_shape, **settings)
    growth = fit_batch(*makers, input_shape, **settings) if estimate_activations else None
    lines = memory_table(estimate, machine, input_shape[0], growth, detailed=detailed_memory)
    if profile_training_step:
        lines += measured_lines(*makers, input_shape, machine, **settings)
    for line in lines:
        logger.info("%s", line)
    return lines


def memory_table(
    estimate: MemoryEstimate,
    device: DeviceProfile,
    batch: int,
    growth: BatchMemory | None = None,
    *,
    detailed: bool = False,
) -> tuple[str, ...]:
    """Return the table of an estimate.

    Args:
        estimate: of a step with `batch` samples.
        device: what its memory is compared with.
        batch: samples in a step.
        growth: how the memory depends on the batch; None leaves out activations and what follows
            from them.
        detailed: add the layers with the largest activations.
    """
    largest = estimate.largest
    network = largest["parameters"] + largest["buffers"]
    lines = [
        _device_line(device),
        f"network {size_text(network)}: parameters {size_text(largest['parameters'])}, buffers "
        f"{size_text(largest['buffers'])}",
        f"gradients {size_text(largest['gradients'])}",
        f"optimizer {size_text(largest['optimizer'])}",
    ]
    if largest["averaged"]:
        lines.append(f"averaged weights {size_text(largest['averaged'])}")
    if growth is not None:
        lines.append(f"activations {size_text(largest['activations'])} with a batch of {batch}")
        lines.append(_total_line(estimate, device))
        if device.kind == "cpu":
            copies = size_text(estimate.allocated_bytes)
            lines.append(f"with what convolutions copy inside on a CPU {copies}")
        lines.append(_batch_line(growth, device))
    if detailed:
        lines += _layer_lines(estimate)
    lines += [f"note: {note}" for note in estimate.notes]
    return tuple(f"memory: {line}" for line in lines)


def size_text(size: int) -> str:
    """Return bytes as a person reads them.

    Example:
        >>> size_text(6_120_000_000), size_text(640_000)
        ('6.12 GB', '0.6 MB')
    """
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"


def _device_line(device: DeviceProfile) -> str:
    shown = f"device {device.name} ({device.title})"
    if device.total_bytes is None or device.free_bytes is None:
        return f"{shown}: its memory cannot be read"
    used = max(device.total_bytes - device.free_bytes, 0)
    return (
        f"{shown}: {size_text(device.total_bytes)} in all, {size_text(used)} used or not ours, "
        f"{size_text(device.free_bytes)} free"
    )


def _total_line(estimate: MemoryEstimate, device: DeviceProfile) -> str:
    """Return the peak and what it is made of: not everything is at its largest at once."""
    total = device.total_bytes
    share = f", {estimate.peak_bytes / total:.1%} of the device" if total else ""
    held = sorted(estimate.categories.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in held if size)
    return (
        f"total at the peak {size_text(estimate.peak_bytes)}{share} "
        f"(tensors in eager mode: {parts})"
    )


def _batch_line(growth: BatchMemory, device: DeviceProfile) -> str:
    limit, why = memory_limit(device, None, None, 1)
    each = growth.at(2) - growth.at(1)
    return (
        f"largest safe batch {growth.largest_batch(limit)}: {size_text(limit)} ({why}), "
        f"{size_text(growth.at(1))} with one sample and {size_text(each)} more with a second"
    )


def _layer_lines(estimate: MemoryEstimate) -> list[str]:
    together = sum(size for _, size in estimate.layers)
    shown = estimate.layers[:_LAYERS]
    head = f"{len(shown)} of {len(estimate.layers)} layers, by what they keep for the backward pass"
    return [head] + [
        f"  {name:<40} {size_text(size):>10} {size / together:6.1%}" for name, size in shown
    ]
