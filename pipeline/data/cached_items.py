"""Samples as plain data and tensors, which `torch.load(weights_only=True)` reads, and back."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from pipeline.errors import ConfigurationError

__all__ = ["pack", "unpack"]

_KIND = "kind"


def pack(value: Any, where: str = "sample") -> Any:
    """Return `value` in types that need no code to be read.

    Args:
        value: tensors, MetaTensors with their history, arrays, paths and plain values, nested.
        where: its place, for messages.

    Raises:
        ConfigurationError: it holds an object of another kind.
    """
    if isinstance(value, Enum):  # MONAI's keys are strings too, and equal to them
        return pack(value.value, where)
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype):
        return value
    if isinstance(value, MetaTensor):
        return _packed_meta_tensor(value, where)
    if isinstance(value, Tensor):
        return _compact(value)
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return _packed_array(value)
    if isinstance(value, PurePath):
        return {_KIND: "path", "value": str(value)}
    if isinstance(value, Mapping):
        items = [[pack(k, where), pack(v, f"{where}[{k!r}]")] for k, v in value.items()]
        return {_KIND: "dict", "items": items}
    if isinstance(value, list | tuple):
        items = [pack(item, f"{where}[{place}]") for place, item in enumerate(value)]
        return items if isinstance(value, list) else {_KIND: "tuple", "items": items}
    raise ConfigurationError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a cache on disk "
        "cannot keep; expected tensors, arrays and plain values: drop it with DeleteItemsd, or use "
        "CacheDataset"
    )


def unpack(packed: Any) -> Any:
    """Return what `pack` was given, in memory of its own.

    Raises:
        ValueError: `packed` is not from `pack`.
    """
    if isinstance(packed, list):
        return [unpack(item) for item in packed]
    if not isinstance(packed, dict):
        return packed
    kind = packed.get(_KIND)
    if kind == "dict":
        return {unpack(key): unpack(value) for key, value in packed["items"]}
    if kind == "tuple":
        return tuple(unpack(item) for item in packed["items"])
    if kind == "path":
        return Path(packed["value"])
    if kind == "array":
        raw = packed["bytes"].numpy().view(packed["dtype"]).reshape(packed["shape"])
        return raw[()] if packed["scalar"] else raw
    if kind == "meta_tensor":
        return _meta_tensor(packed)
    raise ValueError(f"an item of kind {kind!r}")


def _packed_array(value: Any) -> dict[str, Any]:
    array = np.ascontiguousarray(value)
    return {
        _KIND: "array",
        "dtype": array.dtype.str,
        "shape": list(value.shape),
        "scalar": isinstance(value, np.generic),
        "bytes": torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy()),
    }


def _packed_meta_tensor(value: MetaTensor, where: str) -> dict[str, Any]:
    return {
        _KIND: "meta_tensor",
        "tensor": _compact(value.as_tensor()),
        "meta": pack(dict(value.meta), f"{where}.meta"),
        "applied": pack(list(value.applied_operations), f"{where}.applied_operations"),
        "pending": pack(list(value.pending_operations), f"{where}.pending_operations"),
    }


def _meta_tensor(packed: Mapping[str, Any]) -> MetaTensor:
    tensor = MetaTensor(
        packed["tensor"],
        meta=unpack(packed["meta"]),
        applied_operations=unpack(packed["applied"]),
    )
    for operation in unpack(packed["pending"]):
        tensor.push_pending_operation(operation)
    return tensor


def _compact(value: Tensor) -> Tensor:
    """Return `value` without the rest of the storage that it is a view of."""
    value = value.detach()
    if value.untyped_storage().nbytes() == value.numel() * value.element_size():
        return value
    return value.clone(memory_format=torch.contiguous_format)
