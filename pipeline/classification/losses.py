"""Cross entropy for classifiers of `K` logits, or of one logit for two classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigurationError

__all__ = ["ClassificationLoss", "balanced_weights", "two_class_logits"]


class ClassificationLoss(nn.Module):
    """Cross entropy, with label smoothing, class weights and logit adjustment where asked for.

    One logit is the log-odds of the second of two classes: its loss is that of the logits `(0, z)`,
    which without further settings is `BCEWithLogitsLoss`.

    Logit adjustment adds `logit_adjustment * log(prior)` to the logits in the loss alone (Menon et
    al. 2021, arXiv 2007.07314). The network then learns what its classes look like and leaves out
    how frequent they are, so that at 1.0 rare classes are found as readily as frequent ones; its
    probabilities are those of a set with all classes equally frequent.

    Args:
        label_smoothing: share of the truth that is spread over all classes, in [0, 1).
        class_weights: what each class counts, such as `balanced_weights` gives; None: all the same.
            The loss is the weighted mean over the batch.
        logit_adjustment: 0 is none, 1 balances the classes.
        class_counts: training samples of each class; needed by `logit_adjustment`.

    Raises:
        ConfigurationError: a setting is out of its range, or there are no counts to adjust by.
    """

    class_weights: Tensor | None
    adjustment: Tensor | None

    def __init__(
        self,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        logit_adjustment: float = 0.0,
        class_counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ConfigurationError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
        self.label_smoothing = float(label_smoothing)
        self.per_sample = class_weights is None  # a weighted mean depends on who is in the batch
        # No part of the state: a loss has none, and a checkpoint need not know of it.
        self.register_buffer("class_weights", _weights(class_weights), persistent=False)
        adjustment = _adjustment(float(logit_adjustment), class_counts)
        self.register_buffer("adjustment", adjustment, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            logits: `(B, K)`, or `(B, 1)` for two classes; half precision becomes single.
            target: class numbers `(B,)` or `(B, 1)`, any integer type.

        Raises:
            ConfigurationError: shapes or types are others, or the settings are of another number
                of classes.
        """
        logits, target = logits.as_subclass(Tensor), target.as_subclass(Tensor)
        if target.ndim == 2 and target.shape[1] == 1:
            target = target[:, 0]
        if logits.ndim != 2 or target.shape != logits.shape[:1] or target.is_floating_point():
            raise ConfigurationError(
                f"logits {tuple(logits.shape)} and target {tuple(target.shape)} of {target.dtype}; "
                "expected (B, K) and class numbers (B,) or (B, 1)"
            )
        scores = two_class_logits(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        weights = self._fitting("class_weights", scores)
        adjustment = self._fitting("adjustment", scores)
        if adjustment is not None:
            scores = scores + adjustment
        return functional.cross_entropy(
            scores, target.long(), weights, label_smoothing=self.label_smoothing
        )

    def _fitting(self, name: str, scores: Tensor) -> Tensor | None:
        """Return a buffer where and as the logits are."""
        values: Tensor | None = getattr(self, name)
        if values is None:
            return None
        if len(values) != scores.shape[1]:
            setting = "class_counts" if name == "adjustment" else name
            raise ConfigurationError(
                f"{setting} has {len(values)} entries and the network {scores.shape[1]} classes; "
                "give one for each class"
            )
        return values.to(scores)


def two_class_logits(logits: Tensor) -> Tensor:
    """Return `(B, 1)`, the log-odds of the second class, as the logits `(B, 2)` that mean the same.

    Any other number of logits stays as it is.
    """
    if logits.shape[1] != 1:
        return logits
    return torch.cat([torch.zeros_like(logits), logits], dim=1)


def balanced_weights(class_counts: Sequence[int], power: float = 1.0) -> list[float]:
    """Return weights by which rare classes count as much as frequent ones.

    They are proportional to `count ** -power` and on average 1 over the samples. A class without
    a sample has weight 0.

    Args:
        class_counts: training samples of each class.
        power: 1 balances wholly, 0.5 half-way, 0 not at all.

    Raises:
        ConfigurationError: there is no sample, or `power` is not in [0, 1].

    Example:
        >>> balanced_weights([30, 10])
        [0.6666666666666666, 2.0]
    """
    counts = _counts(class_counts)
    if not 0 <= power <= 1:
        raise ConfigurationError(f"power must be in [0, 1], got {power!r}")
    raw = [count**-power if count else 0.0 for count in counts]
    mean = math.fsum(w * n for w, n in zip(raw, counts, strict=True)) / sum(counts)
    return [weight / mean for weight in raw]


def _weights(weights: Sequence[float] | None) -> Tensor | None:
    if weights is None:
        return None
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise ConfigurationError(
            f"class_weights must be finite, at least 0 and not all 0, got {list(weights)}"
        )
    return torch.tensor(weights, dtype=torch.float64)


def _adjustment(strength: float, class_counts: Sequence[int] | None) -> Tensor | None:
    if not math.isfinite(strength) or strength < 0:
        raise ConfigurationError(f"logit_adjustment must be 0 or more, got {strength!r}")
    if strength == 0:
        return None
    if class_counts is None:
        raise ConfigurationError(
            "logit_adjustment needs class_counts, the training samples of each class"
        )
    counts = _counts(class_counts)
    if absent := [number for number, count in enumerate(counts) if count == 0]:
        raise ConfigurationError(
            f"logit_adjustment: no training sample of class {', '.join(map(str, absent[:20]))}; "
            "add some, leave the class out, or set logit_adjustment to 0"
        )
    prior = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    return strength * prior.log()


def _counts(class_counts: Sequence[int]) -> list[int]:
    counts = [int(count) for count in class_counts]
    if min(counts, default=0) < 0 or sum(counts) == 0:
        raise ConfigurationError(
            f"class_counts must be numbers of training samples, got {list(class_counts)}"
        )
    return counts
