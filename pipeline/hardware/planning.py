"""Plan a training run for the machine it meets, without changing its result.

Samples per update, learning rate and image size are what the configuration asks for on every
device. What is computed at once, in which precision, and how data are loaded follow the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.errors import CheckpointError, ConfigurationError
from pipeline.hardware.division import Auto, Division, Estimate, divide, effective_batch
from pipeline.hardware.machine_settings import (
    loader_settings,
    memory_limit,
    precision_for,
    threads_for,
)
from pipeline.hardware.tiers import DeviceProfile, device_profile, tier_for

if TYPE_CHECKING:
    import torch

__all__ = ["Plan", "apply_plan", "learning_rate_for", "plan"]

_AS_STORED = "as in the checkpoint"


_KEPT = (
    "device", "tier", "batch_size", "accumulation_steps", "effective_batch_size", "learning_rate",
    "precision", "memory_efficient", "processes", "estimated_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a run does on its machine, and why.

    Args:
        device: where it computes.
        batch_size: samples per step of the loader, in one process.
        accumulation_steps: loader steps per update.
        effective_batch_size: samples per update in all processes.
        learning_rate: for this effective batch.
        precision: of forward and loss.
        compile: the network is compiled.
        memory_efficient: blocks are computed again in the backward pass.
        num_workers: of the data loader.
        pin_memory, persistent_workers, prefetch_factor: of the data loader.
        threads: torch threads of each process; None leaves torch's choice.
        tf32: matrix products of float32 in the GPU's faster format.
        cudnn_benchmark: the GPU tries several kernels first.
        tier: name of the table of settings.
        estimated_bytes: peak of a step, None where it was not estimated.
        limit_bytes: what a step may take.
        processes: that share the effective batch.
        reasons: why, by the name of the item.
    """

    device: str
    batch_size: int
    accumulation_steps: int
    effective_batch_size: int
    learning_rate: float
    precision: str
    compile: bool
    memory_efficient: bool
    num_workers: int
    pin_memory: bool
    persistent_workers: bool
    prefetch_factor: int | None
    threads: int | None
    tf32: bool
    cudnn_benchmark: bool
    tier: str
    estimated_bytes: int | None
    limit_bytes: int | None
    processes: int = 1
    reasons: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for a checkpoint or YAML."""
        return {
            item.name: dict(self.reasons) if item.name == "reasons" else getattr(self, item.name)
            for item in fields(self)
        }

    def kept(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, and a resumed run goes on with.

        It is the same whenever the run is started on a machine: what the moment decides, such as
        the free memory, is not in it.
        """
        return {name: getattr(self, name) for name in _KEPT}

    def lines(self) -> tuple[str, ...]:
        """Return a short table for the log: what was decided, and why."""
        parts = [self.batch_size, self.accumulation_steps]
        product = " x ".join(map(str, parts + [self.processes] * (self.processes > 1)))
        shown = {
            "device": f"{self.device}, tier {self.tier}",
            "batch": f"{self.effective_batch_size} = {product}",
            "learning rate": f"{self.learning_rate:g}",
            "precision": self.precision,
            "blocks": f"computed again {_on(self.memory_efficient)}, compile {_on(self.compile)}",
            "loader": f"{self.num_workers} workers{', pinned memory' * self.pin_memory}",
            "threads": "torch's choice" if self.threads is None else str(self.threads),
            "kernels": f"TF32 {_on(self.tf32)}, cuDNN benchmark {_on(self.cudnn_benchmark)}",
        }
        return tuple(
            f"plan: {name} {value}" + (f": {self.reasons[name]}" if name in self.reasons else "")
            for name, value in shown.items()
        )


def plan(
    *,
    learning_rate: float,
    device: str | torch.device | DeviceProfile | None = None,
    batch_size: int | Auto = "auto",
    accumulation_steps: int | Auto = "auto",
    effective_batch_size: int | None = None,
    reference_batch_size: int | None = None,
    optimizer: object = "adam",
    precision: str = "auto",
    num_workers: int | Auto = "auto",
    pin_memory: bool | Auto = "auto",
    threads: int | None = None,
    memory_efficient: bool | Auto = "auto",
    compile: bool = False,  # noqa: A002 - what configurations call it
    profile: str = "auto",
    memory_share: float | None = None,
    memory_limit_bytes: int | None = None,
    processes: int = 1,
    estimate: Estimate | None = None,
    agree: Callable[[int], int] | None = None,
    stored: Mapping[str, Any] | None = None,
) -> Plan:
    """Return what a run does on this machine.

    Numbers and switches are kept as they are; `auto` is planned.

    Args:
        learning_rate: for `reference_batch_size` samples per update.
        device: as `choose_device` takes it, a torch device, or what one offers.
        batch_size: samples per step of the loader in one process; `auto` is the largest divisor of
            the effective batch that fits into memory.
        accumulation_steps: loader steps per update; `auto` follows from the other two.
        effective_batch_size: samples per update in all processes, whatever the device; not needed
            where batch size and accumulation are numbers, which then decide.
        reference_batch_size: the effective batch that the learning rate was chosen for; None where
            it is the one asked for.
        optimizer: its name, class or instance: SGD's rate follows the effective batch, that of
            others its square root.
        precision: `float32`, `bfloat16`, `float16`, or `auto`: by what the device is fast in.
        num_workers: of the data loader.
        pin_memory: of the data loader.
        threads: torch threads; None takes no more than this process may use.
        memory_efficient: compute blocks again in the backward pass; `auto` does where a sample does
            not fit otherwise, and on the smallest devices before a batch is divided.
        compile: compile the network; never chosen by itself.
        profile: `auto`, or the name of a tier whose settings to take.
        memory_share: of the free memory; None takes 0.8 of a GPU's and 0.5 of a CPU's.
        memory_limit_bytes: take at most this, whatever is free: it simulates a small memory.
        processes: that share each update.
        estimate: called with the precision and `memory_efficient`, only where `batch_size` is
            `auto`; None estimates nothing and computes the whole batch at once.
        agree: returns the smallest of a number over all processes, which must plan alike.
        stored: `Plan.kept` of the run that is continued, which decides what is `auto`; what only
            concerns the machine is planned anew on another device.

    Raises:
        ConfigurationError: settings out of range, or at odds with each other or the stored plan.
        CheckpointError: the stored plan is not one.
        ResourceError: not even one sample fits.

    Example:
        >>> made = plan(device="cpu", batch_size=4, effective_batch_size=16, learning_rate=0.001)
        >>> made.batch_size, made.accumulation_steps, made.learning_rate
        (4, 4, 0.001)
    """
    for count in (batch_size, accumulation_steps, effective_batch_size, reference_batch_size):
        _check_count(count)
    machine = device if isinstance(device, DeviceProfile) else device_profile(device)
    kept = {} if stored is None else _checked(stored)
    same = kept if kept.get("device") == machine.name else {}
    tier, why_tier = tier_for(_as_small_as(machine, memory_limit_bytes), profile)
    numeric, why_numeric = precision_for(machine, _kept(precision, kept, "precision"))
    limit, why_limit = memory_limit(machine, memory_share, memory_limit_bytes, processes)
    reference = reference_batch_size or kept.get("effective_batch_size")
    effective = effective_batch(
        batch_size, accumulation_steps, effective_batch_size, reference, processes
    )
    if kept:
        division = _continued(kept, batch_size, accumulation_steps, effective, processes)
        rate, why_rate = float(kept["learning_rate"]), _AS_STORED
        configured, _ = learning_rate_for(learning_rate, optimizer, effective, reference)
        if not math.isclose(rate, configured, rel_tol=1e-6):
            why_rate += f"; {configured:g} as configured is another run: resume: false begins it"
        why_numeric = _AS_STORED if precision == "auto" else why_numeric
    else:
        limit = agree(limit) if agree is not None and estimate is not None else limit
        memory = None if estimate is None else partial(estimate, numeric)
        division = divide(
            effective // processes, batch_size, accumulation_steps, memory,
            limit_bytes=limit, processes=processes, memory_efficient=memory_efficient,
            recompute_early=tier.recompute_early,
        )  # fmt: skip
        rate, why_rate = learning_rate_for(learning_rate, optimizer, effective, reference)
    loader, why_loader = loader_settings(
        machine, tier, _kept(num_workers, same, "num_workers"),
        _kept(pin_memory, same, "pin_memory"), processes,
    )  # fmt: skip
    used_threads, why_threads = threads_for(
        same.get("threads") if threads is None else threads, processes
    )
    asked = division.memory_efficient if memory_efficient == "auto" else memory_efficient
    return Plan(
        machine.name, division.batch_size, division.accumulation_steps, effective, rate,
        precision=numeric, compile=compile, memory_efficient=asked,
        **vars(loader), threads=used_threads,
        tf32=machine.kind == "cuda" and (machine.capability or (0, 0)) >= (8, 0),
        cudnn_benchmark=machine.kind == "cuda",
        tier=tier.name, estimated_bytes=division.estimated_bytes, limit_bytes=limit,
        processes=processes,
        reasons={
            "device": why_tier,
            "batch": division.reason(limit, why_limit),
            "learning rate": why_rate, "precision": why_numeric, "loader": why_loader,
            "threads": why_threads,
        },
    )  # fmt: skip


def learning_rate_for(
    learning_rate: float, optimizer: object, effective: int, reference: int | None
) -> tuple[float, str]:
    """Return the learning rate for `effective` samples per update, and why.

    Args:
        learning_rate: for `reference` samples per update.
        optimizer: its name, class or instance. SGD's rate is proportional to the batch; that of
            others, which divide by the gradient's size, to its square root.
        effective: samples per update.
        reference: None where the rate belongs to `effective` already.
    """
    if reference is None or effective == reference:
        return learning_rate, "the effective batch is that of the configuration"
    ratio = effective / reference
    if "sgd" in _name(optimizer).lower():
        return learning_rate * ratio, f"{learning_rate:g} x {effective} / {reference}"
    rate = learning_rate * math.sqrt(ratio)
    return rate, f"{learning_rate:g} x sqrt({effective} / {reference})"


def apply_plan(planned: Plan) -> None:
    """Set what a plan says about torch itself: TF32, cuDNN's benchmark and threads."""
    import torch

    if planned.threads is not None:
        torch.set_num_threads(planned.threads)
    torch.set_float32_matmul_precision("high" if planned.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = planned.tf32
    torch.backends.cudnn.benchmark = planned.cudnn_benchmark


def _check_count(count: object) -> None:
    if count is None or count == "auto":
        return
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigurationError(
            "batch_size, accumulation_steps, effective_batch_size and reference_batch_size must be "
            f"whole numbers of at least 1, or auto, got {count!r}"
        )


def _as_small_as(device: DeviceProfile, limit_bytes: int | None) -> DeviceProfile:
    """Return `device` as one with so little memory that its tier is that of a small one."""
    if limit_bytes is None or device.kind == "cpu":
        return device
    return replace(device, total_bytes=min(limit_bytes, device.total_bytes or limit_bytes))


def _kept(asked: Any, kept: Mapping[str, Any], name: str) -> Any:
    """Return what is asked for, and for `auto` what was kept, if anything."""
    return kept.get(name, asked) if asked == "auto" else asked


def _checked(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a stored plan once it is known to be one."""
    kinds = {
        "batch_size": int, "accumulation_steps": int, "effective_batch_size": int,
        "learning_rate": float, "processes": int, "memory_efficient": bool, "precision": str,
    }  # fmt: skip
    wrong = [name for name, kind in kinds.items() if not isinstance(stored.get(name), kind)]
    if wrong:
        raise CheckpointError(
            f"the plan stored in the checkpoint has no valid {', '.join(wrong)}; begin anew with "
            "resume: false"
        )
    return stored


def _continued(
    kept: Mapping[str, Any],
    batch_size: int | Auto,
    accumulation_steps: int | Auto,
    effective: int,
    processes: int,
) -> Division:
    """Return the division of a stored plan, each batch shared by as many processes as there are.

    Raises:
        ConfigurationError: what is asked for now is something else.
    """
    together = kept["batch_size"] * kept["processes"]
    before = (together, kept["accumulation_steps"], kept["effective_batch_size"])
    now = (
        together if batch_size == "auto" else batch_size * processes,
        before[1] if accumulation_steps == "auto" else accumulation_steps,
        effective,
    )
    if now != before or together % processes:
        raise ConfigurationError(
            "batch_size (of all processes), accumulation_steps and effective_batch_size are "
            f"{list(now)} in {processes} processes and were {list(before)} when the run was "
            "interrupted; set them back, or begin anew with resume: false"
        )
    return Division(
        together // processes, before[1], kept["memory_efficient"], kept.get("estimated_bytes"),
        _AS_STORED,
    )  # fmt: skip


def _name(optimizer: object) -> str:
    if isinstance(optimizer, str):
        return optimizer
    return (optimizer if isinstance(optimizer, type) else type(optimizer)).__name__


def _on(switch: bool) -> str:
    return "on" if switch else "off"
