"""One seed for everything random in a run."""

from __future__ import annotations

import logging

import monai.utils
import torch

__all__ = ["seed_everything"]

logger = logging.getLogger(__name__)


def seed_everything(seed: int, threads: int | None = None) -> None:
    """Seed Python, numpy, torch and MONAI's transforms, before anything that draws is built.

    Args:
        seed: the run's seed.
        threads: torch threads of this process; None leaves torch's choice.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    monai.utils.set_determinism(seed=seed)
    # Full determinism costs speed on a GPU and some of its kernels have none: what is promised
    # there is the same order and the same steps.
    torch.backends.cudnn.benchmark = torch.cuda.is_available()
    logger.info("seed %d, %d torch threads", seed, torch.get_num_threads())
