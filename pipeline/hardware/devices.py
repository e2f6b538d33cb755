"""Which devices of this machine can train: each one proved by a small forward and backward pass.

`torch.cuda.is_available()` is true for a card that this build has no kernels for, so a device
counts as usable only once it has computed something right. torch is imported inside the functions,
so that a broken torch becomes a line in the report.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import psutil

from pipeline.data.budget import available_bytes
from pipeline.errors import ConfigurationError, first_line

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceReport", "choose_device", "memory_bytes", "probe_devices"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceReport:
    """What one device is and whether it computes.

    Args:
        name: as torch writes it, such as `cpu` or `cuda:0`.
        title: the product's name.
        usable: a small convolution went forward and backward with the right results.
        memory_bytes: free on a GPU, what this process may take on the CPU; None if unknown.
        note: why it is not usable, else empty.
    """

    name: str
    title: str
    usable: bool
    memory_bytes: int | None
    note: str = ""


def probe_devices() -> list[DeviceReport]:
    """Return a report per device that torch names: GPUs first, the CPU last."""
    import torch

    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    names += [f"xpu:{index}" for index in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    if _directml() is not None:
        names.append("dml")
    return [_report(name) for name in [*names, "cpu"]]


def choose_device(request: str | None = None) -> torch.device:
    """Return the device to use.

    Args:
        request: `cpu`, `cuda`, `cuda:1`, `xpu`, `mps`, `dml` for DirectML, or `auto` (also None):
            the first GPU that computes, else the CPU; the log tells why others do not.

    Raises:
        ConfigurationError: the device asked for is unknown or does not compute.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    import torch

    text = "auto" if request is None else str(request).strip().lower()
    if text == "cpu":
        return torch.device("cpu")  # nothing to prove, and torch would not run without it
    if text == "auto":
        for report in probe_devices():
            if report.usable or report.name == "cpu":
                logger.info("device %s (%s)", report.name, report.title)
                return _device(report.name)
            logger.warning("device %s (%s) is left out: %s", report.name, report.title, report.note)
    try:
        device = _device(text)
    except RuntimeError:
        raise ConfigurationError(
            f"device {request!r} is not a device: expected cpu, cuda, cuda:0, xpu, mps, dml or auto"
        ) from None
    problem = _problem(device)
    if problem:
        raise ConfigurationError(
            f"device {request} asked for, but none such is usable: {problem}; "
            "use --device cpu or --device auto"
        )
    return device


def memory_bytes() -> int:
    """Return the memory this process may still take, the container's limit counted in."""
    return available_bytes()


def _device(name: str) -> torch.device:
    """Return the device that `name` stands for.

    Raises:
        ConfigurationError: DirectML is asked for and not installed.
        RuntimeError: torch knows no such device.
    """
    import torch

    if name != "dml":
        return torch.device(name)
    directml = _directml()
    if directml is None:
        raise ConfigurationError(
            "device dml asked for, and torch_directml does not import; pip install torch-directml, "
            "which needs Windows or WSL, or use --device auto"
        )
    found: torch.device = directml.device()
    return found


def _directml() -> ModuleType | None:
    """Return torch_directml where it is installed and fits this torch."""
    try:
        return importlib.import_module("torch_directml")
    except (ImportError, OSError) as error:
        logger.debug("no DirectML: %s", error)
        return None


def _report(name: str) -> DeviceReport:
    device = _device(name)
    problem = _problem(device)
    memory = memory_bytes() if device.type == "cpu" else None
    if device.type in ("cuda", "xpu") and not problem:
        memory = _free_bytes(device)
    return DeviceReport(name, _title(device), not problem, memory, problem)


def _title(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    titles = {"cpu": f"{psutil.cpu_count()} cores", "mps": "Apple GPU"}
    return titles.get(device.type, "DirectML device")


def _free_bytes(device: torch.device) -> int | None:
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return int(torch.xpu.mem_get_info(device)[0])
    except RuntimeError:  # integrated GPUs and older drivers do not tell
        return None


def _problem(device: torch.device) -> str:
    """Return why `device` cannot train, or an empty string."""
    import torch

    if device.type == "cuda" and not torch.backends.cuda.is_built():
        return "this torch was built without CUDA"
    if device.type in ("cuda", "xpu"):
        count = (torch.cuda if device.type == "cuda" else torch.xpu).device_count()
        if (device.index or 0) >= count:
            return f"torch sees {count} {device.type.upper()} devices"
    if device.type == "mps" and not torch.backends.mps.is_available():
        return "this torch or this machine has no MPS"
    try:
        # constant weights: probing must not advance the random state that a run has seeded
        weight = torch.full((2, 1, 3, 3), 0.5, device=device, requires_grad=True)
        output = torch.nn.functional.conv2d(torch.ones(1, 1, 8, 8, device=device), weight)
        output.sum().backward()
        gradient = weight.grad
        right = gradient is not None and bool((output == 4.5).all() and (gradient == 36.0).all())
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return first_line(error).split(". ")[0]
    return "" if right else "a small convolution gave wrong values"
