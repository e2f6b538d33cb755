"""Losses of sheets in volumes, on logits; what is labelled 2 adds to neither value nor gradient.

Dice, focal loss, cross-entropy and soft clDice are those of `pipeline.training.losses`, which work
on volumes; they must be given `ignore_label: 2`, and `WeightedSum` refuses them without. The rest,
and what puts losses together, is here. A loss is called with logits and label, `(B, C, D, H, W)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigurationError
from pipeline.training.losses import counting_pixels
from pipeline.vesuvius.medial_surface import medial_surface
from pipeline.vesuvius.signed_distance import signed_distance

__all__ = [
    "IGNORE_LABEL",
    "BoundaryLoss",
    "DeepSupervision",
    "MedialSurfaceRecallLoss",
    "VarianceLoss",
    "WeightedSum",
    "shrunk_label",
]

IGNORE_LABEL = 2


class VarianceLoss(nn.Module):
    """Return the reference recipe's reward for probabilities that vary and are not all certain.

    `(1 - variance)^2 + max(0, 0.5 - mean entropy)` over the labelled voxels of a sample, entropy in
    nats; the mean over the samples. It is no measure of error: the perfect prediction is not its
    minimum, and half of a volume as foreground pleases it more than the few per cent of a scroll.
    """

    ignore_label = IGNORE_LABEL

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar; a sample without labelled voxels adds 0."""
        logits, _, counts = counting_pixels(logits, target, None, self.ignore_label)
        probability = torch.sigmoid(logits)
        axes = tuple(range(1, logits.ndim))
        voxels = counts.sum(dim=axes)
        mean = probability.masked_fill(~counts, 0.0).sum(dim=axes) / voxels.clamp(min=1)
        centred = probability - mean.reshape(-1, *[1] * len(axes))
        square = centred.square().masked_fill(~counts, 0.0).sum(dim=axes)
        variance = square / (voxels - 1).clamp(min=1)
        entropy = _sample_means(functional.softplus(logits) - logits * probability, counts)
        values = (1 - variance).square() + functional.relu(0.5 - entropy)
        return values.masked_fill(voxels == 0, 0.0).mean()


class BoundaryLoss(nn.Module):
    """Return the error of each voxel times its distance from the truth's boundary.

    Kervadec et al. (2019), arXiv 1812.07032: the probability integrated over the truth's signed
    distance map, here less that of the truth, so that the perfect prediction has a loss of 0. For
    each sample it is the mean of `distance * (probability - truth)` over its labelled voxels.

    Args:
        limit_voxels: distances are cut here and divided by it, so that the wide space between
            sheets does not outweigh them. The distance map is made on the CPU.
    """

    ignore_label = IGNORE_LABEL

    def __init__(self, limit_voxels: float = 5.0) -> None:
        super().__init__()
        self.limit_voxels = _positive("limit_voxels", limit_voxels)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        logits, target, counts = counting_pixels(logits, target, None, self.ignore_label)
        distance = self._distances(target > 0.5, counts).to(logits)
        error = torch.sigmoid(logits) - target
        return _sample_means(error * distance, counts).mean() / self.limit_voxels

    def _distances(self, foreground: Tensor, counts: Tensor) -> Tensor:
        pairs = zip(_volumes(foreground), _volumes(counts & ~foreground), strict=True)
        maps = [signed_distance(inside, outside, self.limit_voxels) for inside, outside in pairs]
        return torch.from_numpy(np.stack(maps)).reshape(foreground.shape)


class MedialSurfaceRecallLoss(nn.Module):
    """Return how much of the truth's medial surface is missed: holes and breaks of a sheet.

    `1 - (sum(probability * medial) + smooth) / (sum(medial) + smooth)`, as skeleton recall does for
    tubes (Kirchhoff et al. 2024, arXiv 2404.03010). The medial surface is made of the label of each
    batch; see `medial_surface`. Foreground everywhere has a loss of 0: add it to another one.

    Args:
        smooth: voxels added above and below; positive, so that no sheet is a loss of 0.
        per_sample: take the recall of each sample and then the mean, instead of pooling.
    """

    ignore_label = IGNORE_LABEL

    def __init__(self, smooth: float = 1.0, per_sample: bool = False) -> None:
        super().__init__()
        self.smooth = _positive("smooth", smooth)
        self.per_sample = per_sample

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        logits, target, _ = counting_pixels(logits, target, None, self.ignore_label)
        medial = medial_surface(target > 0.5)
        axes = tuple(range(1 if self.per_sample else 0, logits.ndim))
        found = torch.sigmoid(logits).masked_fill(~medial, 0.0).sum(dim=axes)
        return 1 - ((found + self.smooth) / (medial.sum(dim=axes) + self.smooth)).mean()


class WeightedSum(nn.Module):
    """Add losses by their weights; one of weight 0 is not computed.

    Args:
        losses: by name, each called with logits and label.
        weights: by the same names, zero or positive.

    Attributes:
        latest: what each loss was at the last call, by name, before its weight; for a log.

    Raises:
        ConfigurationError: the names differ, a weight is negative, all are 0, or a loss ignores
            another label than 2.
    """

    def __init__(self, losses: Mapping[str, nn.Module], weights: Mapping[str, float]) -> None:
        super().__init__()
        if losses.keys() != weights.keys():
            raise ConfigurationError(
                f"losses are {', '.join(losses)} and weights are for {', '.join(weights)}; "
                "give each loss one weight"
            )
        self.weights = {name: _weight(f"weights of {name}", weights[name]) for name in losses}
        if not any(self.weights.values()):
            raise ConfigurationError(f"weights of {', '.join(losses)} are all 0; set one above 0")
        for name, loss in losses.items():
            if getattr(loss, "ignore_label", IGNORE_LABEL) != IGNORE_LABEL:
                raise ConfigurationError(
                    f"{name} has ignore_label {loss.ignore_label!r}, and labels of "
                    f"volumes have {IGNORE_LABEL}; set ignore_label: {IGNORE_LABEL}"
                )
        self.losses = nn.ModuleDict(
            {name: loss for name, loss in losses.items() if self.weights[name]}
        )
        self.latest: dict[str, Tensor] = {}

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        values = {name: loss(logits, target) for name, loss in self.losses.items()}
        self.latest = {name: value.detach() for name, value in values.items()}
        return torch.stack([self.weights[name] * values[name] for name in values]).sum()


class DeepSupervision(nn.Module):
    """Apply a loss to the logits of every level of a network, and take the weighted mean.

    The label is made smaller for logits that are, see `shrunk_label`. A single tensor, as networks
    give in evaluation, is compared as it is, so that both losses have one scale.

    Args:
        loss: called with logits and label.
        weights: of the levels, the full size first; zero or positive.

    Raises:
        ConfigurationError: a weight is negative, all are 0, or the network gives more or fewer
            levels than there are weights.
    """

    def __init__(self, loss: nn.Module, weights: Sequence[float] = (1.0, 0.5, 0.25)) -> None:
        super().__init__()
        self.loss = loss
        self.weights = [_weight("weights of deep supervision", weight) for weight in weights]
        if not any(self.weights):
            raise ConfigurationError(
                f"weights of deep supervision must not all be 0, got {list(weights)!r}"
            )

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """Return the loss, a scalar, of logits of one or several sizes, the full size first."""
        if isinstance(logits, Tensor):
            single: Tensor = self.loss(logits, target)
            return single
        if len(logits) != len(self.weights):
            raise ConfigurationError(
                f"the network gives logits of {len(logits)} levels and weights has "
                f"{len(self.weights)}; set deep_supervision to {len(self.weights) - 1}"
            )
        # The full size last: what a loss keeps of its latest call is that of the full size.
        levels = [pair for pair in zip(logits, self.weights, strict=True) if pair[1]][::-1]
        values = [
            weight * self.loss(level, shrunk_label(target, level.shape[2:]))
            for level, weight in levels
        ]
        return torch.stack(values).sum() / sum(self.weights)


def shrunk_label(target: Tensor, size: Sequence[int]) -> Tensor:
    """Return a label of sheets at a smaller size, where thin sheets stay whole.

    A voxel that holds surface is surface; otherwise one that holds a voxel without a label has
    none. Taking the nearest voxel would tear sheets of two voxels apart.

    Args:
        target: `(B, C, D, H, W)` of 0, 1 and 2.
        size: depth, height and width of the result.
    """
    if target.shape[2:] == torch.Size(size):
        return target
    # By precedence: background, no label, surface. Exchanging 1 and 2 is its own reverse.
    ranked = _exchanged(target.as_subclass(Tensor).float())
    return _exchanged(functional.adaptive_max_pool3d(ranked, list(size)))


def _exchanged(label: Tensor) -> Tensor:
    """Return `label` with 1 in place of 2, and 2 in place of 1."""
    return torch.where(label > 0.5, 3 - label, label)


def _sample_means(values: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of `values` over the voxels of each sample that count, 0 without any."""
    axes = tuple(range(1, values.ndim))
    return values.masked_fill(~counts, 0.0).sum(dim=axes) / counts.sum(dim=axes).clamp(min=1)


def _volumes(mask: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Return the volumes of every sample and channel in a row, `(B * C, D, H, W)`."""
    volumes: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = mask.flatten(0, 1).cpu().numpy()
    return volumes


def _positive(name: str, value: float) -> float:
    value = float(value)
    if not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{name} must be positive and finite, got {value!r}")
    return value


def _weight(name: str, value: float) -> float:
    value = float(value)
    if not (math.isfinite(value) and value >= 0):
        raise ConfigurationError(f"{name} must be zero or positive and finite, got {value!r}")
    return value
