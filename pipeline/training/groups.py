"""Where a step of the loader stands in the training: its epoch and its update of the weights."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Place", "place_in_group"]


@dataclass(frozen=True)
class Place:
    """Where a step stands among those that make one update.

    Attributes:
        first, last: whether it begins, and ends, its group.
        samples: of the group, in all processes.
        filler: the epoch's last batch has no sample left for this process.
        epoch: from 1.
        update: of the epoch, from 0; the same for all steps of the group.
    """

    first: bool
    last: bool
    samples: int
    filler: bool
    epoch: int
    update: int


def place_in_group(
    iteration: int, epoch_length: int, accumulation_steps: int, step: int, samples: int, rank: int
) -> Place:
    """Return where a step stands; it follows from the arguments alone, in a resumed run too.

    Args:
        iteration: of the training, from 1.
        epoch_length: iterations in an epoch.
        accumulation_steps: iterations per update; an epoch's last group may be shorter.
        step: samples per iteration in all processes, but for an epoch's last.
        samples: in an epoch, in all processes.
        rank: number of this process.

    Example:
        >>> place_in_group(8, 5, accumulation_steps=2, step=4, samples=18, rank=0)
        Place(first=True, last=False, samples=8, filler=False, epoch=2, update=1)
    """
    epoch, here = divmod(iteration - 1, epoch_length)
    update, within = divmod(here, accumulation_steps)
    start = here - within
    end = min(start + accumulation_steps, epoch_length)
    return Place(
        first=within == 0,
        last=here == end - 1,
        samples=min(end * step, samples) - start * step,
        filler=samples - here * step <= rank,
        epoch=epoch + 1,
        update=update,
    )
