"""Running statistics of batch norm, computed anew for weights that no batch has passed through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.training.processes import sum_over_processes

__all__ = ["renew_batch_norm"]


@torch.no_grad()
def renew_batch_norm(
    network: nn.Module,
    batches: Iterable[tuple[Any, bool]],
    forward: Callable[[Any], Any] | None = None,
) -> int:
    """Compute the running statistics of batch norm anew, as means over batches.

    Unlike torch's `update_bn` it leaves frozen layers alone, which would keep reset statistics,
    and dropout off, so that statistics are those of evaluation and nothing is drawn. The processes
    of a run pass their shares of a batch side by side, each layer normalises by the statistics of
    all shares together, and the result is that of one process with the whole batches.

    Args:
        network: its layers' statistics are replaced; modes of its modules stay.
        batches: inputs, each with whether they count; not read where there is no batch norm to
            renew. Every process has as many.
        forward: passes inputs through `network`; None calls it.

    Returns:
        The number of layers with new statistics.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.train()
    layers = [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.training
    ]
    network.eval()
    renewed = [_Renewed(layer) for layer in layers]
    try:
        for inputs, counted in batches if layers else ():
            for statistics in renewed:
                statistics.counted = counted
            (forward or network)(inputs)
        for statistics in renewed:
            statistics.keep()
    finally:
        for statistics in renewed:
            statistics.hook.remove()
        for module, training in modes:
            module.training = training
    return len(layers)


class _Renewed:
    """New statistics of a batch norm layer in evaluation mode, taken as batches come by.

    Before it normalises a batch, the layer gets that batch's statistics over all processes.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self.counted = True
        self.hook = layer.register_forward_pre_hook(self._take)
        self._batches = 0
        self._mean: Tensor | float = 0.0
        self._variance: Tensor | float = 0.0

    def _take(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        others = [dim for dim in range(inputs[0].ndim) if dim != 1]
        variance, mean = torch.var_mean(inputs[0], others, correction=0)
        # from here on in double precision on the CPU: some devices have none
        variance, mean = variance.double().cpu(), mean.double().cpu()
        size = inputs[0].numel() // len(mean) if self.counted else 0
        total, *sums = sum_over_processes([size, *(size * mean).tolist()])
        pooled = torch.tensor(sums, dtype=torch.float64) / total
        spread = size * (variance + (mean - pooled) ** 2)
        squares = torch.tensor(sum_over_processes(spread.tolist()), dtype=torch.float64)
        self._give(pooled, squares / total)
        self._batches += 1
        self._mean = self._mean + pooled
        self._variance = self._variance + squares / max(total - 1, 1)  # unbiased, as torch keeps it

    def _give(self, mean: Tensor | float, variance: Tensor | float) -> None:
        for statistic, value in (
            (self.layer.running_mean, mean),
            (self.layer.running_var, variance),
        ):
            if statistic is not None:
                statistic.copy_(torch.as_tensor(value))

    def keep(self) -> None:
        """Leave the means over the batches in the layer; one that none has reached stays."""
        if self._batches:
            self._give(self._mean / self._batches, self._variance / self._batches)
            if self.layer.num_batches_tracked is not None:
                self.layer.num_batches_tracked.fill_(self._batches)
