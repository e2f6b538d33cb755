"""One run at a time in an output folder."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.data.atomic import check_writable, remove_stale, write_json
from pipeline.errors import ConfigurationError

__all__ = ["RunLock"]


class RunLock:
    """The right to write into a folder, which one process has at a time.

    The operating system holds the lock (`.lock`), so that it is free again however its process
    ends; loader workers do not inherit it. Who has it stands in `.lock.json`, for the message that
    others get.

    Args:
        folder: made where absent.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._owner = self.folder / ".lock.json"
        # Not bound to a thread: whoever ends the run releases it.
        self._lock = FileLock(self.folder / ".lock", timeout=0, thread_local=False)

    def acquire(self) -> None:
        """Take the folder, and delete what a killed run left half-written there.

        Raises:
            ConfigurationError: another run has it; the message names its process and host.
            ResourceError: nothing can be written there.
        """
        check_writable(self.folder)
        try:
            self._lock.acquire()
        except Timeout:
            raise ConfigurationError(
                f"{self.folder}: another run is at work there ({self._described_owner()}); wait "
                "for its end, stop it, or choose another output_dir"
            ) from None
        try:
            remove_stale(self.folder)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
            write_json(self._owner, owner)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the folder free; without effect where it is not held."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):  # a name that is left over harms nobody
                self._owner.unlink()
            self._lock.release()

    def _described_owner(self) -> str:
        try:
            owner = json.loads(self._owner.read_text(encoding="utf-8"))
            return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
        except (OSError, ValueError, LookupError, TypeError):
            return "its process is not known"  # it has only just begun
