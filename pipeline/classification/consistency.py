"""How much the predictions of one image at several scales disagree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.classification.losses import two_class_logits
from pipeline.errors import ConfigurationError

__all__ = ["ConsistencyLoss", "ConsistencyType", "Target"]

ConsistencyType = Literal["kl", "mse", "cosine"]
Target = Literal["largest", "mean"]


class ConsistencyLoss(nn.Module):
    """Return how far predictions at several scales are from what they should agree on.

    It is a mean over samples and scales, 0 where all scales give the same probabilities. One logit
    stands for the two classes "no" and "yes": the divergence is that of Bernoulli variables.

    Args:
        kind: distance of two distributions over the classes: `kl`, the Kullback-Leibler divergence;
            `mse`, the squared difference of probabilities, summed over the classes; `cosine`, one
            less the cosine of the angle between the vectors of probabilities.
        target: `largest`: every smaller scale follows the largest, which is a teacher and gets no
            gradient; `mean`: all scales follow their mean probability, and all get a gradient (for
            `kl` the Jensen-Shannon divergence).

    Raises:
        ConfigurationError: there is no such kind or target.
    """

    def __init__(self, kind: ConsistencyType = "kl", target: Target = "largest") -> None:
        super().__init__()
        self.kind = _one_of("consistency_type", kind, get_args(ConsistencyType))
        self.target = _one_of("consistency_target", target, get_args(Target))

    def forward(self, logits: Sequence[Tensor]) -> Tensor:
        """Return the disagreement of logits `(B, K)`, one per scale, the largest scale first."""
        if len(logits) < 2:
            raise ConfigurationError(
                f"consistency needs predictions at 2 scales or more, got {len(logits)}; "
                "add to scales, or set mode to single"
            )
        if self.target == "largest":
            return torch.stack([self.towards(logits[0], each) for each in logits[1:]]).mean()
        each_log = [_log_probabilities(each) for each in logits]
        mean = torch.stack(each_log).logsumexp(dim=0) - math.log(len(each_log))
        return torch.stack([self._distance(log, mean) for log in each_log]).mean()

    def towards(self, teacher: Tensor, logits: Tensor) -> Tensor:
        """Return the distance of `logits` from those of `teacher`, which gets no gradient.

        With the target `largest` the loss is the mean of this over the smaller scales.
        """
        return self._distance(_log_probabilities(teacher.detach()), _log_probabilities(logits))

    def _distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the distance between log-probabilities `(B, K)`, a mean over samples."""
        if self.kind == "kl":
            return functional.kl_div(second, first, reduction="batchmean", log_target=True)
        one, other = first.exp(), second.exp()
        if self.kind == "mse":
            return (one - other).square().sum(dim=1).mean()
        return (1 - functional.cosine_similarity(one, other, dim=1)).mean()


def _log_probabilities(logits: Tensor) -> Tensor:
    """Return the logarithms of the classes' probabilities, at least in single precision.

    Args:
        logits: `(B, K)`; with K = 1 the logit of "yes".

    Returns:
        `(B, K)`, or `(B, 2)` for one logit: a softmax over a single one would be 1 whatever it is.

    Raises:
        ConfigurationError: the logits have another shape.
    """
    if logits.ndim != 2:
        raise ConfigurationError(
            f"the network gives {tuple(logits.shape)}, expected logits (B, K) of whole images; "
            "use a classification network"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return two_class_logits(logits).log_softmax(dim=1)


def _one_of(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ConfigurationError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value
