"""What the classifiers share: normalisation layers, and a last layer with dropout."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigurationError

__all__ = ["ClassifierHead", "Norm", "check_sizes", "make_norm", "use_norm"]

Norm = Literal["group", "batch"]
GROUPS = 8


class ClassifierHead(nn.Linear):
    """The last layer, which in training drops features at random.

    It has the parameters and names of the linear layer it stands for, so that weights trained
    without dropout fit.

    Args:
        in_features: features `(B, in_features)` that come in.
        num_classes: logits `(B, num_classes)` that go out; 1 for two classes told by one logit.
        dropout: probability with which a feature is dropped, in [0, 1).

    Raises:
        ConfigurationError: `dropout` is out of its range.
    """

    def __init__(self, in_features: int, num_classes: int, dropout: float = 0.0) -> None:
        if not 0 <= dropout < 1:
            raise ConfigurationError(f"dropout must be in [0, 1), got {dropout!r}")
        super().__init__(in_features, num_classes)
        self.dropout = float(dropout)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch calls it
        """Return logits of features."""
        kept = functional.dropout(input, self.dropout, self.training)
        return functional.linear(kept, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return the settings, as `print(network)` shows them."""
        return f"{super().extra_repr()}, dropout={self.dropout}"


def check_sizes(num_classes: int, in_channels: int) -> None:
    """Refuse a network without an input or an output."""
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {value!r}")


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Return the normalisation layer called `norm` for `channels` channels.

    `group` normalises each image by itself: results do not depend on the size of a batch, nor on
    what else is in it.

    Raises:
        ConfigurationError: there is no such layer.
    """
    if norm == "group":
        return nn.GroupNorm(math.gcd(GROUPS, channels), channels)
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    raise ConfigurationError(f"norm must be 'group' or 'batch', got {norm!r}")


def use_norm(network: nn.Module, norm: Norm) -> None:
    """Replace the batch normalisation layers of `network` where `norm` is another one.

    Names and shapes of their weights stay; the running statistics go.
    """
    make_norm(norm, GROUPS)  # an unknown name is refused though there be nothing to replace
    if norm == "batch":
        return
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, make_norm(norm, child.num_features))
