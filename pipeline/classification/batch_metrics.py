"""Figures of training batches that need no second pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.classification.losses import two_class_logits
from pipeline.training.epoch_metrics import BatchMetrics

__all__ = ["ClassBatchMetrics"]


class ClassBatchMetrics(BatchMetrics):
    """Put `train_loss` and `train_accuracy` of an epoch into the trainer's metrics.

    Both are means over the samples as they were augmented, so a smaller last batch counts less.
    """

    def share(self, items: Sequence[Mapping[str, Any]]) -> int:
        """Return the number of samples.

        Args:
            items: the trainer's output, one dictionary of the batch or, decollated, of each sample.
        """
        return sum(len(_batch(item["pred"])) for item in items)

    def count(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return how many samples are right and how many there are, `(3,)`, the last one 0.

        Args:
            logits: `(B, K)`, `(B, 1)` for two classes, or of one sample without the batch.
            label: class numbers `(B,)` or `(B, 1)`.
        """
        scores = two_class_logits(_batch(logits.detach()))
        truth = torch.as_tensor(label, device=scores.device).flatten()
        right = (scores.argmax(dim=1) == truth).sum()
        return torch.tensor([float(right), float(len(scores)), 0.0], dtype=torch.float64)

    def figures(self, counts: Sequence[float]) -> dict[str, float]:
        """Return the accuracy, of the sums over the epoch."""
        right, samples, _ = counts
        return {"train_accuracy": right / max(samples, 1)}


def _batch(logits: Tensor) -> Tensor:
    """Return `(K,)` or `(B, K)` as `(B, K)`."""
    return logits.as_subclass(Tensor).reshape(-1, logits.shape[-1])
