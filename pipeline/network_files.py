"""One network as the bytes of a file that other programs run, and as what such a file computes.

Each function writes a format and opens what it wrote, so that its answers can be held against the
network's own before the bytes get a name.
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import first_line
from pipeline.hardware.out_of_memory import is_out_of_memory
from pipeline.inference.export import BackendError, export_onnx, load_package
from pipeline.inference.exported import flat_outputs
from pipeline.inference.runtimes import open_graph

__all__ = ["ABOUT", "WRITERS", "NetworkFile", "network_file"]

logger = logging.getLogger(__name__)

ABOUT = "lamina.json"  # the name under which a format keeps what the file says of itself


@dataclass(frozen=True)
class NetworkFile:
    """An exported network.

    Args:
        files: bytes by suffix, the one that is opened first.
        run: outputs in a row for windows `(N, C, *spatial)`, computed by the exported network;
            raises RuntimeError where it does not take windows of that size.
    """

    files: Mapping[str, bytes]
    run: Callable[[Tensor], Sequence[Tensor]]


def network_file(kind: str, network: nn.Module, window: Tensor, about: str) -> NetworkFile:
    """Return `network` in the format `kind`.

    Args:
        kind: a key of `WRITERS`.
        network: on the CPU, in float32 and in evaluation mode.
        window: an example `(1, C, *spatial)`. A format that is traced keeps what the network
            decides by its size.
        about: text that the file keeps within.

    Raises:
        BackendError: a package is missing, or the format does not take the network.
    """
    try:
        return WRITERS[kind](network, window, about)
    except BackendError:
        raise
    except Exception as error:  # none of the exporters has a type of its own for all of its errors
        if is_out_of_memory(error):
            raise
        raise BackendError(
            f"{type(network).__name__} cannot be exported as {kind} ({first_line(error)}); "
            "choose another --format"
        ) from error


def _onnx(network: nn.Module, window: Tensor, about: str) -> NetworkFile:
    onnx = load_package("onnx")
    model = onnx.load_from_string(export_onnx(network, window))
    onnx.helper.set_model_props(model, {ABOUT: about})
    data: bytes = model.SerializeToString()
    return NetworkFile({".onnx": data}, open_graph("onnxruntime", data, "float32", _threads()))


def _openvino(network: nn.Module, window: Tensor, about: str) -> NetworkFile:
    openvino = load_package("openvino")
    graph = export_onnx(network, window)

    def convert() -> tuple[bytes, bytes, Any]:
        core = openvino.Core()
        model = core.read_model(graph)
        model.set_rt_info(about, [ABOUT])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.xml"
            openvino.serialize(model, path)
            data = path.read_bytes(), path.with_suffix(".bin").read_bytes()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": _threads()}
        return *data, core.compile_model(core.read_model(*data), "CPU", settings)

    with ThreadPoolExecutor(1) as thread:  # one that ends: see `pipeline.inference.runtimes`
        text, weights, compiled = thread.submit(convert).result()

    def run(windows: Tensor) -> list[Tensor]:
        found = compiled([windows.numpy()])
        return [torch.from_numpy(found[index].copy()) for index in range(len(found))]

    return NetworkFile({".xml": text, ".bin": weights}, run)


def _pt2(network: nn.Module, window: Tensor, about: str) -> NetworkFile:
    # Two of a batch: torch.export takes a size of one for a constant.
    windows = window.repeat_interleave(2, dim=0)
    axes = {axis: torch.export.Dim.AUTO for axis in range(window.ndim) if axis != 1}
    with torch.no_grad():
        program = torch.export.export(network, (windows,), dynamic_shapes=(axes,))
    program.example_inputs = None  # or they would be most of the file
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={ABOUT: about})
    buffer.seek(0)
    opened = torch.export.load(buffer).module()
    return NetworkFile({".pt2": buffer.getvalue()}, lambda windows: flat_outputs(opened, windows))


def _torchscript(network: nn.Module, window: Tensor, about: str) -> NetworkFile:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # sizes are traced
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch 2.13: the format
        try:
            module = torch.jit.script(network)  # unlike a trace it takes any size
        except Exception as error:  # a network of one's own that TorchScript cannot compile
            if is_out_of_memory(error):
                raise
            logger.warning("TorchScript by a trace, for its size alone: %s", first_line(error))
            module = torch.jit.trace(network, window, check_trace=False)
        buffer = io.BytesIO()
        torch.jit.save(module, buffer, _extra_files={ABOUT: about})
        buffer.seek(0)
        opened = torch.jit.load(buffer)
    return NetworkFile({".ts": buffer.getvalue()}, lambda windows: flat_outputs(opened, windows))


def _threads() -> int:
    return torch.get_num_threads()


WRITERS: dict[str, Callable[[nn.Module, Tensor, str], NetworkFile]] = {
    "onnx": _onnx,
    "pt2": _pt2,
    "torchscript": _torchscript,
    "openvino": _openvino,
}
