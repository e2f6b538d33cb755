"""Losses of retinal layers, on logits; columns that nobody annotated add to nothing.

A loss is called with logits `(B, 3, H, W)` and a label, as MONAI's trainer does. The label is
`(B, 1, H, W)`: 0 above the ILM, 1 between, 2 below BM, 255 where nothing is known. It may have two
further lines, `(B, 1, H + 2, W)`: the rows of ILM and BM with their fractions, NaN where nobody
annotated, which `BoundaryLoss` needs; see `RenderLabeld(with_rows=True)`.

Every loss is the mean over the samples of a batch, so that it does not matter how one is divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from monai.losses.dice import DiceLoss
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigurationError

__all__ = ["IGNORE_LABEL", "BoundaryLoss", "LayerLoss", "expected_rows", "split_label"]

IGNORE_LABEL = 255
CLASSES = 3


class LayerLoss(nn.Module):
    """Add cross-entropy, Dice and, as an option, the error of the boundaries.

    Cross-entropy is the mean over a sample's annotated pixels, Dice that over the classes of a
    sample, on softmax; a sample without an annotated column adds 0. A term of weight 0 is not
    computed.

    Args:
        cross_entropy, dice, boundary: weights of the terms; zero or positive. The last one counts
            per pixel of error, and the label must have the rows.
        smooth: pixels added to numerator and denominator of Dice; positive, so that a class that
            is absent from truth and prediction costs nothing.

    Raises:
        ConfigurationError: a weight is negative, all are 0, or `smooth` is not positive.
    """

    def __init__(
        self,
        cross_entropy: float = 0.5,
        dice: float = 0.5,
        boundary: float = 0.0,
        smooth: float = 1e-6,
    ) -> None:
        super().__init__()
        weights = {"cross_entropy": cross_entropy, "dice": dice, "boundary": boundary}
        for name, value in {**weights, "smooth": smooth}.items():
            if not (math.isfinite(value) and value >= 0) or (name == "smooth" and value == 0):
                rule = "positive" if name == "smooth" else "zero or positive"
                raise ConfigurationError(f"{name} must be {rule} and finite, got {value!r}")
        if not any(weights.values()):
            raise ConfigurationError(f"weights of {', '.join(weights)} are all 0; set one above 0")
        self.weights = weights
        self.dice = DiceLoss(smooth_nr=smooth, smooth_dr=smooth)
        self.boundary = BoundaryLoss()

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        classes, _ = split_label(label, logits)
        terms: dict[str, Callable[[], Tensor]] = {
            "cross_entropy": partial(_cross_entropy, logits, classes),
            "dice": partial(self._dice, logits, classes),
            "boundary": partial(self.boundary, logits, label),
        }
        chosen = [weight * terms[name]() for name, weight in self.weights.items() if weight]
        return torch.stack(chosen).sum()

    def _dice(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Return 1 - Dice; where no one annotated, probability and truth are 0 in every class."""
        outside = (classes == IGNORE_LABEL)[:, None]
        probability = _single(logits).masked_fill(outside, 0.0).softmax(dim=1)
        truth = functional.one_hot(classes.masked_fill(outside[:, 0], 0), CLASSES).movedim(-1, 1)
        loss: Tensor = self.dice(
            probability.masked_fill(outside, 0.0), truth.masked_fill(outside, 0).to(probability)
        )
        return loss


class BoundaryLoss(nn.Module):
    """Return how far the expected rows are from the annotated ones, in pixels.

    After He et al. (2021), MedIA 68:101856: rows come from a softmax over each column, so that they
    have fractions and a gradient. The mean of the absolute error over a sample's annotated columns,
    of both boundaries; a sample without any adds 0.

    Args:
        temperature: divides the logits. The pixels of a column are not independent, as the softmax
            takes them to be; above 1 it is less certain, and errors far away keep a gradient.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(temperature) and temperature > 0):
            raise ConfigurationError(
                f"temperature must be positive and finite, got {temperature!r}"
            )
        self.temperature = temperature

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Raises:
            ConfigurationError: the label has no rows.
        """
        _, rows = split_label(label, logits)
        if rows is None:
            raise ConfigurationError(
                f"label has {label.shape[2]} lines as the logits have: no rows for the boundary "
                "loss; set with_rows: true in RenderLabeld"
            )
        counts = rows.isfinite()
        unknown = ~counts.any(dim=1)[:, None, None]
        expected = expected_rows(_single(logits).masked_fill(unknown, 0.0) / self.temperature)
        error = (expected - rows.nan_to_num(0.0)).abs().masked_fill(~counts, 0.0)
        means = error.sum(dim=(1, 2)) / counts.sum(dim=(1, 2)).clamp(min=1)
        return means.mean()


def expected_rows(logits: Tensor) -> Tensor:
    """Return the mean of each boundary's row over all ordered pairs of rows.

    A pair of rows, ILM not below BM, is as likely as the classes that it gives to the pixels of the
    column. A boundary lies between 0 and H.

    Args:
        logits: `(B, 3, H, W)`, in single or double precision.

    Returns:
        `(B, 2, W)`, ILM and BM.
    """
    above, between, below = logits.unbind(dim=1)
    inner, outer = _scores(above - between), _scores(between - below)
    later = outer.flip(1).logcumsumexp(dim=1).flip(1)
    chances = torch.stack([inner + later, outer + inner.logcumsumexp(dim=1)], dim=1)
    row = torch.arange(inner.shape[1], dtype=logits.dtype, device=logits.device)
    expected: Tensor = torch.einsum("bkhw,h->bkw", chances.softmax(dim=2), row)
    return expected


def split_label(label: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the classes `(B, H, W)` and, where a label has them, the rows `(B, 2, W)`.

    Args:
        label: `(B, 1, H, W)` or `(B, 1, H + 2, W)`.
        logits: `(B, 3, H, W)`.

    Raises:
        ConfigurationError: the shapes disagree.
    """
    batch, classes, height, width = logits.shape
    fits = (batch, 1, height, width), (batch, 1, height + 2, width)
    if classes != CLASSES or tuple(label.shape) not in fits:
        raise ConfigurationError(
            f"the network gives {tuple(logits.shape)} and the label has {tuple(label.shape)}, "
            f"expected (B, {CLASSES}, H, W) and (B, 1, H, W), or H + 2 lines with the rows; "
            "set out_channels or the transforms to match"
        )
    plain = label.as_subclass(Tensor)[:, 0]
    rows = plain[:, height:] if plain.shape[1] > height else None
    return plain[:, :height].long(), rows


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    counts = classes != IGNORE_LABEL
    inside = _single(logits).masked_fill(~counts[:, None], 0.0)
    values = functional.cross_entropy(inside, classes, ignore_index=IGNORE_LABEL, reduction="none")
    return (values.sum(dim=(1, 2)) / counts.sum(dim=(1, 2)).clamp(min=1)).mean()


def _scores(difference: Tensor) -> Tensor:
    """Return the score of a boundary at each row 0..H: the sum of what lies above it."""
    return functional.pad(difference.cumsum(dim=1), (0, 0, 1, 0))


def _single(logits: Tensor) -> Tensor:
    """Return plain logits in single precision at least: sums over pixels overflow half."""
    plain = logits.as_subclass(Tensor)
    return plain.float() if plain.dtype in (torch.float16, torch.bfloat16) else plain
