"""Compute with tensors that have shapes and no data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

__all__ = ["without_data"]

_RANGES = frozenset({torch.arange, torch.linspace})
_READING = frozenset(
    {Tensor.unbind, Tensor.__getitem__, Tensor.item, Tensor.tolist, Tensor.__float__}
    | {Tensor.__int__, Tensor.__bool__}
)
_FEW = 64  # elements


@contextmanager
def without_data() -> Iterator[None]:
    """Make every tensor inside without data, and leave every random state as it was.

    Short ranges keep their data: networks and losses read lists of axes or rates from them.
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _RangesWithData():
            yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


class _RangesWithData(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result_has_data = func in _RANGES and _is_short(func, args, kwargs or {})
        if result_has_data or (func in _READING and not isinstance(args[0], FakeTensor)):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_short(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(func(*args, **kwargs).numel() <= _FEW)
