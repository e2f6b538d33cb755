"""How many processors this process may use, its container's share counted in."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["usable_processors"]

_CGROUP = Path("/sys/fs/cgroup")


def usable_processors() -> int:
    """Return the processors this process may run on: its affinity, or its container's if less."""
    # Windows and macOS know no affinity
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    container = _container_processors(_CGROUP)
    return own if container is None else max(1, min(own, container))


def _container_processors(root: Path) -> int | None:
    """Return the container's limit (cgroup 2, then 1), rounded down; None without a limit."""
    quota, period = [*_words(root / "cpu.max"), "", ""][:2]
    if not quota:
        quota = " ".join(_words(root / "cpu/cpu.cfs_quota_us"))
        period = " ".join(_words(root / "cpu/cpu.cfs_period_us"))
    # "max", or -1 in the older form, means no limit
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return max(1, int(quota) // int(period))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
