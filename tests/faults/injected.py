"""Faults that a test has in the process of a command, because no input causes them."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

Usage = namedtuple("Usage", ["total", "used", "free"])


def killed_at_step(number: int) -> None:
    """SIGKILL before training step `number`."""
    from pipeline.training.step import TrainingStep

    original, steps = TrainingStep.__call__, []

    def step(self: Any, engine: Any, batch: Any) -> Any:
        steps.append(1)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, engine, batch)

    TrainingStep.__call__ = step  # type: ignore[method-assign]


def killed_in_write(name: str, number: int) -> None:
    """SIGKILL in write `number` of files with `name` in theirs, half of it on the disk."""

    def half(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    _when_written(name, number, half)


def disk_full_in_write(name: str, number: int) -> None:
    """No space left for write `number` of files with `name` in theirs, half of it on the disk."""

    def half(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _when_written(name, number, half)


def _when_written(name: str, number: int, action: Any) -> None:
    from pipeline.data import atomic

    original, writes = atomic._sync, []

    def sync(path: Path) -> None:
        if name in path.name:
            writes.append(path)
            if len(writes) == number:
                action(path)
        original(path)

    atomic._sync = sync


def free_bytes(count: int) -> None:
    """A disk with so much space left."""
    shutil.disk_usage = lambda path: Usage(10**12, 10**12 - count, count)  # type: ignore[assignment]


def loss_is_nan_at_step(number: int) -> None:
    """A loss of NaN in training step `number`."""
    from pipeline.training.losses import DiceBCELoss

    original, steps = DiceBCELoss.forward, []

    def forward(self: Any, output: Any, target: Any) -> Any:
        loss = original(self, output, target)
        if loss.requires_grad:
            steps.append(1)
            if len(steps) == number:
                loss = loss * float("nan")
        return loss

    DiceBCELoss.forward = forward  # type: ignore[method-assign]


def memory_for(images: int) -> None:
    """Memory for so many images at once in the network."""
    import torch

    from pipeline.fundus.networks import UNet

    original = UNet.forward

    def forward(self: Any, batch: Any) -> Any:
        if len(batch) > images:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return original(self, batch)

    UNet.forward = forward  # type: ignore[method-assign]


def worker_killed_at_item(number: int) -> None:
    """SIGKILL in a loader worker that reads its item `number`."""
    import torch

    from pipeline.training.ordering import KeyedDataset

    original, items = KeyedDataset.__getitem__, []

    def item(self: Any, key: Any) -> Any:
        items.append(1)
        if len(items) == number and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, key)

    KeyedDataset.__getitem__ = item  # type: ignore[method-assign]


def no_privileges() -> None:
    """A user who may write what the modes of files allow; root, with its capabilities, may all."""
    if sys.platform == "linux" and os.geteuid() == 0:
        version, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(version, none) != 0:
            raise OSError(ctypes.get_errno(), "capset")


def signal_at_step(number: int, signum: int) -> None:
    """Send a signal to this process within training step `number`."""
    from pipeline.training.step import TrainingStep

    original, steps = TrainingStep.__call__, []

    def step(self: Any, engine: Any, batch: Any) -> Any:
        steps.append(1)
        if len(steps) == number:
            os.kill(os.getpid(), signum)
        return original(self, engine, batch)

    TrainingStep.__call__ = step  # type: ignore[method-assign]
