"""The blocks of a streamed run on several machines, by dask.

A block is stateless and may be computed twice: a worker that dies costs what it had not written.
Bit for bit the result is that of one process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ConfigurationError, ResourceError
from pipeline.inference.sliding_window import SlidingWindow
from pipeline.inference.streaming import StreamResult, VolumeStream

__all__ = ["WORKER_ENVIRONMENT", "stream_on_cluster"]

logger = logging.getLogger(__name__)

MakePredictor = Callable[[], Callable[[Tensor], Any]]

# dask's nanny starts workers with a glibc that gives memory back after 64 KiB, which doubles the
# time of a convolution on a CPU, and with threads that compete for the same cores.
WORKER_ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_RETRIES = 3  # of a block whose worker died or whose disk failed


@dataclass(frozen=True)
class _Job:
    """What a worker needs to compute any block."""

    key: str
    source: str
    target: str
    make_predictor: MakePredictor
    inferer: SlidingWindow
    settings: tuple[tuple[str, Any], ...]
    threads: int

    def stream(self) -> VolumeStream:
        predictor = self.make_predictor()
        return VolumeStream(
            self.source, self.target, predictor, inferer=self.inferer, **dict(self.settings)
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
    **settings: Any,
) -> StreamResult:
    """Stream a volume with dask.distributed, one task per block.

    Args:
        source: a volume on a disk that all workers share.
        target: the result, on a disk that all workers share.
        make_predictor: builds the network in a worker's process, which keeps it for all its blocks;
            a function that the workers can import, or one that cloudpickle can send.
        inferer: windows and their blending.
        blocks: how many, several per worker; a worker's death costs up to one of them.
        scheduler: address of a running dask scheduler; None starts workers on this machine.
        workers: processes on this machine, where there is no scheduler.
        threads: torch threads of a worker.
        **settings: of `VolumeStream`.

    Raises:
        ConfigurationError: dask is not installed, or the scheduler does not answer.
        ResourceError: a block failed more often than it is tried again.
    """
    distributed = _load_dask()
    started = time.monotonic()
    job = _Job(
        f"{source}>{target}>{time.time_ns()}", str(source), str(target), make_predictor, inferer,
        tuple({**settings, "blocks": blocks}.items()), threads,
    )  # fmt: skip
    stream = job.stream()
    logger.info("%s\n%s", stream.target, stream.plan.table())
    if stream.store.is_complete():
        return StreamResult(stream.target, True, 0, time.monotonic() - started, stream.plan)
    stream.store.open()
    todo = stream.store.missing()
    windows = 0
    with _client(scheduler, workers) as client:
        futures = client.map(
            functools.partial(_compute, job), todo, pure=False, retries=_RETRIES, key=job.key
        )
        for number, future in enumerate(distributed.as_completed(futures), 1):
            windows += _result(future, todo)
            logger.info("block %d of %d done", number, len(todo))
    complete = stream.store.finish()
    return StreamResult(stream.target, complete, windows, time.monotonic() - started, stream.plan)


def _compute(job: _Job, index: int) -> int:
    torch.set_num_threads(job.threads)
    return _stream_of_process(job.key, job).run([index]).windows


_streams: dict[str, VolumeStream] = {}


def _stream_of_process(key: str, job: _Job) -> VolumeStream:
    """Return the process's own stream, whose network is built once."""
    if key not in _streams:
        _streams.clear()  # of an earlier run: its network need not stay
        _streams[key] = job.stream()
    return _streams[key]


def _result(future: Any, todo: list[int]) -> int:
    try:
        return int(future.result())
    except Exception as error:
        raise ResourceError(
            f"a block of {len(todo)} could not be computed: {error}; start again to go on with "
            "the blocks that are missing"
        ) from error


def _load_dask() -> Any:
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise ConfigurationError(
            "dask is not installed: pip install 'lamina[cluster]', or compute the blocks one by "
            "one with block=(i, n)"
        ) from error


@contextlib.contextmanager
def _client(scheduler: str | None, workers: int) -> Iterator[Any]:
    distributed = _load_dask()
    if scheduler is not None:
        try:
            client = distributed.Client(scheduler, timeout="30s")
        except OSError as error:
            raise ConfigurationError(
                f"scheduler {scheduler!r} does not answer: {error}; start `dask scheduler` and "
                "give its address, or leave it out for workers on this machine"
            ) from error
        with client:
            yield client
        return
    environment = {"distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT}
    with (
        importlib.import_module("dask").config.set(environment),
        distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client
