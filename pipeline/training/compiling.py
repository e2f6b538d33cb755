"""Compile a network in place, and go on without where that cannot be done."""

from __future__ import annotations

import logging
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from pipeline.errors import ConfigurationError

__all__ = ["compile_network"]

logger = logging.getLogger(__name__)

Backend = str | Callable[..., Any]


def compile_network(
    network: nn.Module,
    enabled: bool = True,
    backend: Backend = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
) -> bool:
    """Let `network` compile itself when it is called, and anew for other shapes and modes.

    Names in the state dict stay, and a deep copy of the network is not compiled: averaged weights
    are validated on images of many sizes, each of which would have to be compiled. Where compiling
    fails, one warning gives the reason and the network runs as if this had not been called; a
    missing C++ compiler is found at the first call.

    Results agree within rounding. `inductor` draws dropout in a way of its own: the run can be
    repeated and resumed, but it is not the one without compiling.

    Args:
        network: changed in place.
        enabled: False leaves the network as it is.
        backend: name of one of torch's compilers, or a function that compiles a graph.
        mode: what `inductor` optimises for, such as `reduce-overhead` or `max-autotune`.
        dynamic: compile for any size; None does so for a size that has changed.

    Returns:
        Whether the network will be compiled.

    Raises:
        ConfigurationError: there is no such backend or mode.
    """
    if not enabled:
        return False
    _check(backend, mode)
    from torch._functorch import config

    # Compile the backward pass in the forward one, where a failure can still be mended. Set for
    # good: to set and reset it at every call would take 2 ms each.
    config.force_non_lazy_backward_lowering = True
    try:
        network.compile(backend=backend, mode=mode, dynamic=dynamic)
    except RuntimeError as error:  # this system, or this version of Python
        _warn(network, error)
        return False
    # A copy of the network leaves this attribute behind.
    network._compiled_call_impl = _CompiledOrNot(network, network._compiled_call_impl)
    logger.info(
        "%s is compiled by %s when it is first called: that step takes seconds to minutes",
        type(network).__name__, _name(backend),
    )  # fmt: skip
    return True


class _CompiledOrNot:
    """Call the compiled network; once compiling has failed, the network as it is."""

    def __init__(self, network: nn.Module, compiled: Callable[..., Any] | None) -> None:
        self.network = network
        self.compiled = compiled

    def __call__(self, *inputs: Any, **settings: Any) -> Any:
        if self.compiled is None or torch.jit.is_tracing():  # TensorBoard traces the graph
            return self.network._call_impl(*inputs, **settings)
        try:
            return self.compiled(*inputs, **settings)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, TorchDynamoException):
                raise
            reason = error
        self.compiled = None
        result = self.network._call_impl(*inputs, **settings)  # raises what is wrong with the call
        _warn(self.network, reason)
        return result


def _check(backend: Backend, mode: str | None) -> None:
    if isinstance(backend, str):
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            close = get_close_matches(backend, known, n=1, cutoff=0.0)
            raise ConfigurationError(
                f"compile: torch has no backend {backend!r}; did you mean {close[0]!r}?"
            )
    if mode is None:
        return
    if backend != "inductor":
        raise ConfigurationError(
            f"compile: mode {mode!r} belongs to inductor, and the backend is {_name(backend)}; "
            "leave it out"
        )
    modes = list(torch._inductor.list_mode_options())
    if mode not in modes:
        raise ConfigurationError(f"compile: mode must be one of {', '.join(modes)}, got {mode!r}")


def _name(backend: Backend) -> str:
    return backend if isinstance(backend, str) else getattr(backend, "__name__", repr(backend))


def _warn(network: nn.Module, error: BaseException) -> None:
    """Say in one line why `network` is not compiled."""
    while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
        error = inner
    reason = str(error).strip().partition("\n")[0]
    logger.warning(
        "%s is not compiled and runs as without: %s: %s",
        type(network).__name__, type(error).__name__, reason,
    )  # fmt: skip
