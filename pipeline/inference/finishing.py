"""From blended logits to what is written: probabilities or labels, in a small type."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import ConfigurationError

__all__ = ["Finish"]

_TYPES = ("uint8", "float16", "float32")
_LABELS = 256  # that uint8 tells apart


class Finish:
    """The last step of a streamed run, voxel by voxel.

    Args:
        activation: `sigmoid`, `softmax` over the channels, or None for logits.
        threshold: write 1 where a probability is at least this, else 0; None writes probabilities.
        labels: after a softmax, write the number of the most probable class.
        dtype: `uint8`, `float16` or `float32` of probabilities and logits. In uint8, probabilities
            are multiples of 1/255. What a threshold or labels give is uint8.
        select: the channel to write; None writes all.

    Raises:
        ConfigurationError: a value or a combination without a meaning.
    """

    def __init__(
        self,
        activation: Literal["sigmoid", "softmax"] | None = None,
        *,
        threshold: float | None = None,
        labels: bool = False,
        dtype: str = "float32",
        select: int | None = None,
    ) -> None:
        if activation not in ("sigmoid", "softmax", None):
            raise ConfigurationError(
                f"activation must be sigmoid, softmax or null, got {activation!r}"
            )
        if dtype not in _TYPES:
            raise ConfigurationError(f"dtype must be one of {', '.join(_TYPES)}, got {dtype!r}")
        if activation is None and (threshold is not None or dtype == "uint8"):
            raise ConfigurationError(
                "a threshold and dtype uint8 are for probabilities; set activation to sigmoid or "
                "softmax, or leave them out"
            )
        if threshold is not None and not 0 <= threshold <= 1:
            raise ConfigurationError(f"threshold must be a probability, 0 to 1, got {threshold!r}")
        if labels and (activation != "softmax" or threshold is not None or select is not None):
            raise ConfigurationError(
                "labels are the most probable class of a softmax; set activation to softmax, and "
                "neither threshold nor select"
            )
        self.activation = activation
        self.threshold = threshold
        self.labels = labels
        self.dtype = np.dtype("uint8" if labels or threshold is not None else dtype)
        self.select = select

    @property
    def reduce(self) -> str:
        """How coarser levels are made: no mean of labels, and nothing thin is lost from a mask."""
        if self.labels:
            return "nearest"
        return "mean" if self.threshold is None else "max"

    def channels(self, given: int) -> int:
        """Return how many channels are written where the network gives `given`.

        Raises:
            ConfigurationError: that number does not suit the settings.
        """
        if self.select is not None and not 0 <= self.select < given:
            raise ConfigurationError(
                f"select is {self.select}, the network gives {given} channels; count from 0"
            )
        if self.activation == "softmax" and given < 2:
            raise ConfigurationError(
                "a softmax over one channel is 1 everywhere; set activation to sigmoid"
            )
        if self.labels and given > _LABELS:
            raise ConfigurationError(f"labels of {given} classes do not fit into uint8")
        return 1 if self.labels or self.select is not None else given

    def __call__(self, logits: Tensor) -> NDArray[Any]:
        """Return what is written for `logits` `(C, ...)`: `(C', ...)`.

        A voxel's value does not depend on which others are finished with it.
        """
        values: NDArray[Any] = np.asarray(logits.to(_summed_in(logits)).cpu())
        if self.labels:
            return np.asarray(values.argmax(0, keepdims=True), np.uint8)
        if self.activation == "softmax":
            values = _softmax(values)
        if self.select is not None:
            values = values[self.select : self.select + 1]
        if self.activation == "sigmoid":
            values = _sigmoid(values)
        if self.threshold is not None:
            return np.asarray(values >= self.threshold, np.uint8)
        if self.dtype == np.uint8:
            values = np.rint(values * 255)
        return values.astype(self.dtype, copy=False)

    def settings(self) -> dict[str, Any]:
        """Return what determines the result, as plain data."""
        scaled = self.dtype == np.uint8 and self.threshold is None and not self.labels
        return {
            "activation": self.activation,
            "threshold": self.threshold,
            "labels": self.labels,
            "dtype": str(self.dtype),
            "select": self.select,
            "scale": 1 / 255 if scaled else 1,  # by which a value in the file is multiplied
        }


# In numpy, and not in torch, whose exponential on a CPU differs by a rounding between the middle of
# an array and its last few elements: then a voxel would depend on how the volume is cut.


def _sigmoid(values: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # 1 / infinity is the 0 that is meant
        return np.asarray(1 / (1 + np.exp(-np.ascontiguousarray(values))))


def _softmax(values: NDArray[Any]) -> NDArray[Any]:
    powers = np.exp(np.ascontiguousarray(values - values.max(0)))
    total = powers[0].copy()
    for power in powers[1:]:  # one after another: the order of a sum is part of the result
        total += power
    return np.asarray(powers / total)


def _summed_in(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
