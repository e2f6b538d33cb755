"""The result of a streamed run while it is being made: a folder beside its final name.

`result.zarr.partial` holds the array, `plan.json` (what every job must agree on) and, per block,
how far it is. The last block to finish gives the folder its final name, so that what is called
`result.zarr` is always whole. A kill at any moment leaves what the next start goes on with.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import zarr
from filelock import FileLock, Timeout
from zarr.storage import LocalStore

from pipeline.data.atomic import resource_errors, sync_folder, write_json
from pipeline.data.ome_zarr import build_levels, create_ome_zarr
from pipeline.errors import ConfigurationError, ResourceError
from pipeline.inference.plane_writer import sync_file
from pipeline.inference.stream_agreement import differences, now
from pipeline.inference.stream_plan import StreamPlan

__all__ = ["StreamStore"]

logger = logging.getLogger(__name__)

_PLAN = "plan.json"
_KEY = "lamina"  # under which the result's attributes say how it was made
_MARKS = ("zarr.json", ".zgroup", ".zarray")
_ATTEMPTS = 10  # at a lock in a folder that another job is just removing


class StreamStore:
    """The growing result of a streamed run.

    Several processes may use one at a time, each for a block of its own.

    Args:
        target: final name, `name.zarr`.
        plan: how the volume is cut.
        agreement: plain data that all jobs of the run share, and that an earlier, interrupted run
            must have had; it ends up in the result's attributes.
        create: further arguments of `create_ome_zarr`: dtype, chunks, shards, spacing, ...
        levels: of the pyramid; None: until it is small.
        reduce: how a coarser level is made: `mean`, `nearest` or `max`.

    Raises:
        ConfigurationError: `target` is no such name.
    """

    def __init__(
        self,
        target: Path,
        plan: StreamPlan,
        agreement: Mapping[str, Any],
        create: Mapping[str, Any],
        levels: int | None = None,
        reduce: str = "mean",
    ) -> None:
        if target.suffix != ".zarr" or not target.stem:
            raise ConfigurationError(f"{target}: the result is an OME-Zarr; call it NAME.zarr")
        self.target = target
        self.plan = plan
        self.agreement = dict(agreement)
        self.partial = target.with_name(f"{target.name}.partial")
        self._create = dict(create)
        self._levels = levels
        self._reduce = reduce

    def is_complete(self) -> bool:
        """Return whether the result is there, made as agreed; however it was cut into blocks.

        Raises:
            ConfigurationError: something else has its name.
        """
        if not self.target.exists():
            return False
        made = None
        with contextlib.suppress(OSError, ValueError, KeyError):  # not a Zarr group at all
            made = dict(_open_group(self.target, "r").attrs).get(_KEY)
        if not isinstance(made, Mapping):
            raise ConfigurationError(
                f"{self.target} exists and is not the result of such a run; choose another target"
            )
        if different := differences(made, self.agreement, whole=True):
            raise ConfigurationError(
                f"{self.target} exists and was made with another {', '.join(different)}; choose "
                "another target, or set overwrite to true"
            )
        return True

    def remove(self) -> None:
        """Remove the result and what there is of it.

        Raises:
            ConfigurationError: it is no Zarr folder, or another process is writing it.
            ResourceError: it cannot be removed.
        """
        if self.target.exists() and not any((self.target / mark).is_file() for mark in _MARKS):
            raise ConfigurationError(
                f"{self.target} is no Zarr folder and is not overwritten; choose another target"
            )
        # Both leave their names at once: a kill while files are deleted leaves nothing half there.
        trash = self.target.with_name(f".{self.target.name}.removed")
        with resource_errors(self.target):
            if trash.exists():
                shutil.rmtree(trash)
            found = [path for path in (self.target, self.partial) if path.exists()]
            if not found:
                return
            with self._unused():
                trash.mkdir()
                for path in found:
                    path.replace(trash / path.name)
            shutil.rmtree(trash)

    def open(self) -> zarr.Array[Any] | None:
        """Return the array to write to; the first job creates it. None: the result is whole.

        Raises:
            ConfigurationError: another run has the target's name, whole or interrupted.
            ResourceError: the folder cannot be written.
        """
        if self.is_complete():
            self._discard()
            return None
        with self._lock("plan"):
            plan = self.partial / _PLAN
            if self.is_complete():  # another job completed it meanwhile
                self._discard()
                return None
            if not plan.exists():
                # A job that was killed before it wrote the plan has left an array behind.
                create_ome_zarr(self._group, self.plan.shape, **self._create, overwrite=True)
                write_json(plan, {"started": now(), "agreement": self.agreement})
            found = _read(plan).get("agreement")
            if different := differences(found, self.agreement):
                raise ConfigurationError(
                    f"{self.partial} is part of a run with another {', '.join(different)}; finish "
                    "that run, choose another target, or set overwrite to true"
                )
            # Still under the lock: the folder keeps its name.
            array = _open_group(self._group, "r+")["0"]
        if not isinstance(array, zarr.Array):
            raise ConfigurationError(f"{self._group}: level 0 is no array; set overwrite to true")
        return array

    @contextlib.contextmanager
    def claim(self, index: int) -> Iterator[int]:
        """Own a block while it is computed; another process with the same block waits.

        Yields:
            Planes of the block that are written already.
        """
        with self._lock(f"block_{index:05d}"):
            written, depth = self.written(index), self.plan.blocks[index].shape[0]
            # With the result complete there are no notes any more.
            yield depth if written < depth and self.is_complete() else written

    def written(self, index: int) -> int:
        """Return how many planes of a block are written."""
        path = self._progress(index)
        return int(_read(path)["planes"]) if path.exists() else 0

    def note(self, index: int, planes: int, made_with: Mapping[str, Any] | None = None) -> None:
        """Note that the first `planes` planes of a block are written.

        Args:
            index: of the block.
            planes: their number.
            made_with: plain data on what computed them, for the result's record.
        """
        write_json(self._progress(index), {"planes": planes, "made_with": made_with})

    def missing(self) -> Iterator[int]:
        """Yield the blocks that are not finished."""
        for index, block in enumerate(self.plan.blocks):
            if self.written(index) < block.shape[0]:
                yield index

    def finish(self) -> bool:
        """Give a result whose blocks are all written its final name; return whether it has it.

        Raises:
            ResourceError: the disk is full.
        """
        if not self.is_complete():
            if not (self.partial / _PLAN).exists():
                return self.is_complete()
            with self._lock("plan"):
                if not self.is_complete():
                    if any(True for _ in self.missing()):
                        return False
                    self._complete()
        self._discard()
        return True

    def _complete(self) -> None:
        build_levels(self._group, self._levels, reduce=self._reduce)
        with resource_errors(self.partial):
            root = _open_group(self._group, "r+")
            root.update_attributes({_KEY: {**self.agreement, "record": self._record()}})
            _sync_files(self._group)
            self._group.replace(self.target)
            sync_folder(self.target.parent)
        logger.info("%s: complete", self.target)

    def _record(self) -> dict[str, Any]:
        notes = [_read(self._progress(i)).get("made_with") for i in range(self.plan.count)]
        made = {json.dumps(note, sort_keys=True): note for note in notes if note}
        started = _read(self.partial / _PLAN).get("started")
        return {"started": started, "ended": now(), "made_with": list(made.values())}

    def _discard(self) -> None:
        """Remove what is left of the making of a whole result."""
        shutil.rmtree(self.partial, ignore_errors=True)

    @property
    def _group(self) -> Path:
        return self.partial / self.target.name

    def _progress(self, index: int) -> Path:
        return self.partial / "progress" / f"block_{index:05d}.json"

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        lock = self._locked(self.partial / "locks" / f"{name}.lock")
        try:
            yield
        finally:
            lock.release()

    def _locked(self, path: Path) -> FileLock:
        lock = FileLock(path)
        for attempt in range(_ATTEMPTS):
            try:
                with resource_errors(self.partial):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    lock.acquire(timeout=0)
                return lock
            except Timeout:
                logger.info("%s: held by another process; waiting", path)
                with contextlib.suppress(FileNotFoundError):
                    lock.acquire()
                    return lock
            except FileNotFoundError:  # the folder went away: a job has just completed the result
                if attempt == _ATTEMPTS - 1:
                    raise
        raise ResourceError(f"{path}: cannot be locked; is the folder being removed?")

    @contextlib.contextmanager
    def _unused(self) -> Iterator[None]:
        """Hold all locks there are."""
        with contextlib.ExitStack() as held:
            for path in sorted(self.partial.glob("locks/*.lock")):
                lock = FileLock(path)
                try:
                    lock.acquire(timeout=0)
                except Timeout as error:
                    raise ConfigurationError(
                        f"{self.partial} is being written by another process ({path.name}); "
                        "stop it first, or choose another target"
                    ) from error
                held.callback(lock.release)
            yield


def _open_group(path: Path, mode: Any) -> zarr.Group:
    # A store and not a string, which zarr would also take for an address.
    return zarr.open_group(LocalStore(path, read_only=mode == "r"), mode=mode)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _sync_files(group: Path) -> None:
    """Have the coarser levels and all metadata reach the disk; the chunks of level 0 have."""
    for child in group.iterdir():
        inside = child.iterdir() if child.name == "0" else child.rglob("*")
        for path in [child, *inside] if child.is_dir() else [child]:
            if path.is_file():
                sync_file(path)
