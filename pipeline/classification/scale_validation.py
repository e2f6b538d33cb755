"""Validation at several sizes, those never trained at among them.

`ScalesInferer` gives MONAI's evaluator the logits at all sizes, `ScaleLosses` takes the plain loss
at each, and `SplitScalesd`, first in the post-processing, leaves the logits at the evaluation scale
as `pred` and those at a further size as, for example, `pred_48`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.config import KeysCollection
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from monai.transforms import MapTransform
from monai.utils.enums import CommonKeys
from torch import Tensor

from pipeline.classification.scales import checked_scale, checked_scales, resize
from pipeline.errors import ConfigurationError

__all__ = ["ResizeToScaled", "ScaleLosses", "ScalesInferer", "SplitScalesd", "evaluation_sizes"]


def evaluation_sizes(evaluation_scale: int, scales: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the sizes in pixels to evaluate at: `evaluation_scale`, then the others by size.

    Args:
        evaluation_scale: comes first.
        scales: further sizes, in any order; it may be among them, and one may stand there twice.

    Raises:
        ConfigurationError: one of them is no size.

    Example:
        >>> evaluation_sizes(128, [48, 64, 128, 160])
        (128, 160, 64, 48)
    """
    first = checked_scale("evaluation_scale", evaluation_scale)
    others = {checked_scale("scales", size) for size in scales} - {first}
    return (first, *(checked_scales("scales", list(others)) if others else ()))


class ScalesInferer(Inferer):
    """Give the logits of images at several sizes, `(B, S, K)`.

    Args:
        evaluation_scale: the first of the S sizes.
        scales: further sizes, see `evaluation_sizes`.

    Attributes:
        sizes: of the axis S, in pixels.
    """

    def __init__(self, evaluation_scale: int, scales: Sequence[int] = ()) -> None:
        super().__init__()
        self.sizes = evaluation_sizes(evaluation_scale, scales)

    def __call__(
        self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return `(B, S, K)` for images `(B, C, H, W)`, which are resized to each size in turn."""
        plain = inputs.as_subclass(Tensor)
        each = [network(resize(plain, size), *args, **kwargs) for size in self.sizes]
        return torch.stack(each, dim=1)


class SplitScalesd(MapTransform):
    """Replace logits `(S, K)` of an item by `(K,)` of the first size, and name the others.

    Args:
        keys: of the logits, usually `pred`; those at a further size get the key `pred_<size>`.
        sizes: of the axis S, in pixels: the inferer's.
        allow_missing_keys: whether an item may lack a key.
    """

    def __init__(
        self, keys: KeysCollection, sizes: Sequence[int], allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.sizes = tuple(sizes)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Split the item's logits."""
        found = dict(data)
        for key in self.key_iterator(found):
            first, *others = _by_size(found[key], self.sizes, dim=0)
            found[key] = first
            for size, logits in zip(self.sizes[1:], others, strict=True):
                found[f"{key}_{size}"] = logits
        return found


class ResizeToScaled(MapTransform):
    """Resize images `(C, H, W)` as training and validation do.

    Args:
        keys: of the images.
        size_px: height and width afterwards.
        allow_missing_keys: whether an item may lack a key.

    Raises:
        ConfigurationError: `size_px` is no size.
    """

    def __init__(
        self, keys: KeysCollection, size_px: int, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.size_px = checked_scale("size_px", size_px)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resize the item's images."""
        found = dict(data)
        for key in self.key_iterator(found):
            found[key] = resize(found[key][None], self.size_px)[0]
        return found


class ScaleLosses:
    """Put the mean plain loss at each size into an evaluator's metrics.

    `val_loss` is that at the evaluation scale, `val_loss_128`, ... those at every size. They are
    means over samples, and without a consistency term. The raw output of a `ScalesInferer` is read,
    before post-processing splits it.

    Args:
        loss: called with logits `(B, K)` and label; a mean over the batch.
        sizes: the inferer's, in pixels.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], sizes: Sequence[int]) -> None:
        self.loss = loss
        self.sizes = tuple(sizes)
        self._reset()

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, a MONAI SupervisedEvaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._update)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _reset(self) -> None:
        self.totals = dict.fromkeys(self.sizes, 0.0)
        self.samples = 0

    def _update(self, engine: Engine) -> None:
        output: Any = engine.state.output
        label = output[CommonKeys.LABEL]
        each = _by_size(output[CommonKeys.PRED], self.sizes, dim=1)
        for size, logits in zip(self.sizes, each, strict=True):
            with torch.no_grad():
                self.totals[size] += float(self.loss(logits, label).mean()) * len(label)
        self.samples += len(label)

    def _report(self, engine: Engine) -> None:
        means = {size: total / max(self.samples, 1) for size, total in self.totals.items()}
        engine.state.metrics["val_loss"] = means[self.sizes[0]]
        engine.state.metrics.update({f"val_loss_{size}": mean for size, mean in means.items()})


def _by_size(logits: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
    """Return the logits at each size, which is the axis `dim`, the last but one.

    Raises:
        ConfigurationError: there are not so many.
    """
    if logits.ndim != dim + 2 or logits.shape[dim] != len(sizes):
        raise ConfigurationError(
            f"logits {tuple(logits.shape)} for the sizes {list(sizes)}; expected the last axes "
            f"({len(sizes)}, K), as a ScalesInferer of these sizes gives them"
        )
    return logits.unbind(dim)
