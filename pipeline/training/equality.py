"""What keeps a batch in pieces from giving the very gradient of the batch in one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.training.losses import BCELoss, FocalLoss

__all__ = ["equality_notes"]


def equality_notes(network: nn.Module, loss: Any) -> tuple[str, ...]:
    """Return why gradients depend on how a batch is divided, a line each; nothing where not.

    Accumulation, pieces after memory ran out and several processes all divide a batch. The result
    is that of the undivided batch where every sample is treated by itself: normalised alone, and
    with a loss that is the mean of the samples' losses.

    Args:
        network: the network that is trained.
        loss: its loss; one that is no module, or foreign and unmarked, is taken for a mean.
    """
    notes = []
    norms = {type(part).__name__ for part in network.modules() if isinstance(part, _BatchNorm)}
    if norms:
        notes.append(
            f"{', '.join(sorted(norms))} in {type(network).__name__} normalises over the samples "
            "that are computed together"
        )
    pooled = dict.fromkeys(_pooled(loss)) if isinstance(loss, nn.Module) else {}
    if pooled:
        notes.append(f"{', '.join(pooled)} pools over the samples that are computed together")
    return tuple(notes)


def _pooled(loss: nn.Module) -> Iterator[str]:
    """Yield the names of the terms of `loss` that are no mean over samples."""
    for part in loss.modules():
        name = type(part).__name__
        # MONAI's Dice family says so by `batch`, our soft clDice by `per_sample`.
        if getattr(part, "batch", None) is True or getattr(part, "per_sample", None) is False:
            yield name
        # The mean over the pixels that count, of which each sample has its own number.
        elif isinstance(part, BCELoss | FocalLoss) and part.ignore_label is not None:
            yield f"{name} with ignore_label"
        elif isinstance(part, nn.CrossEntropyLoss | nn.NLLLoss) and (
            part.weight is not None or part.ignore_index >= 0
        ):
            yield f"{name} with weight or ignore_index"
