"""How an effective batch is divided into what the memory holds at a time.

The effective batch, which the learning rate belongs to, stays as asked for; the memory decides only
how many samples of it are computed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from pipeline.errors import ConfigurationError, ResourceError
from pipeline.hardware.batch_memory import BatchMemory

__all__ = ["Auto", "Division", "Estimate", "divide", "effective_batch"]

Auto = Literal["auto"]
Estimate = Callable[[str, bool], BatchMemory]  # called with the precision and memory_efficient


@dataclass(frozen=True)
class Division:
    """One way to divide a batch.

    Args:
        batch_size: samples computed at once in one process.
        accumulation_steps: such batches per update.
        memory_efficient: blocks are computed again in the backward pass.
        estimated_bytes: peak of a step, None where nothing was estimated.
        note: where it comes from, if it was not planned now.
    """

    batch_size: int
    accumulation_steps: int
    memory_efficient: bool
    estimated_bytes: int | None
    note: str = ""

    def reason(self, limit_bytes: int, limit_note: str) -> str:
        """Return why, for the log: what a step is estimated to take of what it may."""
        if self.estimated_bytes is None:
            return self.note or "as asked, not estimated"
        needed, limit = self.estimated_bytes / 1e9, limit_bytes / 1e9
        text = f"estimated {needed:.2f} GB of {limit:.2f} GB ({limit_note})"
        if self.memory_efficient:
            text += ", with blocks computed again"
        return f"{self.note}, {text}" if self.note else text


def effective_batch(
    batch_size: int | Auto,
    accumulation_steps: int | Auto,
    asked: int | None,
    reference: int | None,
    processes: int,
) -> int:
    """Return the samples per update in all processes.

    Batch size and accumulation that are both numbers decide it; else it is what is asked for, else
    what the batch size alone gives, else the reference batch.

    Raises:
        ConfigurationError: nothing fixes it, or the processes cannot share it evenly.
    """
    if batch_size != "auto" and accumulation_steps != "auto":
        return batch_size * accumulation_steps * processes
    if asked is None and batch_size != "auto":
        return batch_size * processes
    effective = asked if asked is not None else reference
    if effective is None:
        raise ConfigurationError(
            "batch_size is auto and effective_batch_size is not set: set the samples per update, "
            "such as effective_batch_size: 32"
        )
    if effective % processes:
        raise ConfigurationError(
            f"effective_batch_size {effective} cannot be shared evenly by {processes} processes; "
            f"set a multiple of {processes}"
        )
    return effective


def divide(
    share: int,
    batch_size: int | Auto,
    steps: int | Auto,
    estimate: Callable[[bool], BatchMemory] | None,
    *,
    limit_bytes: int,
    processes: int = 1,
    memory_efficient: bool | Auto = "auto",
    recompute_early: bool = False,
) -> Division:
    """Return the division of `share` with the largest batch that fits.

    Args:
        share: samples per update in one process.
        batch_size: a number stays as it is, and nothing is estimated.
        steps: accumulation steps; a number stays as it is.
        estimate: gives the memory of a step without (False) and with recomputed blocks (True);
            None takes the largest batch whatever it needs.
        limit_bytes: what a step may take.
        processes: for messages.
        memory_efficient: recompute blocks or not; `auto` does so where a sample does not fit
            otherwise.
        recompute_early: `auto` also does so where it allows a larger batch.

    Raises:
        ConfigurationError: batch size or steps do not divide the share.
        ResourceError: nothing fits.
    """
    for name, number in (("batch_size", batch_size), ("accumulation_steps", steps)):
        if number != "auto" and share % number:
            raise ConfigurationError(
                f"{name} {number} does not divide effective_batch_size {share * processes}"
                f"{_over(processes)}; set one of {', '.join(map(str, _divisors(share)))} or auto, "
                "or both batch_size and accumulation_steps, whose product counts then"
            )
    if batch_size != "auto" or estimate is None:
        largest = share if steps == "auto" else share // steps
        size = largest if batch_size == "auto" else batch_size
        return Division(size, share // size, memory_efficient is True, None)
    sizes = _divisors(share) if steps == "auto" else [share // steps]
    return _largest_fitting(share, sizes, estimate, limit_bytes, memory_efficient, recompute_early)


def _largest_fitting(
    share: int,
    sizes: Sequence[int],
    estimate: Callable[[bool], BatchMemory],
    limit_bytes: int,
    memory_efficient: bool | Auto,
    recompute_early: bool,
) -> Division:
    best: Division | None = None
    for efficient in (False, True) if memory_efficient == "auto" else (memory_efficient,):
        memory = estimate(efficient)
        fitting = [size for size in sizes if memory.at(size, share // size) <= limit_bytes]
        if fitting and (best is None or fitting[-1] > best.batch_size):
            size = fitting[-1]
            best = Division(size, share // size, efficient, memory.at(size, share // size))
        if best is not None and (not recompute_early or best.batch_size == sizes[-1]):
            return best
    return best or _refuse(sizes[0], memory.at(sizes[0], share // sizes[0]), limit_bytes, efficient)


def _refuse(size: int, needed: int, limit: int, efficient: bool) -> NoReturn:
    what = "one sample" if size == 1 else f"a batch of {size}"
    recompute = "" if efficient else "memory_efficient: true, "
    steps = "" if size == 1 else "accumulation_steps: auto, "
    raise ResourceError(
        f"a training step with {what} needs an estimated {needed / 1e9:.2f} GB and may take "
        f"{limit / 1e9:.2f} GB; set {steps}{recompute}a smaller image or patch, a smaller network, "
        "precision: bfloat16, or use a device with more memory"
    )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _over(processes: int) -> str:
    return f" over {processes} processes" if processes > 1 else ""
