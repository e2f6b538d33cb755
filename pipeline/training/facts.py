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
) -> tuple[str, ...]:
    """Return the network's size and the schedule, a line each.

    Args:
        network: the network that is trained.
        loader: its length is the number of steps in an epoch.
        max_epochs: epochs unless training stops early.
    """
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    kept = f", {frozen:,} frozen" if frozen else ""
    return (
        f"network {type(network).__name__}: {trained:,} parameters{kept}",
        f"schedule: {len(loader)} steps per epoch, {max_epochs} epochs at most",
    )
