"""What follows from the device alone: precision, loader, threads, how much memory may be taken."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from pipeline.errors import ConfigurationError
from pipeline.hardware.division import Auto
from pipeline.hardware.processors import usable_processors
from pipeline.hardware.tiers import DeviceProfile, Tier

__all__ = ["LoaderSettings", "loader_settings", "memory_limit", "precision_for", "threads_for"]

PRECISIONS = ("float32", "bfloat16", "float16")
GPU_SHARE, CPU_SHARE = 0.8, 0.5  # of the free memory; the rest is for workspaces and fragments
ASSUMED_FREE_BYTES = 2 * 10**9  # where a device does not tell

# Turing without tensor cores, where half precision is no faster and is known to give NaN
_NO_TENSOR_CORES = re.compile(r"GTX 16\d\d|MX[45]50|\bT(400|500|550|600|1000|1200)\b")


@dataclass(frozen=True)
class LoaderSettings:
    """Settings of torch's DataLoader.

    Args:
        num_workers: processes that prepare batches.
        pin_memory: batches lie in memory that a GPU copies from at once.
        persistent_workers: workers stay from one epoch to the next.
        prefetch_factor: batches that each worker holds ready; None without workers.
    """

    num_workers: int
    pin_memory: bool
    persistent_workers: bool
    prefetch_factor: int | None


def precision_for(device: DeviceProfile, asked: str) -> tuple[str, str]:
    """Return the precision of forward and loss, and why.

    Raises:
        ConfigurationError: there is no precision of this name.
    """
    if asked != "auto":
        if asked not in PRECISIONS:
            raise ConfigurationError(
                f"precision must be auto or one of {', '.join(PRECISIONS)}, got {asked!r}"
            )
        return asked, "as asked"
    if device.kind != "cuda" or device.capability is None:
        return "float32", f"the default on {device.kind}"
    reason = "compute capability {}.{}".format(*device.capability)
    if device.capability >= (8, 0):
        return "bfloat16", reason
    if device.capability >= (7, 0) and not _NO_TENSOR_CORES.search(device.title):
        return "float16", reason
    return "float32", f"{reason}, no tensor cores"


def memory_limit(
    device: DeviceProfile, share: float | None, limit_bytes: int | None, processes: int
) -> tuple[int, str]:
    """Return the bytes that a step may take in one process, and where the number comes from.

    Args:
        device: what it offers; processes on one CPU share its memory.
        share: of the free memory; None takes 0.8 of a GPU and 0.5 of a CPU.
        limit_bytes: this many instead, which simulates a small memory.
        processes: of the run.

    Raises:
        ConfigurationError: the share is not above 0 and at most 1, or the limit not positive.
    """
    if limit_bytes is not None:
        if limit_bytes < 1:
            raise ConfigurationError(f"memory_limit_bytes must be positive, got {limit_bytes!r}")
        return int(limit_bytes), "memory_limit_bytes"
    on_cpu = device.kind == "cpu"
    part = (CPU_SHARE if on_cpu else GPU_SHARE) if share is None else share
    if not 0 < part <= 1:
        raise ConfigurationError(f"memory_share must be above 0 and at most 1, got {share!r}")
    free, told = device.free_bytes, "free"
    if free is None:
        free, told = ASSUMED_FREE_BYTES, "assumed, as the free memory cannot be read"
    sharing = processes if on_cpu else 1
    by = f", by {sharing} processes" if sharing > 1 else ""
    return int(free * part / sharing), f"{part:.0%} of {free / 1e9:.1f} GB {told}{by}"


def loader_settings(
    device: DeviceProfile,
    tier: Tier,
    num_workers: int | Auto,
    pin_memory: bool | Auto,
    processes: int,
) -> tuple[LoaderSettings, str]:
    """Return the loader's settings, and why.

    Raises:
        ConfigurationError: a negative number of workers.
    """
    if num_workers == "auto":
        cores = max(usable_processors() // processes, 1)
        workers = 0 if cores <= 2 else min(cores - 1, tier.most_workers)
        reason = f"{cores} processors" + (" for each process" if processes > 1 else "")
    else:
        workers, reason = num_workers, "as asked"
        if workers < 0:
            raise ConfigurationError(f"num_workers must be auto or at least 0, got {workers!r}")
    pinned = device.kind == "cuda" if pin_memory == "auto" else pin_memory
    prefetch = tier.prefetch_factor if workers else None
    return LoaderSettings(workers, pinned, workers > 0, prefetch), reason


def threads_for(asked: int | None, processes: int) -> tuple[int | None, str]:
    """Return the torch threads of each process, None for torch's choice, and why.

    torch looks at the machine's processors and at `OMP_NUM_THREADS`, not at a container's share,
    nor at the processes beside it.

    Raises:
        ConfigurationError: less than one thread.
    """
    if asked is not None:
        if asked < 1:
            raise ConfigurationError(f"threads must be null or at least 1, got {asked!r}")
        return asked, "as asked"
    cores = max(usable_processors() // processes, 1)
    if "OMP_NUM_THREADS" in os.environ:
        return None, "OMP_NUM_THREADS is set"
    if cores >= (os.cpu_count() or 1):
        return None, "every processor is ours"
    return cores, f"{cores} processors" + (" for each process" if processes > 1 else "")
