"""Training steps that see every image at one of several sizes, or at all of them at once.

`multiscale_objective` gives what `TrainingStep` takes as its objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor

from pipeline.classification.consistency import ConsistencyLoss, ConsistencyType, Target
from pipeline.classification.joint_scales import JointScales
from pipeline.classification.scale_schedule import (
    FixedScale,
    ProgressiveScales,
    RandomScales,
    ScaleSchedule,
)
from pipeline.classification.scales import checked_scale, checked_scales, resize
from pipeline.errors import ConfigurationError
from pipeline.training.objective import Part, plain_objective

__all__ = ["JointScales", "Mode", "OneScale", "multiscale_objective"]

Mode = Literal["single", "progressive", "random", "joint"]


def multiscale_objective(
    mode: Mode,
    scales: Sequence[int],
    evaluation_scale: int,
    max_epochs: int,
    seed: int,
    consistency_type: ConsistencyType = "kl",
    consistency_weight: float = 1.0,
    consistency_target: Target = "largest",
    memory_efficient: bool = True,
    epoch_shares: Sequence[float] | None = None,
) -> OneScale | JointScales:
    """Return what `TrainingStep` is to compute of each batch, its `objective`.

    Args:
        mode: `single`: at `evaluation_scale`; `progressive`: growing, see `ProgressiveScales`;
            `random`: one of `scales` for every update; `joint`: at all `scales` in every step.
        scales: sizes in pixels; not used by `single`.
        evaluation_scale: at which the network is validated and used.
        max_epochs: of the training; of use to `progressive` alone, as is `epoch_shares`.
        seed: the run's; of use to `random` alone.
        consistency_type: `kl`, `mse` or `cosine`; this and the next three are of use to `joint`
            alone.
        consistency_weight: of the consistency term; 0 leaves it out.
        consistency_target: what the scales follow, see `ConsistencyLoss`.
        memory_efficient: keep the activations of one scale at a time; the result is the same.
        epoch_shares: see `ProgressiveScales`.

    Raises:
        ConfigurationError: a setting is out of its range, or does not fit `mode`.
    """
    checked_scale("evaluation_scale", evaluation_scale)
    checked_scales("scales", scales)
    if mode == "joint":
        loss = ConsistencyLoss(consistency_type, consistency_target)
        return JointScales(scales, loss, consistency_weight, memory_efficient)
    if mode == "progressive":
        return OneScale(ProgressiveScales(scales, max_epochs, evaluation_scale, epoch_shares))
    if mode == "random":
        return OneScale(RandomScales(scales, seed))
    if mode == "single":
        return OneScale(FixedScale(evaluation_scale))
    raise ConfigurationError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")


class OneScale:
    """An objective: the plain loss, at the size that a schedule gives.

    Args:
        schedule: called with epoch and update.
    """

    def __init__(self, schedule: ScaleSchedule) -> None:
        self.schedule = schedule

    @property
    def facts(self) -> tuple[str, ...]:
        """What is trained at, a line for the head of the log."""
        return (f"scales: {self.schedule}",)

    def __call__(self, engine: Any, part: Part) -> tuple[Tensor, Tensor]:
        """Compute `part` at its size."""
        size = self.schedule(part.epoch, part.update)
        return plain_objective(engine, replace(part, inputs=resize(part.inputs, size)))
