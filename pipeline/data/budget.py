"""How many bytes one input may take once decoded, known before anything is decoded."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from pipeline.errors import ConfigurationError, InputError

__all__ = ["available_bytes", "check_decoded_bytes", "decoded_limit_bytes"]

_VARIABLE = "LAMINA_MAX_DECODED_BYTES"
_FRACTION = 4  # image, label and their float32 copies must fit beside each other
_CGROUP = Path("/sys/fs/cgroup")


def decoded_limit_bytes() -> int:
    """Return the limit: `LAMINA_MAX_DECODED_BYTES`, else a quarter of the memory available.

    Raises:
        ConfigurationError: the variable is not a positive whole number.
    """
    text = os.environ.get(_VARIABLE, "")
    if not text:
        return max(available_bytes() // _FRACTION, 1)
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ConfigurationError(
            f"{_VARIABLE} is {text!r}; expected a positive number of bytes such as 2000000000"
        )
    return int(text)


def available_bytes() -> int:
    """Return the memory this process may still take: the machine's, or its container's if less."""
    available = int(psutil.virtual_memory().available)
    container = _container_available_bytes(_CGROUP)
    return available if container is None else min(available, container)


def check_decoded_bytes(
    path: Path | str, shape: Sequence[int], itemsize: int, limit: int | None = None
) -> int:
    """Refuse a file whose header announces more than the limit.

    Args:
        path: the file, for the message.
        shape: what the header says.
        itemsize: bytes per element.
        limit: bytes allowed; by default `decoded_limit_bytes()`.

    Returns:
        The decoded size in bytes.

    Raises:
        InputError: it is larger than the limit.
    """
    size = math.prod(int(length) for length in shape) * itemsize
    allowed = decoded_limit_bytes() if limit is None else limit
    if size > allowed:
        raise InputError(
            f"{path}: shape {tuple(shape)} needs {size / 1e6:,.0f} MB decoded, "
            f"at most {allowed / 1e6:,.0f} MB are allowed; "
            f"if the file is what it says, set {_VARIABLE} to {size} or more"
        )
    return size


def _container_available_bytes(root: Path) -> int | None:
    """Return what the container's memory limit leaves (cgroup 2, then 1), None without a limit."""
    for limit_name, usage_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit = _read_number(root / limit_name)
        usage = _read_number(root / usage_name)
        if limit is not None and usage is not None:
            cache = _inactive_file_bytes((root / usage_name).with_name("memory.stat"))
            return max(limit - max(usage - cache, 0), 0)
    return None


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" means no limit


def _inactive_file_bytes(path: Path) -> int:
    """Return the page cache that the kernel gives back on demand; it is not really used."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    values = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(values.get("total_inactive_file", values.get("inactive_file", "0")))
