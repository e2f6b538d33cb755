"""Look inside a network: which layers to watch, what they put out, and its graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.errors import ConfigurationError

__all__ = [
    "Activation",
    "ActivationRecorder",
    "select_layers",
    "summarise",
    "unwrap",
    "write_graph",
]

logger = logging.getLogger(__name__)

MAX_LAYERS = 12
HISTOGRAM_VALUES = 65_536  # a histogram of 8 million values takes half a second, of these 3 ms
GRAPH_SIDE_PX = 64  # a multiple of 32, the largest stride of our networks

# What the tracer and a network's own checks raise when a forward pass cannot be recorded.
_UNTRACEABLE = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError,
    torch.jit.TracingCheckError,
)  # fmt: skip


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of `torch.compile` and of data parallelism."""
    inner = getattr(network, "_orig_mod", network)
    if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = inner.module
    return network if inner is network else unwrap(inner)


def select_layers(
    network: nn.Module, layers: str | Sequence[str] | None, limit: int = MAX_LAYERS
) -> dict[str, nn.Module]:
    """Return the modules to watch by name, in the order of the network.

    Args:
        network: the network, wrapped or not.
        layers: `auto` for the top-level blocks that have parameters, a list of names as
            `named_modules` gives them, or None for none.
        limit: most layers that `auto` chooses; of more blocks an evenly spaced choice is taken.

    Raises:
        ConfigurationError: a name is not a module of the network; the closest one is named.
    """
    root = unwrap(network)
    if layers is None:
        return {}
    if layers == "auto":
        return _top_blocks(root, limit)
    known = {name: module for name, module in root.named_modules(remove_duplicate=False) if name}
    if isinstance(layers, str) or not all(isinstance(name, str) for name in layers):
        raise ConfigurationError(
            f"activation_layers: expected auto, a list of module names or null, got {layers!r}"
        )
    for name in layers:
        if name not in known:
            close = get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigurationError(
                f"activation_layers: {type(root).__name__} has no module {name!r}{hint}"
            )
    return {name: known[name] for name in known if name in layers}


def _top_blocks(root: nn.Module, limit: int) -> dict[str, nn.Module]:
    """Return at most `limit` blocks of `root`, looking through a block that holds all others."""
    blocks = _called_children(root)
    while len(blocks) == 1:
        [(name, only)] = blocks.items()
        inner = _called_children(only, f"{name}.")
        if not inner:
            break
        blocks = inner
    names = [name for name, block in blocks.items() if any(True for _ in block.parameters())]
    if len(names) > limit:
        places = np.linspace(0, len(names) - 1, limit).round().astype(int)
        names = [names[place] for place in places]
    return {name: blocks[name] for name in names} or {"network": root}


def _called_children(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Return the children of `module`; lists and dicts, which nobody calls, are opened."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            found.update(_called_children(child, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = child
    return found


@dataclass(frozen=True)
class Activation:
    """What one layer put out.

    Args:
        mean: mean of all values; NaN where one of them is NaN.
        std: standard deviation of all values.
        zeros_share: share of values that are exactly zero.
        max_abs: largest absolute value.
        values: at most 65,536 of the finite values, for a histogram.
    """

    mean: float
    std: float
    zeros_share: float
    max_abs: float
    values: NDArray[np.float32]

    @property
    def statistics(self) -> dict[str, float]:
        """The four figures by name."""
        return {
            "mean": self.mean,
            "std": self.std,
            "zeros_share": self.zeros_share,
            "max_abs": self.max_abs,
        }


def summarise(output: Tensor) -> Activation:
    """Return the statistics of `output`, over all of it, and a sample of its values.

    The sample is random with a seed of its own: a regular stride would follow the image's columns.
    """
    values = output.detach().as_subclass(torch.Tensor).float().flatten()
    figures = [values.mean(), values.std(correction=0), (values == 0).float().mean()]
    mean, std, zeros_share, max_abs = torch.stack([*figures, values.abs().max()]).tolist()
    if values.numel() > HISTOGRAM_VALUES:
        seeded = torch.Generator().manual_seed(0)
        chosen = torch.randint(values.numel(), (HISTOGRAM_VALUES,), generator=seeded)
        values = values[chosen.to(values.device)]
    sample = values[values.isfinite()].cpu().numpy()
    return Activation(mean, std, zeros_share, max_abs, sample)


class ActivationRecorder:
    """Record the first output of each layer while armed; between, no hook is on the network.

    With a sliding window the first output is the first window's. A layer that puts out a tuple, a
    list or a dict is recorded by its first tensor; one that is not called has no record.

    Args:
        layers: modules by name, such as `select_layers` returns.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self.records: dict[str, Activation] = {}
        self._handles: list[Any] = []

    def arm(self) -> None:
        """Forget the records and listen."""
        self.disarm()
        self.records = {}
        self._handles = [
            module.register_forward_hook(partial(self._record, name))
            for name, module in self.layers.items()
        ]

    def disarm(self) -> None:
        """Take the hooks off; the records stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> ActivationRecorder:
        self.arm()
        return self

    def __exit__(self, *error: object) -> None:
        self.disarm()

    def _record(self, name: str, _module: nn.Module, _inputs: object, output: object) -> None:
        tensor = _first_tensor(output)
        if name not in self.records and tensor is not None and tensor.numel():
            self.records[name] = summarise(tensor)


def _first_tensor(output: object) -> Tensor | None:
    """Return the first tensor in `output`, or None."""
    if isinstance(output, Tensor):
        return output
    parts: Sequence[object] = ()
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif isinstance(output, list | tuple):
        parts = output
    found = (_first_tensor(part) for part in parts)
    return next((tensor for tensor in found if tensor is not None), None)


def write_graph(writer: Any, network: nn.Module, inputs: Tensor) -> bool:
    """Write the graph of `network` through `writer`; log one line where it cannot be traced.

    Neither the weights nor the modes of the modules nor the random state are changed by it.

    Args:
        writer: a TensorBoard `SummaryWriter`.
        network: the network, wrapped or not.
        inputs: one batch `(B, C, ...)`; the first item, cut to 64 pixels a side, is traced, and
            uncut where the network needs its full size.

    Returns:
        True if the graph was written.
    """
    root = unwrap(network)
    item = inputs[:1].detach().as_subclass(torch.Tensor)
    cut = item
    for axis in range(2, item.ndim):
        cut = cut.narrow(axis, 0, min(GRAPH_SIDE_PX, item.shape[axis]))
    reason: BaseException | None = None
    for attempt in [cut] if cut.shape == item.shape else [cut, item]:
        try:
            with _undisturbed(root, attempt.device):
                writer.add_graph(root, attempt.contiguous(), use_strict_trace=False)
        except _UNTRACEABLE as error:
            reason = error
        else:
            return True
    why = str(reason).strip().partition("\n")[0]
    logger.warning("tensorboard: no graph, %s cannot be traced: %s", type(root).__name__, why)
    return False


@contextlib.contextmanager
def _undisturbed(root: nn.Module, device: torch.device) -> Iterator[None]:
    """Trace in silence and put back every module's mode and the random state."""
    modes = [(module, module.training) for module in root.modules()]
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),  # torch prints the error it then raises
        ):
            warnings.simplefilter("ignore")  # the tracer warns of every branch on a shape
            yield
    finally:
        # The tracer puts all modules into the root's mode, also those frozen by `eval()`.
        for module, training in modes:
            module.training = training
