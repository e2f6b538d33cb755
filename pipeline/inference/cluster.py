"""The blocks of a streamed run on several machines, by dask.

A block is stateless and may be computed twice: a worker that dies costs what it had not written.
Bit for bit the result is that of one process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ConfigurationError, ResourceError
from pipeline.inference.sliding_window import SlidingWindow
from pipeline.inference.streaming import StreamResult, VolumeStream

__all__ = ["WORKER_ENVIRONMENT", "local_or_running", "stream_on_cluster"]

logger = logging.getLogger(__name__)

MakePredictor = Callable[[], Callable[[Tensor], Any]]

# dask's nanny starts workers with a glibc that gives memory back after 64 KiB, and runs tasks in a
# thread, whose arena gives memory back whatever the thresholds. With one arena for all threads a
# convolution on a CPU takes half the time.
WORKER_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_RETRIES = 3  # of a block whose computation failed; dask itself gives one to three dying workers
_TIMEOUT_S = 30  # for a scheduler to answer


@dataclass(frozen=True)
class _Job:
    """What a worker needs to compute any block.

    Args:
        key: of the run, different from those of all others.
    """

    key: str
    source: str
    target: str
    make_predictor: MakePredictor
    inferer: SlidingWindow
    settings: Mapping[str, Any]
    threads: int

    def stream(self, **changed: Any) -> VolumeStream:
        settings = {**self.settings, **changed}
        return VolumeStream(
            self.source, self.target, self.make_predictor(), inferer=self.inferer, **settings
        )


def stream_on_cluster(
    source: str | Path,
    target: str | Path,
    make_predictor: MakePredictor,
    *,
    inferer: SlidingWindow,
    blocks: int,
    scheduler: str | None = None,
    workers: int = 2,
    threads: int = 1,
    overwrite: bool = False,
    **settings: Any,
) -> StreamResult:
    """Stream a volume with dask.distributed, one task per block.

    A script that calls this needs `if __name__ == "__main__":`, since workers import it. Without
    `channels` among the settings, the network is also built here, and asked for them.

    Args:
        source: a volume on a disk that all workers share.
        target: the result, on a disk that all workers share.
        make_predictor: builds the network in a worker's process, which keeps it for all its blocks;
            a function that the workers can import, or one that cloudpickle can send.
        inferer: windows and their blending.
        blocks: how many, several per worker; a worker's death costs up to a chunk's depth of one.
        scheduler: address of a running dask scheduler; None starts workers on this machine.
        workers: processes on this machine, where there is no scheduler.
        threads: torch threads of a worker.
        overwrite: remove what has the target's name, before the first block.
        **settings: of `VolumeStream`.

    Raises:
        ConfigurationError: dask is not installed, or the scheduler does not answer.
        ResourceError: a block's workers died more often than it is tried again.
        LaminaError: what a block raised on a worker.
    """
    _load_dask()
    started = time.monotonic()
    source, target = Path(source).absolute(), Path(target).absolute()
    key = f"{target.name}-{time.time_ns()}"
    job = _Job(
        key, str(source), str(target), make_predictor, inferer, {**settings, "blocks": blocks},
        threads,
    )  # fmt: skip
    stream = job.stream(overwrite=overwrite)
    windows = 0
    if stream.begin() is not None:
        todo = list(stream.store.missing())
        with local_or_running(scheduler, workers) as client:
            windows = _compute_all(client, job, todo)
    complete = stream.store.finish()
    return StreamResult(stream.target, complete, windows, time.monotonic() - started, stream.plan)


def _compute_all(client: Any, job: _Job, todo: list[int]) -> int:
    """Compute blocks, whose order does not matter; return how many windows were run."""
    distributed = _load_dask()
    futures = client.map(
        functools.partial(_compute, job), todo, pure=False, retries=_RETRIES, key=job.key
    )
    windows = 0
    for number, future in enumerate(distributed.as_completed(futures), 1):
        try:
            windows += future.result()
        except distributed.KilledWorker as error:
            raise ResourceError(
                f"{job.target}: {error.allowed_failures + 1} workers died of one block, perhaps "
                "for lack of memory; see their logs, and start again to go on with what is missing"
            ) from error
        except distributed.CancelledError as error:
            raise ResourceError(
                f"{job.target}: the scheduler has given up a block; start again to go on with what "
                "is missing"
            ) from error
        logger.info("%d of %d blocks done", number, len(todo))
    return windows


_streams: dict[str, VolumeStream] = {}
_one_at_a_time = threading.Lock()  # workers of a running scheduler may have several threads


def _compute(job: _Job, index: int) -> int:
    """Compute a block in a worker; return how many windows were run."""
    with _one_at_a_time:
        torch.set_num_threads(job.threads)
        if job.key not in _streams:
            _streams.clear()  # of an earlier run: its network need not stay
            _streams[job.key] = job.stream()
        return _streams[job.key].run([index]).windows


def _load_dask() -> Any:
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise ConfigurationError(
            "dask is not installed: pip install 'lamina[cluster]', or compute the blocks one by "
            "one with block=(i, n)"
        ) from error


def _arenas() -> str | None:
    return os.environ.get("MALLOC_ARENA_MAX")


def _hint(client: Any) -> None:
    """Say so where the workers of a running scheduler have not got the environment."""
    found = client.run(_arenas)
    slow = [address for address, value in found.items() if value != "1"]
    if slow and platform.libc_ver()[0] == "glibc":
        settings = " ".join(f"{name}={value}" for name, value in WORKER_ENVIRONMENT.items())
        logger.info("%d workers; on a CPU twice as fast if started with %s", len(slow), settings)


@contextlib.contextmanager
def local_or_running(scheduler: str | None, workers: int) -> Iterator[Any]:
    """Give a client of a running scheduler, or of workers on this machine that end with the body.

    Args:
        scheduler: its address, such as `tcp://host:8786`; None starts workers here.
        workers: processes to start, one thread each, with `WORKER_ENVIRONMENT`. A variable of that
            name that is set already stays as it is.

    Yields:
        The `distributed.Client`.

    Raises:
        ConfigurationError: dask is not installed, or the scheduler does not answer.
    """
    distributed = _load_dask()
    if scheduler is not None:
        try:
            client = distributed.Client(scheduler, timeout=_TIMEOUT_S)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"scheduler {scheduler!r} does not answer: {error}; start `dask scheduler` and "
                "give its address, or leave it out for workers on this machine"
            ) from error
        with client:
            _hint(client)
            yield client
        return
    environment = {"distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT}
    with (
        importlib.import_module("dask").config.set(environment),
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            # The plan says what a worker takes; dask would kill one whose allocator keeps memory.
            memory_limit=None,
            dashboard_address="127.0.0.1:0",  # a free port: the usual one may be taken
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client
