"""Networks as ONNX graphs: traced once, and kept by a hash of what they compute.

ONNX rather than OpenVINO's own converter: one file serves both runtimes, tracing takes a fraction
of the time, and the converter reports its use over the internet.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.atomic import check_writable, write_bytes, write_text
from pipeline.errors import ConfigurationError, ResourceError, first_line
from pipeline.hardware.out_of_memory import is_out_of_memory
from pipeline.inference.passes import Structure

__all__ = [
    "BackendError",
    "ExportCache",
    "export_onnx",
    "load_package",
    "network_digest",
]

logger = logging.getLogger(__name__)

_OPSET = 17
_EXTRAS = {"openvino": "openvino", "onnxruntime": "onnx", "onnx": "onnx"}


class BackendError(ConfigurationError):
    """A backend is not installed, or does not run this network as torch does (exit 2)."""


class ExportCache:
    """Exported graphs by name, each beside its checksum; in memory where no folder can be had.

    Args:
        folder: where they go; None: `backend_cache` beside `checkpoint`.
        checkpoint: the file of the weights. Where its folder is read-only, as a shipped bundle's
            may be, nothing is kept on disk.

    Raises:
        ResourceError: `folder` is given and cannot be written.
    """

    def __init__(self, folder: str | None = None, checkpoint: str | None = None) -> None:
        self.folder: Path | None = None
        self._held: dict[str, bytes] = {}
        if folder is not None:
            self.folder = check_writable(folder)
        elif checkpoint is not None:
            try:
                self.folder = check_writable(Path(checkpoint).parent / "backend_cache")
            except ResourceError as error:
                logger.info("backend cache: not kept on disk (%s)", error)

    def read(self, name: str) -> bytes | None:
        """Return the graph `name`; None where there is none, or a damaged one."""
        if self.folder is None:
            return self._held.get(name)
        path = self.folder / name
        try:
            data = path.read_bytes()
            expected = _checksum_path(path).read_text("utf-8").split()[0]
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, IndexError) as error:
            logger.warning("%s: unreadable (%s); exporting again", path, error)
            return None
        if hashlib.sha256(data).hexdigest() != expected:
            logger.warning("%s: differs from its checksum; exporting again", path)
            return None
        return data

    def write(self, name: str, data: bytes) -> None:
        """Keep the graph `data` as `name`."""
        if self.folder is None:
            self._held[name] = data
            return
        path = self.folder / name
        try:
            write_bytes(path, data)
            write_text(_checksum_path(path), f"{hashlib.sha256(data).hexdigest()}  {name}\n")
        except ResourceError as error:  # the graph is at hand: a full disk need not stop the run
            logger.warning("backend cache: %s", error)


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def network_digest(network: nn.Module, windows: Tensor) -> str:
    """Return a hash of the definition and weights of `network` and of what its windows look like.

    Sizes are no part of it, as one graph serves many; a change in the code behind an unchanged
    `repr` neither: an exported graph is compared with the network before it is used.
    """
    kind = f"{type(network).__module__}.{type(network).__qualname__}"
    versions = f"torch {torch.__version__}, opset {_OPSET}"
    shape = f"{windows.shape[1]} channels, {windows.ndim - 2} axes"
    digest = hashlib.sha256("\n".join([kind, repr(network), versions, shape]).encode())
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def export_onnx(network: nn.Module, windows: Tensor) -> bytes:
    """Return `network` as an ONNX graph for any number and size of windows.

    It is traced: what the network decides by the size of its input stays as it was for `windows`.
    Several outputs become a row, in the network's order.

    Args:
        network: left as it is.
        windows: an example `(N, C, *spatial)`.

    Raises:
        BackendError: the package onnx is missing, or the network cannot be exported.
    """
    load_package("onnx")
    axes = {axis: f"size_{axis}" for axis in range(windows.ndim) if axis != 1}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        try:
            with warnings.catch_warnings(), torch.no_grad(), torch.autocast("cpu", enabled=False):
                _expect_warnings()
                torch.onnx.export(
                    _Flat(network),
                    (windows,),
                    path,
                    dynamo=False,
                    opset_version=_OPSET,
                    input_names=["windows"],
                    dynamic_axes={"windows": axes},
                    # Another mode would be set on the caller's network and taken back by guess.
                    training=torch.onnx.TrainingMode.PRESERVE,
                )
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise BackendError(
                f"backend: {type(network).__name__} cannot be exported to ONNX "
                f"({first_line(error)}); set backend: torch"
            ) from error
        return path.read_bytes()


def _expect_warnings() -> None:
    """Silence what this exporter says of every network: its age, and that sizes are traced."""
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx")


def load_package(name: str) -> Any:
    """Return the optional package `name`.

    Raises:
        BackendError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendError(
            f"backend: the package {name} is not installed; "
            f"pip install 'lamina[{_EXTRAS[name]}]', or set backend: torch"
        ) from error


class _Flat(nn.Module):
    """A network whose outputs stand in a row, whatever form it gives them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training

    def forward(self, windows: Tensor) -> tuple[Tensor, ...]:
        outputs = self.network(windows)
        return Structure(outputs).flatten(outputs)
