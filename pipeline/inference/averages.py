"""The mean of several predictions of one thing, as logits again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.errors import ConfigurationError
from pipeline.inference.passes import Structure

__all__ = ["Activation", "Average", "Domain", "check_domain", "normalised_weights"]

Domain = Literal["probability", "logit"]
Activation = Literal["sigmoid", "softmax"]


class Average:
    """A weighted mean that predictions are added to one after another.

    Probabilities are averaged as such and the mean is given as logits, so that what follows a
    network follows an average too: `log p - log(1 - p)` after a sigmoid, `log p` after a softmax
    over axis 1. Both sides of a sigmoid are summed, since `1 - p` would lose the small one: a mean
    of equal logits is that logit. A probability below the smallest normal number of its type (in
    float32 1.2e-38) counts as that number, so that no logit is infinite: they end at +-87.3.

    Sums are float32, or float64 where the predictions are; what is added is not written to. Their
    memory is that of one prediction, with a sigmoid of two, however many are added.

    Args:
        domain: `probability`, or `logit` for the plain mean of the logits.
        activation: what turns the logits into probabilities, in every output of the network.
    """

    def __init__(self, domain: Domain = "probability", activation: Activation = "sigmoid") -> None:
        check_domain(domain, activation)
        self.domain = domain
        self.activation = activation
        self._structure: Structure | None = None
        self._sums: list[tuple[Tensor, ...]] = []

    def add(
        self, outputs: Any, weight: float, restore: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Add a prediction.

        Args:
            outputs: logits `(B, C, *spatial)`, or a tuple or dictionary of such tensors.
            weight: its share of the mean; all of them together are 1.
            restore: what brings each tensor into the place of the others, such as turning it back.

        Raises:
            ConfigurationError: it is of another form or shape than those before.
        """
        structure = self._structure or Structure(outputs)
        logits = structure.flatten(outputs)
        terms = [self._terms(restore(one) if restore else one) for one in logits]
        if self._structure is None:
            self._structure = structure
            self._sums = [tuple(term * weight for term in group) for group in terms]
            return
        found, expected = _shapes(terms), _shapes(self._sums)
        if found != expected:
            raise ConfigurationError(
                f"a prediction of shape {found} cannot be averaged with one of {expected}; average "
                "networks with the same outputs, and turn only what gives an output of the "
                "window's size"
            )
        for group, sums in zip(terms, self._sums, strict=True):
            for term, total in zip(group, sums, strict=True):
                total.add_(term, alpha=weight)

    def logits(self) -> Any:
        """Return the mean in the form of the predictions, and forget the sums."""
        if self._structure is None:
            raise RuntimeError("no prediction was added")
        sums, self._sums = self._sums, []
        return self._structure.restore([self._as_logits(group) for group in sums])

    def _terms(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Return what is summed for `logits`."""
        # Converted here: under autocast a network gives 8 or 11 bits.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.domain == "logit":
            return (logits,)
        if self.activation == "softmax":
            return (torch.softmax(logits, 1),)
        return torch.sigmoid(logits), torch.sigmoid(-logits)

    def _as_logits(self, sums: tuple[Tensor, ...]) -> Tensor:
        if self.domain == "logit":
            return sums[0]
        logs = [total.clamp_min_(torch.finfo(total.dtype).tiny).log_() for total in sums]
        return logs[0].sub_(logs[1]) if len(logs) == 2 else logs[0]


def check_domain(domain: str, activation: str = "sigmoid") -> None:
    """Refuse an unknown domain or activation."""
    if domain not in ("probability", "logit"):
        raise ConfigurationError(f"domain must be probability or logit, got {domain!r}")
    if activation not in ("sigmoid", "softmax"):
        raise ConfigurationError(f"activation must be sigmoid or softmax, got {activation!r}")


def normalised_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return `count` weights with the sum 1; equal ones where none are given.

    Raises:
        ConfigurationError: there are not `count` of them, one is negative or not finite, or all
            are 0.

    Example:
        >>> normalised_weights([3, 1], 2), normalised_weights(None, 4)
        ([0.75, 0.25], [0.25, 0.25, 0.25, 0.25])
    """
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ConfigurationError(f"{len(weights)} weights for {count} predictions; give one each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ConfigurationError(
            f"weights must be finite, at least 0 and not all 0, got {list(weights)}"
        )
    total = math.fsum(weights)
    return [float(weight / total) for weight in weights]


def _shapes(groups: Sequence[Sequence[Tensor]]) -> str:
    return ", ".join(str(list(group[0].shape)) for group in groups)
