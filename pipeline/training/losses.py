"""Segmentation losses on logits that leave ignored pixels out of value and gradient.

MONAI's trainer calls `loss(pred, label)`, so pixels that do not count travel in the label, as
`ignore_label` (255); a `mask` may say so too. A pixel counts where both agree.

MONAI's terms do the arithmetic wherever a masked input gives the exact result. Its own masking
does not serve: `MaskedDiceLoss` and `ignore_index` multiply by the mask, so that one NaN outside
the field of view spoils the loss, and neither exists for binary cross-entropy or soft clDice.
"""

from __future__ import annotations

import math

import torch
from monai.losses.cldice import soft_dilate, soft_erode
from monai.losses.dice import DiceLoss as MonaiDiceLoss
from monai.losses.focal_loss import sigmoid_focal_loss
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigurationError

__all__ = [
    "BCELoss",
    "DiceBCELoss",
    "DiceClDiceLoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalLoss",
    "SoftClDiceLoss",
    "counting_pixels",
    "soft_skeleton",
]

IGNORE_LABEL = 255


def counting_pixels(
    logits: Tensor, target: Tensor, mask: Tensor | None = None, ignore_label: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Separate the pixels that count from the others.

    Args:
        logits: `(B, C, ...)`, two or three spatial axes, any floating type.
        target: same shape, values in [0, 1] where it is not `ignore_label`.
        mask: `(B, 1, ...)` or the shape of `logits`; 1 counts, 0 does not.
        ignore_label: value of `target` that does not count; None if there is none.

    Returns:
        Logits and target, zero where a pixel does not count, and which pixels count (bool), all of
        one shape. Half precision becomes single.

    Raises:
        ConfigurationError: the shapes disagree.
    """
    if logits.shape != target.shape:
        raise ConfigurationError(
            f"the network gives {tuple(logits.shape)} and the label has {tuple(target.shape)}, "
            "expected one shape; set out_channels, or make one label channel per class"
        )
    # Sums over pixels overflow half precision, and MetaTensor's bookkeeping has no use here.
    logits, target = logits.as_subclass(Tensor), target.as_subclass(Tensor)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    counts = torch.ones_like(target, dtype=torch.bool)
    if ignore_label is not None:
        counts = target != ignore_label
    if mask is not None:
        one_channel = (logits.shape[0], 1, *logits.shape[2:])
        if tuple(mask.shape) not in (one_channel, tuple(logits.shape)):
            raise ConfigurationError(f"mask must be {one_channel}, got {tuple(mask.shape)}")
        counts = counts & (mask.as_subclass(Tensor) > 0.5)
    outside = ~counts
    target = target.to(logits.dtype).masked_fill(outside, 0.0)
    return logits.masked_fill(outside, 0.0), target, counts


def _counted_mean(values: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of `values` over the pixels that count, 0 without any."""
    return values.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)


def _checked(name: str, value: float, *, positive: bool = False) -> float:
    """Return the setting `name` as a finite float that is not negative, or `positive`."""
    value = float(value)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        rule = "positive" if positive else "zero or positive"
        raise ConfigurationError(f"{name} must be {rule} and finite, got {value!r}")
    return value


class _MaskedTerm(nn.Module):
    """One loss term; subclasses define `term` on what `counting_pixels` returns."""

    def __init__(self, ignore_label: int | None = IGNORE_LABEL) -> None:
        super().__init__()
        if ignore_label in (0, 1):
            raise ConfigurationError(
                f"ignore_label must be None or neither class (0 or 1), got {ignore_label!r}"
            )
        self.ignore_label = ignore_label

    def term(self, logits: Tensor, target: Tensor, counts: Tensor) -> Tensor:
        """Return the loss over the pixels where `counts` is true."""
        raise NotImplementedError

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar, of `logits` against `target`; see `counting_pixels`."""
        return self.term(*counting_pixels(logits, target, mask, self.ignore_label))


class DiceLoss(_MaskedTerm):
    """Return 1 - Dice, with overlap and areas summed over the whole batch.

    Pooling over the batch spares patches without any vessel a penalty of their own.

    Args:
        smooth: pixels added to numerator and denominator; positive, so that nothing to find and
            nothing found is a loss of 0.
        squared: square probabilities and labels in the denominator.
        per_sample: take Dice of each image and then the mean, instead of pooling.
        ignore_label: value of the label that does not count; None if there is none.
    """

    def __init__(
        self,
        smooth: float = 1.0,
        squared: bool = False,
        per_sample: bool = False,
        ignore_label: int | None = IGNORE_LABEL,
    ) -> None:
        super().__init__(ignore_label)
        smooth = _checked("smooth", smooth, positive=True)
        self.dice = MonaiDiceLoss(
            smooth_nr=smooth, smooth_dr=smooth, squared_pred=squared, batch=not per_sample
        )

    def term(self, logits: Tensor, target: Tensor, counts: Tensor) -> Tensor:
        """Return the loss; probabilities of 0 outside add to neither overlap nor areas."""
        probability = torch.sigmoid(logits).masked_fill(~counts, 0.0)
        loss: Tensor = self.dice(probability, target)
        return loss


class BCELoss(_MaskedTerm):
    """Return binary cross-entropy, the mean over all pixels that count.

    Args:
        ignore_label: value of the label that does not count; None if there is none.
    """

    def term(self, logits: Tensor, target: Tensor, counts: Tensor) -> Tensor:
        """Return the mean over the pixels that count."""
        values = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return _counted_mean(values, counts)


class FocalLoss(_MaskedTerm):
    """Return binary cross-entropy that fades out for pixels already right.

    Args:
        gamma: how fast it fades; 0 is cross-entropy.
        alpha: weight of the class in [0, 1], the others get the rest; None weighs all alike.
        ignore_label: value of the label that does not count; None if there is none.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | None = None,
        ignore_label: int | None = IGNORE_LABEL,
    ) -> None:
        super().__init__(ignore_label)
        if alpha is not None and not 0 <= alpha <= 1:
            raise ConfigurationError(f"alpha must be in [0, 1] or None, got {alpha!r}")
        self.gamma = _checked("gamma", gamma)
        self.alpha = alpha

    def term(self, logits: Tensor, target: Tensor, counts: Tensor) -> Tensor:
        """Return the mean over the pixels that count."""
        return _counted_mean(sigmoid_focal_loss(logits, target, self.gamma, self.alpha), counts)


def soft_skeleton(image: Tensor, iterations: int, counts: Tensor) -> Tensor:
    """Return the soft skeleton of `image` among the pixels that count, 0 elsewhere.

    A pixel that does not count is left out of every minimum and maximum, as one beyond the border
    of the image is. Filling it with 0 instead would wear vessels away along the edge of the field
    of view.

    Args:
        image: probabilities or labels `(B, C, H, W)` or `(B, C, D, H, W)`, 0 where not counted.
        iterations: erosions; about the radius in pixels of the widest vessel.
        counts: bool, same shape.
    """
    outside = ~counts

    def eroded(values: Tensor) -> Tensor:
        smallest: Tensor = soft_erode(values.masked_fill(outside, 1.0))
        return smallest.masked_fill(outside, 0.0)

    def ridge(values: Tensor) -> Tensor:
        opened: Tensor = soft_dilate(eroded(values))
        return functional.relu(values - opened)

    skeleton = ridge(image)
    for _ in range(iterations):
        image = eroded(image)
        found = ridge(image)
        skeleton = skeleton + functional.relu(found - skeleton * found)
    return skeleton.masked_fill(outside, 0.0)


class SoftClDiceLoss(_MaskedTerm):
    """Return 1 - clDice of soft skeletons, which rewards vessels that stay connected.

    Shit et al. (2021), arXiv 2003.07311. It ignores calibre: see `DiceClDiceLoss`.

    Args:
        iterations: erosions of the skeleton; about the radius in pixels of the widest vessel.
        smooth: pixels added to numerator and denominator of precision and sensitivity.
        per_sample: take clDice of each image and then the mean, instead of pooling.
        ignore_label: value of the label that does not count; None if there is none.
    """

    def __init__(
        self,
        iterations: int = 3,
        smooth: float = 1.0,
        per_sample: bool = False,
        ignore_label: int | None = IGNORE_LABEL,
    ) -> None:
        super().__init__(ignore_label)
        if not isinstance(iterations, int) or iterations < 0:
            raise ConfigurationError(f"iterations must be an integer >= 0, got {iterations!r}")
        self.iterations = iterations
        self.smooth = _checked("smooth", smooth, positive=True)
        self.per_sample = per_sample

    def term(self, logits: Tensor, target: Tensor, counts: Tensor) -> Tensor:
        """Return the loss; MONAI's has no mask, and its skeletons would shrink at the edge."""
        probability = torch.sigmoid(logits).masked_fill(~counts, 0.0)
        precision = self._share(soft_skeleton(probability, self.iterations, counts), target)
        sensitivity = self._share(soft_skeleton(target, self.iterations, counts), probability)
        # `smooth` keeps both above 0, and their sum with them.
        return 1 - (2 * precision * sensitivity / (precision + sensitivity)).mean()

    def _share(self, skeleton: Tensor, region: Tensor) -> Tensor:
        """Return how much of `skeleton` lies in `region`."""
        axes = tuple(range(1 if self.per_sample else 0, skeleton.ndim))
        inside = (skeleton * region).sum(dim=axes)
        return (inside + self.smooth) / (skeleton.sum(dim=axes) + self.smooth)


class _WeightedSum(nn.Module):
    """Add loss terms by their weights; a term of weight 0 is not computed."""

    def __init__(self, **terms: tuple[float, nn.Module]) -> None:
        super().__init__()
        self.weights = {
            name: _checked(f"lambda_{name}", weight) for name, (weight, _) in terms.items()
        }
        if not any(self.weights.values()):
            raise ConfigurationError(f"weights of {', '.join(terms)} are all 0; set one above 0")
        self.terms = nn.ModuleDict({name: term for name, (_, term) in terms.items()})

    def forward(self, logits: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar, of `logits` against `target`; see `counting_pixels`."""
        values = [
            weight * self.terms[name](logits, target, mask)
            for name, weight in self.weights.items()
            if weight
        ]
        return torch.stack(values).sum()


class DiceBCELoss(_WeightedSum):
    """Add Dice and binary cross-entropy: overlap, and probabilities that mean something.

    Args:
        lambda_dice, lambda_bce: weights of `DiceLoss` and `BCELoss`.
        smooth, squared, per_sample: of `DiceLoss`; cross-entropy is pooled in any case.
        ignore_label: value of the label that does not count; None if there is none.
    """

    def __init__(
        self,
        lambda_dice: float = 1.0,
        lambda_bce: float = 1.0,
        smooth: float = 1.0,
        squared: bool = False,
        per_sample: bool = False,
        ignore_label: int | None = IGNORE_LABEL,
    ) -> None:
        super().__init__(
            dice=(lambda_dice, DiceLoss(smooth, squared, per_sample, ignore_label)),
            bce=(lambda_bce, BCELoss(ignore_label)),
        )


class DiceFocalLoss(_WeightedSum):
    """Add Dice and focal loss, for thin vessels that cross-entropy drowns in background.

    Args:
        lambda_dice, lambda_focal: weights of `DiceLoss` and `FocalLoss`.
        gamma, alpha: of `FocalLoss`.
        smooth, squared, per_sample: of `DiceLoss`; the focal loss is pooled in any case.
        ignore_label: value of the label that does not count; None if there is none.
    """

    def __init__(
        self,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        gamma: float = 2.0,
        alpha: float | None = None,
        smooth: float = 1.0,
        squared: bool = False,
        per_sample: bool = False,
        ignore_label: int | None = IGNORE_LABEL,
    ) -> None:
        super().__init__(
            dice=(lambda_dice, DiceLoss(smooth, squared, per_sample, ignore_label)),
            focal=(lambda_focal, FocalLoss(gamma, alpha, ignore_label)),
        )


class DiceClDiceLoss(_WeightedSum):
    """Add Dice and soft clDice: area and connection.

    Args:
        lambda_dice, lambda_cldice: weights of `DiceLoss` and `SoftClDiceLoss`.
        iterations: of `SoftClDiceLoss`.
        smooth, per_sample: of both terms.
        ignore_label: value of the label that does not count; None if there is none.
    """

    def __init__(
        self,
        lambda_dice: float = 0.5,
        lambda_cldice: float = 0.5,
        iterations: int = 3,
        smooth: float = 1.0,
        per_sample: bool = False,
        ignore_label: int | None = IGNORE_LABEL,
    ) -> None:
        super().__init__(
            dice=(lambda_dice, DiceLoss(smooth, False, per_sample, ignore_label)),
            cldice=(lambda_cldice, SoftClDiceLoss(iterations, smooth, per_sample, ignore_label)),
        )
