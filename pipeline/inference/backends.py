"""What runs the network: torch itself, or a runtime that is faster on a CPU."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigurationError, first_line
from pipeline.hardware.out_of_memory import is_out_of_memory
from pipeline.inference.export import BackendError, ExportCache
from pipeline.inference.exported import Agreement, ExportedNetwork, Runtime, flat_outputs, plain
from pipeline.inference.passes import Structure
from pipeline.inference.runtimes import Graph, Precision

__all__ = ["Backend"]

logger = logging.getLogger(__name__)

Predict = Callable[[Tensor], Any]
Name = Literal["torch", "openvino", "onnxruntime", "auto"]

_NAMES = ("torch", "openvino", "onnxruntime", "auto")
_TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}


class Backend:
    """How a network is run.

    Whatever is not torch in float32 is compared with it on the first window; an exported network
    on the first windows of every size.

    Args:
        name: `torch`; `openvino` or `onnxruntime`, on a CPU; `auto`: OpenVINO on a CPU where it is
            installed and agrees, otherwise torch, and the log says why.
        precision: of the computation; outputs are float32. ONNX Runtime knows `float32` alone.
        compile: by `torch.compile`; where that fails, the network runs as it is.
        channels_last: memory format in torch; on a CPU faster in 2-D, slower in 3-D.
        cache_dir: folder for exported networks; None: `backend_cache` beside `checkpoint`.
        checkpoint: file of the weights.
        tolerance: largest relative difference; None: 1e-3, and 5e-2 in the lower precisions.
        threads: of OpenVINO and ONNX Runtime; None: as many as torch uses.

    Raises:
        ConfigurationError: a value or a combination that does not exist.
    """

    def __init__(
        self,
        name: Name | str = "torch",
        precision: Precision = "float32",
        compile: bool = False,  # noqa: A002 - what torch calls it
        channels_last: bool = False,
        cache_dir: str | None = None,
        tolerance: float | None = None,
        threads: int | None = None,
        checkpoint: str | None = None,
    ) -> None:
        if name not in _NAMES:
            raise ConfigurationError(f"backend must be one of {', '.join(_NAMES)}, got {name!r}")
        if precision not in _TOLERANCES:
            raise ConfigurationError(
                f"backend: precision must be one of {', '.join(_TOLERANCES)}, got {precision!r}"
            )
        if name == "onnxruntime" and precision != "float32":
            raise ConfigurationError(
                f"backend: onnxruntime computes in float32, got precision {precision!r}; "
                "set backend: openvino or torch"
            )
        if name in ("openvino", "onnxruntime") and (compile or channels_last):
            raise ConfigurationError(
                f"backend: compile and channels_last belong to torch, got {name}; set them to false"
            )
        if threads is not None and threads < 1:
            raise ConfigurationError(f"backend: threads must be at least 1, got {threads!r}")
        if tolerance is not None and not tolerance >= 0:
            raise ConfigurationError(f"backend: tolerance must not be negative, got {tolerance!r}")
        self.name = name
        self.precision = precision
        self.compile = compile
        self.channels_last = channels_last
        self.cache_dir = cache_dir
        self.tolerance = _TOLERANCES[precision] if tolerance is None else tolerance
        self.threads = threads
        self.checkpoint = checkpoint
        self._cache: ExportCache | None = None
        self._agreement: Agreement | None = None
        self._used: dict[str, Any] = {}
        self._told = ""

    def request(self) -> dict[str, Any]:
        """Return what was asked for, as plain data: the same before and after a run."""
        return {
            "name": self.name,
            "precision": self.precision,
            "compile": self.compile,
            "channels_last": self.channels_last,
        }

    def settings(self) -> dict[str, Any]:
        """Return what is in use, as plain data for a sidecar; complete after `prepare`.

        `agreement` holds the largest differences to torch in float32 that were seen, None for that
        itself; `reason` says why `auto` took torch.
        """
        agreement = None if self._agreement is None else asdict(self._agreement)
        return {
            **self.request(),
            "requested": self.name,
            "versions": {},
            "reason": None,
            **self._used,
            "agreement": agreement,
        }

    def prepare(self, network: Callable[..., Any], window: Tensor) -> Predict:
        """Return what to call with windows instead of `network`.

        Args:
            network: from windows `(N, C, *spatial)` to a tensor, or a row or mapping of tensors.
                It is left as it is; what is exported keeps the weights of now.
            window: the first one, `(1, C, *spatial)`, on the network's device.

        Returns:
            A function of any number and size of windows that gives what `network` gives.

        Raises:
            BackendError: what was asked for by name is not installed, cannot run the network or
                disagrees with it; a ConfigurationError.
        """
        window = plain(window)
        if self.name == "torch":
            return self._prepare_torch(network, window)
        if self.name != "auto":
            return self._prepare_exported(self.name, network, window)

        def fall_back(error: BackendError) -> Predict:
            return self._prepare_torch(network, window, str(error))

        try:
            return _UntilRefused(self._prepare_exported("openvino", network, window), fall_back)
        except BackendError as error:
            return fall_back(error)

    def _prepare_torch(
        self, network: Callable[..., Any], window: Tensor, reason: str | None = None
    ) -> Predict:
        self._agreement = None
        self._used = {"name": "torch", "versions": {"torch": str(torch.__version__)}}
        self._used["reason"] = reason
        if self.precision == "float32" and not self.compile and not self.channels_last:
            self._log()
            return network
        tuned = _Tuned(network, self.precision, self.compile, self.channels_last)
        found = flat_outputs(tuned, window)
        self._agreement = Agreement.between(found, flat_outputs(network, window))
        self._agreement.require(self.tolerance, f"torch in {self.precision}")
        self._used["compile"] = tuned.is_compiled
        self._log()
        return tuned

    def _prepare_exported(self, name: str, network: Callable[..., Any], window: Tensor) -> Predict:
        self._agreement = None
        self._used = {"name": name, "compile": False, "channels_last": False}

        def note(graph: Graph, agreement: Agreement) -> None:
            self._agreement = agreement.worst(self._agreement)
            self._used["precision"] = graph.precision
            self._used["versions"] = {"torch": str(torch.__version__), name: graph.version}

        if self._cache is None:
            self._cache = ExportCache(self.cache_dir, self.checkpoint)
        runtime = Runtime(name, self.precision, self.threads, self.tolerance, self._cache, note)
        exported = ExportedNetwork(network, window, runtime)
        self._log()
        return exported

    def _log(self) -> None:
        used = self.settings()
        facts = [self._agreement, used["reason"]]
        told = [used["precision"], *(str(fact) for fact in facts if fact is not None)]
        line = f"backend: {used['name']}, {'; '.join(told)}"
        if line != self._told:  # a network in training is prepared again and again
            logger.info(line)
        self._told = line


class _Tuned:
    """A network in torch: compiled, in a lower precision or in another memory format."""

    def __init__(
        self,
        network: Callable[..., Any],
        precision: Precision,
        compile: bool,  # noqa: A002 - as above
        channels_last: bool,
    ) -> None:
        # Autocast costs within 5 % of what a copy in the lower type does, and norms stay float32.
        self._dtype = None if precision == "float32" else getattr(torch, precision)
        self._channels_last = channels_last
        if channels_last and isinstance(network, nn.Module):
            network = _in_channels_last(network)
        self._network = network
        self._compiled: Callable[..., Any] | None = torch.compile(network) if compile else None

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def __call__(self, windows: Tensor) -> Any:
        if self._channels_last:
            windows = windows.contiguous(memory_format=_channels_last(windows))
        with self._autocast(windows.device.type):
            outputs = self._outputs(windows)
        structure = Structure(outputs)
        return structure.restore([output.float() for output in structure.flatten(outputs)])

    def _autocast(self, device: str) -> contextlib.AbstractContextManager[Any]:
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device, self._dtype)

    def _outputs(self, windows: Tensor) -> Any:
        if self._compiled is not None:
            try:
                return self._compiled(windows)
            except RuntimeError as error:  # one of the network itself comes again below
                if is_out_of_memory(error):
                    raise
                logger.warning("torch.compile failed, running as is: %s", first_line(error))
                self._compiled = None
        return self._network(windows)


def _channels_last(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d


def _in_channels_last(network: nn.Module) -> nn.Module:
    """Return a copy of `network` with the kernels of its convolutions in channels-last order."""
    copied = copy.deepcopy(network)
    for parameter in copied.parameters():
        if parameter.ndim in (4, 5):
            parameter.data = parameter.data.contiguous(memory_format=_channels_last(parameter))
    return copied


class _UntilRefused:
    """An exported network until it refuses a new size of windows, then another for good."""

    def __init__(self, exported: Predict, fall_back: Callable[[BackendError], Predict]) -> None:
        self._predict = exported
        self._fall_back = fall_back

    def __call__(self, windows: Tensor) -> Any:
        try:
            return self._predict(windows)
        except BackendError as error:
            self._predict = self._fall_back(error)
        return self._predict(windows)
