"""A network in another runtime, held against the network itself for every new size of windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import first_line
from pipeline.hardware.out_of_memory import is_out_of_memory
from pipeline.inference.export import (
    BackendError,
    ExportCache,
    export_onnx,
    network_digest,
)
from pipeline.inference.passes import Structure
from pipeline.inference.runtimes import Graph, Precision, open_graph

__all__ = ["Agreement", "ExportedNetwork", "Runtime", "flat_outputs", "plain"]


@dataclass(frozen=True)
class Agreement:
    """How far outputs lie from those of the network in torch, in float32.

    Args:
        relative: norm of the difference by the norm of the network's own output; the largest of
            several outputs.
        max_abs: largest difference of a value.
    """

    relative: float
    max_abs: float

    @classmethod
    def between(cls, found: Sequence[Tensor], expected: Sequence[Tensor]) -> Agreement:
        """Compare outputs one by one.

        Raises:
            RuntimeError: they differ in number or shape.
        """
        shapes = [[tuple(output.shape) for output in outputs] for outputs in (found, expected)]
        if shapes[0] != shapes[1]:
            raise RuntimeError(f"it gives {shapes[0]}, the network {shapes[1]}")
        pairs = [(f.double(), e.double()) for f, e in zip(found, expected, strict=True)]
        return cls(
            relative=max(_relative(f, e) for f, e in pairs),
            max_abs=max(float((f - e).abs().max()) for f, e in pairs),
        )

    def worst(self, other: Agreement | None) -> Agreement:
        """Return the larger figures of two comparisons."""
        if other is None:
            return self
        return Agreement(max(self.relative, other.relative), max(self.max_abs, other.max_abs))

    def require(self, tolerance: float, what: str) -> None:
        """Raise BackendError where `what` is further off than `tolerance`, or not a number."""
        if not self.relative <= tolerance:
            raise BackendError(
                f"backend: {what} disagrees with the network: {self}, expected at most "
                f"{tolerance:.1e}; set backend: torch, precision: float32 or a larger tolerance"
            )

    def __str__(self) -> str:
        return f"relative difference to eager float32 {self.relative:.1e}, max {self.max_abs:.1e}"


def _relative(found: Tensor, expected: Tensor) -> float:
    difference, norm = float((found - expected).norm()), float(expected.norm())
    return difference / norm if norm else difference


@dataclass(frozen=True)
class Runtime:
    """What runs an exported network.

    Args:
        name: `openvino` or `onnxruntime`.
        precision: of the computation.
        threads: at most; None: as many as torch uses.
        tolerance: largest relative difference to the network.
        cache: where exported graphs are kept.
        note: told of every graph that is used, and of its agreement.
    """

    name: str
    precision: Precision
    threads: int | None
    tolerance: float
    cache: ExportCache
    note: Callable[[Graph, Agreement], None]

    def open(self, data: bytes) -> Graph:
        """Return the ONNX graph `data`, ready to run."""
        return open_graph(self.name, data, self.precision, self.threads or torch.get_num_threads())


class ExportedNetwork:
    """Run a network's windows elsewhere; outputs are float32, in the network's own form.

    Tracing fixes what a network decides by the size of its input. So a graph may serve other sizes
    or not, or serve them wrongly: the first windows of each shape tell, and where no graph at hand
    agrees, these windows are traced.

    Args:
        network: on the CPU, in float32 and in evaluation mode.
        window: the first one, `(1, C, *spatial)`.
        runtime: what runs it.

    Raises:
        BackendError: it cannot run the network, or disagrees with it.
    """

    def __init__(self, network: Callable[..., Any], window: Tensor, runtime: Runtime) -> None:
        self._network = _checked(network, window, runtime.name)
        self._runtime = runtime
        self._digest = network_digest(self._network, window)
        self._structure = Structure(_eager(network, window))
        self._graphs: dict[tuple[int, ...], Graph] = {}
        self._graph_for(window)

    def __call__(self, windows: Tensor) -> Any:
        """Return what the network gives for `windows` `(N, C, *spatial)`.

        Raises:
            BackendError: windows of this size are a new one, and the runtime disagrees on them.
        """
        windows = plain(windows)
        outputs = self._graph_for(windows)(windows)
        return self._structure.restore([output.float() for output in outputs])

    def _graph_for(self, windows: Tensor) -> Graph:
        shape = tuple(windows.shape)
        if shape not in self._graphs:
            probe = _informative(windows)
            expected = flat_outputs(self._network, probe)
            self._graphs[shape] = self._first_agreeing(probe, expected)
        return self._graphs[shape]

    def _first_agreeing(self, windows: Tensor, expected: Sequence[Tensor]) -> Graph:
        failures = []
        for graph in self._candidates(windows):
            try:
                agreement = Agreement.between(graph(windows), expected)
                agreement.require(self._runtime.tolerance, self._runtime.name)
            except BackendError as error:
                failures.append(error)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                failures.append(self._refusal(windows, error))
            else:
                self._runtime.note(graph, agreement)
                return graph
        raise failures[-1]

    def _refusal(self, windows: Tensor, error: RuntimeError) -> BackendError:
        return BackendError(
            f"backend: {self._runtime.name} fails on windows {list(windows.shape)} "
            f"({first_line(error)}); set backend: torch"
        )

    def _candidates(self, windows: Tensor) -> Iterator[Graph]:
        """Yield graphs, from those at hand to one traced from these very windows."""
        yield from dict.fromkeys(self._graphs.values())
        shape = "x".join(str(size) for size in windows.shape)
        names = [f"{self._digest}.onnx", f"{self._digest}-{shape}.onnx"]
        kept = [self._runtime.cache.read(name) for name in names]
        for data in kept:
            if data is not None:
                yield self._runtime.open(data)
        data = export_onnx(self._network, windows)
        self._runtime.cache.write(names[0] if kept[0] is None else names[1], data)
        yield self._runtime.open(data)


def _checked(network: Callable[..., Any], window: Tensor, runtime: str) -> nn.Module:
    """Return `network` if it can be exported; raise BackendError if not."""
    if not isinstance(network, nn.Module):
        found = f"the network is a function ({type(network).__name__}), expected a torch module"
    elif window.device.type != "cpu":
        found = f"{runtime} computes on the CPU, the network is on {window.device}"
    elif network.training:
        found = "the network is in training mode, expected network.eval()"
    elif others := {t.dtype for t in [window, *network.parameters()]} - {torch.float32}:
        found = f"the network or its windows are {', '.join(map(str, others))}, expected float32"
    else:
        return network
    raise BackendError(f"backend: {found}; set backend: torch")


def _informative(windows: Tensor) -> Tensor:
    """Return `windows`, or noise of their shape where all values are one: those tell nothing."""
    if bool((windows != windows.flatten()[0]).any()):
        return windows
    return torch.randn(windows.shape, generator=torch.Generator().manual_seed(0))


def flat_outputs(network: Callable[..., Any], windows: Tensor) -> tuple[Tensor, ...]:
    """Return what `network` gives in torch and in its own precision, in a row."""
    outputs = _eager(network, windows)
    return Structure(outputs).flatten(outputs)


def _eager(network: Callable[..., Any], windows: Tensor) -> Any:
    with torch.no_grad(), torch.autocast(windows.device.type, enabled=False):
        return network(windows)


def plain(windows: Tensor) -> Tensor:
    """Return `windows` without metadata or history, which neither tracing nor a runtime takes."""
    return windows.detach().as_subclass(Tensor)
