"""What a device offers, and the settings that follow from its size.

The tiers hold settings that change speed and memory and never the result: the effective batch, the
learning rate and the image size do not depend on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import psutil

from pipeline.errors import ConfigurationError
from pipeline.hardware.devices import choose_device, memory_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["TIERS", "DeviceProfile", "Tier", "device_profile", "tier_for"]

_GB = 10**9


@dataclass(frozen=True)
class DeviceProfile:
    """What one device offers.

    Args:
        name: as torch writes it, such as `cpu` or `cuda:0`.
        kind: `cpu`, `cuda`, `xpu`, `mps`, or `privateuseone` for DirectML.
        title: the product's name.
        total_bytes: its memory, None where it cannot be read.
        free_bytes: what of it this process may still take, None where it cannot be read.
        capability: CUDA's compute capability, None on other devices.
    """

    name: str
    kind: str
    title: str = ""
    total_bytes: int | None = None
    free_bytes: int | None = None
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Tier:
    """Settings for devices of one size; each can be overridden by its argument of `plan`.

    Args:
        name: how it is asked for.
        below_bytes: the device's memory is less than this; None for no bound.
        recompute_early: compute blocks again in the backward pass before dividing a batch, instead
            of only where a single sample does not fit otherwise.
        most_workers: of the data loader.
        prefetch_factor: batches that each worker holds ready.
    """

    name: str
    below_bytes: int | None
    recompute_early: bool
    most_workers: int
    prefetch_factor: int


# A machine with a small GPU has few cores and little memory for workers, too.
TIERS: Mapping[str, Tier] = MappingProxyType(
    {
        tier.name: tier
        for tier in (
            Tier("gpu", None, recompute_early=False, most_workers=8, prefetch_factor=4),
            Tier("gpu_8gb", 8 * _GB, recompute_early=False, most_workers=4, prefetch_factor=2),
            Tier("gpu_4gb", 4 * _GB, recompute_early=True, most_workers=2, prefetch_factor=2),
            Tier("cpu", None, recompute_early=False, most_workers=8, prefetch_factor=2),
        )
    }
)


def tier_for(device: DeviceProfile, profile: str = "auto") -> tuple[Tier, str]:
    """Return the settings for `device`, and why these.

    Args:
        device: what it offers; a GPU whose memory cannot be read counts as the smallest.
        profile: `auto`, or the name of a tier.

    Raises:
        ConfigurationError: there is no tier of this name.
    """
    if profile != "auto":
        if profile not in TIERS:
            raise ConfigurationError(
                f"profile must be auto or one of {', '.join(TIERS)}, got {profile!r}"
            )
        return TIERS[profile], "as asked"
    if device.kind == "cpu":
        return TIERS["cpu"], "no GPU"
    if device.total_bytes is None:
        return TIERS["gpu_4gb"], "the device's memory cannot be read"
    total = device.total_bytes
    fitting = [t for t in TIERS.values() if t.below_bytes is not None and total < t.below_bytes]
    smallest = min(fitting, key=lambda tier: tier.below_bytes or 0, default=TIERS["gpu"])
    return smallest, f"{total / 1e9:.1f} GB of device memory"


def device_profile(device: str | torch.device | None = None) -> DeviceProfile:
    """Return what `device` offers.

    A GPU's cache is emptied first, so that what torch only keeps for reuse counts as free.

    Args:
        device: as `choose_device` takes it, or a torch device that is taken as it is.

    Raises:
        ConfigurationError: the device asked for is unknown or does not compute.
    """
    chosen = choose_device(device) if device is None or isinstance(device, str) else device
    if chosen.type == "cpu":
        return _cpu_profile()
    readers = {"cuda": _cuda_profile, "xpu": _xpu_profile, "mps": _mps_profile}
    if chosen.type in readers:
        return readers[chosen.type](chosen)
    return DeviceProfile(str(chosen), chosen.type, "DirectML device")


def _cpu_profile() -> DeviceProfile:
    try:
        total, free = psutil.virtual_memory().total, memory_bytes()
    except (OSError, psutil.Error):  # systems without /proc
        return DeviceProfile("cpu", "cpu", "CPU")
    return DeviceProfile("cpu", "cpu", "CPU", total, free)


def _cuda_profile(device: torch.device) -> DeviceProfile:
    import torch

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return DeviceProfile(
        str(device), "cuda", torch.cuda.get_device_name(device), total, free,
        torch.cuda.get_device_capability(device),
    )  # fmt: skip


def _xpu_profile(device: torch.device) -> DeviceProfile:
    import torch

    torch.xpu.empty_cache()
    title = torch.xpu.get_device_name(device)
    try:
        free, total = torch.xpu.mem_get_info(device)
    except RuntimeError:  # integrated GPUs and older drivers do not tell
        return DeviceProfile(str(device), "xpu", title)
    return DeviceProfile(str(device), "xpu", title, total, free)


def _mps_profile(device: torch.device) -> DeviceProfile:
    import torch

    torch.mps.empty_cache()
    total = torch.mps.recommended_max_memory()
    free = max(total - torch.mps.driver_allocated_memory(), 0)
    return DeviceProfile(str(device), "mps", "Apple GPU", total, free)
