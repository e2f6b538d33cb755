"""Plans a bundle's training for the machine, from the definitions in its configuration.

`pipeline.hardware` decides; this module tells it what the configuration builds. It stands beside
`running_config` because it reads definitions, and above `training` because it reads checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import CheckpointError
from pipeline.hardware.planning import Plan, plan
from pipeline.running_config import RunningConfig

if TYPE_CHECKING:
    import torch

    from pipeline.hardware.batch_memory import BatchMemory

__all__ = ["training_plan"]

logger = logging.getLogger(__name__)


def training_plan(
    config: RunningConfig,
    *,
    device: torch.device,
    output_dir: str,
    resume: bool | Literal["auto"],
    input_shape: Sequence[int],
    target_shape: Sequence[int],
    target_dtype: str = "float32",
    profile_memory: bool = False,
    estimate_activations: bool = True,
    detailed_memory: bool = False,
    profile_training_step: bool = False,
    **settings: Any,
) -> Plan:
    """Return the plan of a training run; one that is resumed keeps its own.

    Args:
        config: the running configuration; `network_def`, `loss` and `optimizer` in it are built
            without memory to estimate what a step takes.
        device: where the run computes.
        output_dir: the run's folder, whose last checkpoint holds the plan of a run to be resumed.
        resume: as `CheckpointHandler` takes it.
        input_shape: `(C, ...)` of one sample.
        target_shape: of its target, such as `(1, H, W)`; empty for a class number.
        target_dtype: torch's name of the target's type.
        profile_memory: tell in the log what a step takes.
        estimate_activations: also what the batch takes, and the largest that is safe.
        detailed_memory: also the layers that keep most.
        profile_training_step: also what a step really takes, on CUDA.
        settings: of `pipeline.hardware.planning.plan`.

    Raises:
        ConfigurationError, CheckpointError, ResourceError: as in `plan`.
    """
    step = _Step(config, device, (1, *input_shape), tuple(target_shape), target_dtype)
    made = plan(
        device=device,
        optimizer=step.optimizer_name(),
        estimate=step.memory,
        stored=_stored(Path(output_dir) / "checkpoints") if resume else None,
        **settings,
    )
    if profile_memory:
        step.log_profile(
            made,
            estimate_activations=estimate_activations,
            detailed_memory=detailed_memory,
            profile_training_step=profile_training_step,
        )
    return made


class _Step:
    """What a configuration computes in a step, built anew and without memory for each question."""

    def __init__(
        self,
        config: RunningConfig,
        device: torch.device,
        input_shape: tuple[int, ...],
        target_shape: tuple[int, ...],
        target_dtype: str,
    ) -> None:
        self.config = config
        self.device = device
        self.input_shape = input_shape
        self.target = {"target_shape": target_shape, "target_dtype": target_dtype}

    def optimizer_name(self) -> str:
        return str(self.config.raw["optimizer"]["_target_"])

    def memory(self, precision: str, memory_efficient: bool) -> BatchMemory:
        """Return how the memory of a step depends on the batch."""
        from pipeline.hardware.memory import fit_batch

        settings = self._settings(precision, memory_efficient)
        return fit_batch(*self._made(), self.input_shape, **settings)

    def log_profile(self, made: Plan, **shown: Any) -> None:
        """Tell what a step of the plan takes."""
        from pipeline.hardware.memory_table import log_memory_profile

        make_network, make_loss, make_optimizer = self._made()
        log_memory_profile(
            make_network,
            make_loss,
            make_optimizer,
            (made.batch_size, *self.input_shape[1:]),
            device=made.device,
            **shown,
            **self._settings(made.precision, made.memory_efficient),
        )

    def _made(self) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
        make_optimizer = self.config.maker("optimizer", leave_out=("params", "lr"))
        return self.config.maker("network_def"), self.config.maker("loss"), make_optimizer

    def _settings(self, precision: str, memory_efficient: bool) -> dict[str, Any]:
        from pipeline.training.block_checkpointing import checkpoint_blocks

        return {
            **self.target,
            "precision": precision,
            "averaged": "average" in self.config.raw,
            "foreach": self.device.type == "cuda",  # what torch's optimizers do there by themselves
            "channels_last": "channels_last" in str(self.config.raw.get("network")),
            "prepare": checkpoint_blocks if memory_efficient else None,
        }


def _stored(checkpoints: Path) -> Mapping[str, Any] | None:
    """Return the plan of the run that left `checkpoints`, None where there is none."""
    from pipeline.training.checkpoints import read_checkpoint

    for name in ("last.pt", "previous.pt"):
        if (checkpoints / name).exists():
            try:
                return read_checkpoint(checkpoints / name).get("plan")
            except CheckpointError as error:  # the CheckpointHandler says so, and what to do
                logger.debug("no plan from %s: %s", name, error)
    return None
