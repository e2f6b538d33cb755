"""At which size the network trains when: always the same, growing, or drawn for every update.

A schedule is a function of epoch and update alone, so that a resumed run sees the sizes that the
uninterrupted one would have seen, and so do several processes and a batch that is computed again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Protocol

from pipeline.classification.scales import checked_scale, checked_scales
from pipeline.errors import ConfigurationError
from pipeline.training.ordering import derived_seed

__all__ = ["FixedScale", "ProgressiveScales", "RandomScales", "ScaleSchedule"]


class ScaleSchedule(Protocol):
    """The size of an update."""

    def __call__(self, epoch: int, update: int) -> int:
        """Return the size in pixels in `epoch`, from 1, for `update` of it, from 0."""
        ...

    def __str__(self) -> str:
        """Return the schedule in a few words, for a log."""
        ...


class FixedScale:
    """The same size throughout."""

    def __init__(self, size_px: int) -> None:
        self.size_px = checked_scale("evaluation_scale", size_px)

    def __call__(self, epoch: int, update: int) -> int:
        """Return the size in pixels."""
        return self.size_px

    def __str__(self) -> str:
        return f"{self.size_px} px"


class ProgressiveScales:
    """Sizes that grow from phase to phase; the last phase has the size of evaluation.

    Args:
        sizes_px: of the phases, in any order; the largest must be `evaluation_scale`, to whose
            size the network has to get used at the end.
        max_epochs: epochs of the whole training. In fewer epochs than phases some are left out,
            but never the last.
        evaluation_scale: the size in pixels at which the network is validated.
        epoch_shares: how long the phases take in relation to each other, the smallest size first;
            None for equal shares.

    Raises:
        ConfigurationError: the largest size is not `evaluation_scale`, or the shares are not one
            positive number per size.
    """

    def __init__(
        self,
        sizes_px: Sequence[int],
        max_epochs: int,
        evaluation_scale: int,
        epoch_shares: Sequence[float] | None = None,
    ) -> None:
        self.sizes_px = checked_scales("scales", sizes_px)[::-1]
        if self.sizes_px[-1] != evaluation_scale:
            raise ConfigurationError(
                f"mode progressive ends at the largest of scales {list(self.sizes_px)}, which must "
                f"be evaluation_scale, got {evaluation_scale!r}; change one of them"
            )
        shares = _shares(epoch_shares, len(self.sizes_px))
        # The last epoch belongs to the last phase, whatever the rounding.
        ends = [min(round(end * max_epochs), max_epochs - 1) for end in accumulate(shares[:-1])]
        self.ends = (*ends, max_epochs)

    def __call__(self, epoch: int, update: int) -> int:
        """Return the size in pixels of the phase that `epoch` belongs to."""
        phases = zip(self.ends, self.sizes_px, strict=True)
        return next((size for end, size in phases if epoch <= end), self.sizes_px[-1])

    def __str__(self) -> str:
        spans = zip(self.sizes_px, pairwise((0, *self.ends)), strict=True)
        return ", ".join(
            f"{size} px in epochs {before + 1} to {end}" for size, (before, end) in spans
            if end > before
        )  # fmt: skip


class RandomScales:
    """A size drawn for every update of the weights, the same in all its batches and processes.

    Args:
        sizes_px: of which each is as likely.
        seed: the run's seed.
    """

    def __init__(self, sizes_px: Sequence[int], seed: int) -> None:
        self.sizes_px = checked_scales("scales", sizes_px)
        self.seed = seed

    def __call__(self, epoch: int, update: int) -> int:
        """Return the size in pixels."""
        return random.Random(derived_seed(self.seed, epoch, update, "scale")).choice(self.sizes_px)

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.sizes_px))} px for every update"


def _shares(given: Sequence[float] | None, phases: int) -> list[float]:
    """Return the phases' shares of the epochs, which sum to 1."""
    shares = [1.0] * phases if given is None else list(given)
    fine = [isinstance(share, int | float) and 0 < share < math.inf for share in shares]
    if len(shares) != phases or not all(fine):
        raise ConfigurationError(
            f"epoch_shares must be {phases} positive numbers, one per size from small to large, "
            f"got {given!r}"
        )
    return [share / sum(shares) for share in shares]
