"""What a CPU's convolutions take inside, which no tensor shows.

oneDNN computes in a layout of its own, with channels in groups of 16. From tensors in the ordinary
layout it makes copies, which live as long as the operator does; tensors in the layout
`channels_last` are used as they are. Measured for torch 2.13 on a processor with AVX-512.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["workspace_bytes"]

_GROUP, _IMAGE = 16, 3
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def workspace_bytes(operator: Any, arguments: tuple[Any, ...], result: Any) -> int:
    """Return the bytes that an operator takes beside its arguments and results.

    Args:
        operator: as a dispatch mode sees it; all but convolutions take nothing.
        arguments: its positional arguments.
        result: what it returned.
    """
    if operator is torch.ops.aten.convolution.default:
        inputs, weight, output, grouped = arguments[0], arguments[1], result, 0
    elif operator is torch.ops.aten.convolution_backward.default:
        output, inputs, weight = arguments[:3]
        grouped = _grouped_weight(weight, groups=arguments[9])
    else:
        return 0
    last = _LAST.get(inputs.dim())
    if last is None or inputs.device.type != "cpu" or _pointwise_2d(weight):
        return 0
    if any(
        tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous()
        for tensor in (inputs, weight)
    ):
        return grouped
    return max(_copy(inputs) + _copy(output), int(weight.nbytes), grouped)


def _grouped_weight(weight: Tensor, groups: int) -> int:
    """Return the size of a weight's gradient where each group of channels is filled up by itself.

    With a group per channel this is 256 times the weight.
    """
    if groups == 1:
        return 0
    inside, outside = weight.shape[1], weight.shape[0] // groups
    return int(weight.nbytes) // (inside * outside) * _filled(inside) * _filled(outside)


def _pointwise_2d(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.shape[2:].numel() == 1


def _copy(tensor: Tensor) -> int:
    """Return the size of a copy with channels in groups; an image's stay as they are."""
    channels = tensor.shape[1]
    if channels <= _IMAGE:
        return int(tensor.nbytes)
    return int(tensor.nbytes) // channels * _filled(channels)


def _filled(channels: int) -> int:
    """Return `channels` up to the next full group."""
    return -(-channels // _GROUP) * _GROUP
