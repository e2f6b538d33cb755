"""A network made ready to run: by its backend, on its devices, in its own type."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigurationError
from pipeline.hardware import allocator
from pipeline.inference.backends import Backend
from pipeline.inference.passes import Passes

__all__ = ["PreparedNetwork"]

_tune_allocator_once = functools.cache(allocator.tune_allocator)


class PreparedNetwork:
    """Keeps the network it was last asked for ready, until its weights change.

    Args:
        backend: what runs it: `torch`, `openvino`, `onnxruntime`, `auto`, or a `Backend`.
        batch_size: windows per pass; `auto`: as many as memory allows.
        devices: that share the windows; None: the windows' own.
        tune_allocator: on a CPU, have glibc keep large blocks.
        spatial: whether outputs have the size of the windows; else they are one per window.

    Raises:
        ConfigurationError: `batch_size` is below 1, or the backend is unknown.
    """

    def __init__(
        self,
        backend: str | Backend,
        batch_size: int | Literal["auto"],
        devices: Sequence[str] | None,
        *,
        tune_allocator: bool = True,
        spatial: bool = True,
    ) -> None:
        if batch_size != "auto" and batch_size < 1:
            raise ConfigurationError(
                f"sw_batch_size must be auto or at least 1, got {batch_size!r}"
            )
        self.backend = Backend(backend) if isinstance(backend, str) else backend
        self.batch_size = batch_size
        self.devices = devices
        self.tune_allocator = tune_allocator
        self.spatial = spatial
        self._ready: tuple[Any, list[Callable[[Tensor], Any]]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the networks made ready, which another process prepares for itself."""
        return {**self.__dict__, "_ready": None}

    def passes(
        self,
        network: Callable[..., Any],
        window: Tensor,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Passes:
        """Return what runs `network` on windows: by the backend, in the network's own type.

        Args:
            network: a module, or any function of windows.
            window: one of them, `(1, C, *roi)`.
            args: further arguments of the network.
            kwargs: further arguments of the network.
        """
        if self.tune_allocator and window.device.type == "cpu":
            _tune_allocator_once()
        if args or kwargs:
            network = functools.partial(_call_with, network, args, kwargs or {})
        dtype = _dtype_for(network, window)
        devices = [torch.device(d) for d in self.devices or [str(window.device)]]
        key = (network, _versions(network))
        if self._ready is None or self._ready[0] != key:
            window = window.to(dtype)
            replicas = [network] + [copy.deepcopy(network) for _ in devices[1:]]
            ready = [
                self.backend.prepare(_moved(replica, device), window.to(device))
                for replica, device in zip(replicas, devices, strict=True)
            ]
            self._ready = key, ready
        predictors = [functools.partial(_call_as, run, dtype) for run in self._ready[1]]
        return Passes(predictors, devices, self.batch_size, spatial=self.spatial)


def _call_with(
    network: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], window: Tensor
) -> Any:
    return network(window, *args, **kwargs)


def _call_as(run: Callable[[Tensor], Any], dtype: torch.dtype, windows: Tensor) -> Any:
    return run(windows.to(dtype))


def _moved(network: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    return network.to(device) if isinstance(network, nn.Module) else network


def _dtype_for(network: Callable[..., Any], window: Tensor) -> torch.dtype:
    """Return the type in which `network` takes windows: its parameters', else float32 at least."""
    if isinstance(network, nn.Module):
        for parameter in network.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.float64 if window.dtype == torch.float64 else torch.float32


def _versions(network: Callable[..., Any]) -> tuple[int, ...]:
    """Return counts that change with the weights: an exported network does not follow them."""
    if not isinstance(network, nn.Module):
        return ()
    return tuple(0 if p.is_inference() else p._version for p in network.parameters())
