"""Figures of training batches that need no second pass."""

from __future__ import annotations

from torch import Tensor

from pipeline.oct.losses import IGNORE_LABEL, split_label
from pipeline.training.epoch_metrics import BatchMetrics

__all__ = ["LayerBatchMetrics"]

RETINA = 1


class LayerBatchMetrics(BatchMetrics):
    """Put loss, and Dice and IoU of the retina, between ILM and BM, into the trainer's metrics."""

    def __init__(self) -> None:
        super().__init__(IGNORE_LABEL)

    def masks(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the retina is predicted and where it is, `(B, H, W)`.

        Args:
            logits: `(B, 3, H, W)`.
            label: `(B, 1, H, W)`, or with the rows below, as the losses take it.
        """
        classes, _ = split_label(label, logits)
        counted = classes != IGNORE_LABEL
        retina = logits[:, RETINA] >= logits.amax(dim=1)
        return retina & counted, (classes == RETINA) & counted
