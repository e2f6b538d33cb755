"""One seed for everything random in a run."""

from __future__ import annotations

import logging

import monai.utils
import torch

from pipeline.errors import ConfigurationError

__all__ = ["seed_everything"]

logger = logging.getLogger(__name__)


def seed_everything(seed: int, threads: int | None = None) -> None:
    """Seed Python, numpy and torch, before anything that draws is built.

    MONAI's random transforms follow through its DataLoader, which seeds them from torch's state
    when it is made; a transform that is called without a loader has a state of its own.

    Args:
        seed: the run's seed.
        threads: torch threads of this process; None leaves torch's choice.
    """
    if threads is not None:
        if threads < 1:
            raise ConfigurationError(f"threads must be null or at least 1, got {threads!r}")
        torch.set_num_threads(threads)
    monai.utils.set_determinism(seed=seed)
    # Full determinism costs speed on a GPU and some of its kernels have none: what is promised
    # there is the same order and the same steps.
    torch.backends.cudnn.benchmark = torch.cuda.is_available()
    logger.info("seed %d, %d torch threads", seed, torch.get_num_threads())
