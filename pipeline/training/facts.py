"""What a training run is about to do, in lines for the head of its log."""

from __future__ import annotations

from collections.abc import Sized

from torch import nn

__all__ = ["training_facts"]


def training_facts(
    network: nn.Module,
    loader: Sized,
    *,
    max_epochs: int,
    batch_size: int,
    accumulation_steps: int,
    learning_rate: float,
) -> tuple[str, ...]:
    """Return the network's size, the plan and the schedule, a line each.

    Args:
        network: the network that is trained.
        loader: its length is the number of steps in an epoch.
        max_epochs: epochs unless training stops early.
        batch_size: samples per step of the loader.
        accumulation_steps: steps per update of the weights.
        learning_rate: the schedule's largest.
    """
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    kept = f", {frozen:,} frozen" if frozen else ""
    return (
        f"network {type(network).__name__}: {trained:,} parameters{kept}",
        f"plan: {batch_size} samples per step x {accumulation_steps} steps per update = "
        f"effective batch {batch_size * accumulation_steps}, learning rate {learning_rate:g}",
        f"schedule: {len(loader)} steps per epoch, {max_epochs} epochs at most",
    )
