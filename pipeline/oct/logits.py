"""Logits at the door: arrays and tensors, looked at before anything is computed from them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["as_array", "on_gpu", "refuse_non_finite", "within_range"]

_CLASSES = 3
_RATHER_LARGE = 1e290  # sums over some million rows of smaller numbers are finite


def as_array(logits: NDArray[Any] | Tensor) -> NDArray[np.floating]:
    """Return `logits` `(B, 3, H, W)` as a float32 or float64 array, the same memory if possible.

    Raises:
        InputError: the shape or the type is another one.
    """
    values = _from_tensor(logits) if _is_tensor(logits) else np.asarray(logits)
    _check_shape(values.shape)
    if values.dtype.kind not in "fiu":
        raise InputError(f"logits are of type {values.dtype}; expected real numbers")
    if values.dtype in (np.float32, np.float64):
        return values
    return values.astype(np.float32 if values.dtype == np.float16 else np.float64)


def on_gpu(logits: NDArray[Any] | Tensor) -> TypeGuard[Tensor]:
    """Return whether `logits` `(B, 3, H, W)` are a tensor on a CUDA device.

    Raises:
        InputError: such a tensor has another shape.
    """
    if not (_is_tensor(logits) and logits.is_cuda):
        return False
    _check_shape(tuple(logits.shape))
    return True


def refuse_non_finite(logits: NDArray[np.floating]) -> None:
    """Do nothing, unless a number of `logits` `(B, 3, H, W)` is not finite.

    Raises:
        InputError: with the place of the first one.
    """
    bad = np.argwhere(~np.isfinite(logits))
    if bad.size:
        image, plane, row, column = (int(index) for index in bad[0])
        raise InputError(
            f"logits of image {image}, class {plane}, row {row}, column {column} are "
            f"{logits[image, plane, row, column]}, one of {len(bad)} that are not finite; expected "
            "finite numbers: look for NaN in the image and for an overflow in half precision"
        )


def within_range(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Scale those columns of finite `logits` down whose sums would not fit into float64."""
    values = logits.astype(np.float64)
    largest = np.abs(values).max(axis=(1, 2), keepdims=True)
    return np.where(largest > _RATHER_LARGE, values * 1e-10, values)


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 4 or shape[1] != _CLASSES or 0 in shape[2:]:
        raise InputError(
            f"logits have shape {shape}; expected (B, 3, H, W), the classes above ILM, between ILM "
            "and BM, below BM: add the batch axis, pass logits and no mask"
        )


def _is_tensor(values: NDArray[Any] | Tensor) -> TypeGuard[Tensor]:
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported it
    return torch is not None and isinstance(values, torch.Tensor)


def _from_tensor(tensor: Tensor) -> NDArray[Any]:
    import torch  # loaded already

    values = tensor.detach()
    if values.dtype == torch.bfloat16:  # which NumPy does not know
        values = values.float()
    array: NDArray[Any] = values.cpu().numpy()
    return array
