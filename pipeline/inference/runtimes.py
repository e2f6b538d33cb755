"""OpenVINO and ONNX Runtime behind one call: an exported graph on windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pipeline.errors import first_line
from pipeline.hardware.out_of_memory import is_out_of_memory
from pipeline.inference.export import BackendError, load_package

__all__ = ["Graph", "Precision", "open_graph"]

Precision = Literal["float32", "bfloat16", "float16"]

_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_FATAL_ONLY = 4  # ONNX Runtime's log level: it warns of every batch but the traced one, and
# writes each error that it raises to stderr as well


class Graph(Protocol):
    """A network in a runtime of its own.

    Attributes:
        precision: in which it computes, which need not be what was asked for.
        version: of the runtime.
    """

    precision: str
    version: str

    def __call__(self, windows: Tensor) -> Sequence[Tensor]:
        """Return the outputs `(N, C', *spatial)` for `windows` `(N, C, *spatial)` on the CPU.

        Raises:
            RuntimeError: the graph does not take windows of this size.
        """


def open_graph(name: str, data: bytes, precision: Precision, threads: int) -> Graph:
    """Return the ONNX graph `data` in the runtime `name`.

    Args:
        name: `openvino` or `onnxruntime`.
        data: content of an ONNX file.
        precision: OpenVINO computes in another one where the CPU lacks it.
        threads: at most.

    Raises:
        BackendError: the runtime is not installed, or does not take the graph.
    """
    runtime = load_package(name)
    kind: Callable[..., Graph] = _OpenVino if name == "openvino" else _OnnxRuntime
    try:
        return kind(runtime, data, precision, threads)
    except Exception as error:  # neither runtime has a type of its own for all of its errors
        if is_out_of_memory(error):
            raise
        raise BackendError(
            f"backend: {name} does not take the exported network ({first_line(error)}); "
            "set backend: torch"
        ) from error


class _OpenVino:
    def __init__(self, openvino: Any, data: bytes, precision: Precision, threads: int) -> None:
        # Left alone, OpenVINO computes in bfloat16 where the CPU has it.
        settings = {"INFERENCE_PRECISION_HINT": _HINTS[precision], "INFERENCE_NUM_THREADS": threads}
        core = openvino.Core()
        # A core gives the thread that compiles a stack for signal handlers, and frees it when it is
        # released, wherever that is and whoever uses it by then: the next signal was a segmentation
        # fault (OpenVINO 2026.4). So the thread that compiles is one that ends at once.
        with ThreadPoolExecutor(1) as thread:
            model = thread.submit(core.read_model, data).result()
            compiled = thread.submit(core.compile_model, model, "CPU", settings).result()
        names = {hint: name for name, hint in _HINTS.items()}
        hint = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.precision = names.get(hint, hint)
        self.version = str(openvino.__version__)
        self._request = compiled.create_infer_request()

    def __call__(self, windows: Tensor) -> Sequence[Tensor]:
        # The request writes its next outputs where these lie: have them copied.
        found = _outputs(lambda: self._request.infer([windows.numpy()], share_outputs=False))
        return [torch.from_numpy(found[index]) for index in range(len(found))]


class _OnnxRuntime:
    def __init__(self, onnxruntime: Any, data: bytes, precision: Precision, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY
        self._session = onnxruntime.InferenceSession(
            data, options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        self.precision: str = precision
        self.version = str(onnxruntime.__version__)

    def __call__(self, windows: Tensor) -> Sequence[Tensor]:
        found = _outputs(lambda: self._session.run(None, {self._input: windows.numpy()}))
        return [torch.from_numpy(array) for array in found]


def _outputs(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:  # as above
        if is_out_of_memory(error):
            raise
        raise RuntimeError(first_line(error)) from error
