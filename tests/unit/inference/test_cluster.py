from __future__ import annotations

import importlib
import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn

from pipeline.data.volumes import open_volume
from pipeline.errors import ConfigurationError, InputError, ResourceError
from pipeline.inference import cluster
from pipeline.inference.cluster import WORKER_ENVIRONMENT, local_or_running, stream_on_cluster
from pipeline.inference.sliding_window import SlidingWindow
from pipeline.inference.streaming import stream_volume

INFERER = SlidingWindow((16, 16, 16), 0.5, "separable")


def make_network(seconds: float = 0.0) -> Any:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 3, padding=1))
    layers.eval().requires_grad_(False)

    def network(windows: Tensor) -> Any:
        time.sleep(seconds)
        return layers(windows)

    return network


def make_slow_network() -> Any:
    return make_network(0.02)


def make_failing_network() -> Any:
    raise InputError("weights.pt: not found on this worker")


@pytest.fixture(scope="module")
def workers() -> Iterator[Any]:
    """A cluster of two processes on this machine, as `stream_on_cluster` starts one."""
    pytest.importorskip("distributed")
    with local_or_running(None, 2) as client:
        yield client


@pytest.fixture
def source(tmp_path: Path) -> Path:
    volume = np.random.default_rng(0).integers(0, 255, (96, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "volume.npy", volume)
    return tmp_path / "volume.npy"


def one_process(source: Path) -> Any:
    target = source.with_name("one.zarr")
    stream_volume(source, target, make_network(), inferer=INFERER)
    return open_volume(target)[:]


def kill_a_worker(client: Any, target: Path, killed: list[int]) -> None:
    """Kill a worker once some of the result is written."""
    partial = target.with_name(f"{target.name}.partial")
    while len(list(partial.glob("progress/*.json"))) < 2:
        time.sleep(0.01)
    process = next(iter(client.run(os.getpid).values()))
    os.kill(process, signal.SIGKILL)
    killed.append(process)


def test_two_workers_of_whom_one_is_killed_give_what_one_process_gives(
    workers: Any, source: Path
) -> None:
    target, killed = source.with_name("two.zarr"), []
    killer = threading.Thread(target=kill_a_worker, args=(workers, target, killed))
    killer.start()
    result = stream_on_cluster(
        source, target, make_slow_network, inferer=INFERER, blocks=6, chunks=(8, 32, 32),
        scheduler=workers.scheduler.address,
    )  # fmt: skip
    killer.join()
    assert killed
    assert not psutil.pid_exists(killed[0])
    assert result.complete
    np.testing.assert_array_equal(open_volume(target)[:], one_process(source))
    assert not target.with_name("two.zarr.partial").exists()


def test_the_environment_of_workers_keeps_memory_and_one_thread(workers: Any) -> None:
    for found in workers.run(lambda: dict(os.environ)).values():
        for name, value in WORKER_ENVIRONMENT.items():
            assert found[name] == os.environ.get(name, value)


@pytest.mark.parametrize(("arenas", "said"), [(None, True), ("1", False)])
def test_workers_without_that_environment_are_pointed_out(
    workers: Any, caplog: pytest.LogCaptureFixture, arenas: str | None, said: bool
) -> None:
    def restore(value: str | None) -> None:
        os.environ.pop("MALLOC_ARENA_MAX", None)
        if value is not None:
            os.environ["MALLOC_ARENA_MAX"] = value

    workers.run(restore, arenas)
    with caplog.at_level(logging.INFO), local_or_running(workers.scheduler.address, 2):
        pass
    workers.run(restore, "1")
    said_now = "2 workers; on a CPU twice as fast if started with MALLOC_ARENA_MAX=1" in caplog.text
    assert said_now is (said and platform.libc_ver()[0] == "glibc")


def test_a_second_start_does_what_is_missing(workers: Any, source: Path) -> None:
    target = source.with_name("two.zarr")
    options: dict[str, Any] = {"inferer": INFERER, "blocks": 4, "chunks": (8, 32, 32)}
    stream_volume(source, target, make_network(), inferer=INFERER, chunks=(8, 32, 32), block=(2, 4))
    address = workers.scheduler.address
    result = stream_on_cluster(source, target, make_network, scheduler=address, **options)
    assert result.complete
    assert 0 < result.windows < result.plan.windows
    again = stream_on_cluster(source, target, make_network, scheduler=address, **options)
    assert again.complete
    assert again.windows == 0
    anew = stream_on_cluster(
        source, target, make_network, scheduler=address, overwrite=True, **options
    )
    assert anew.windows == result.plan.windows
    np.testing.assert_array_equal(open_volume(target)[:], one_process(source))


def test_an_error_on_a_worker_keeps_its_type(workers: Any, source: Path) -> None:
    with pytest.raises(InputError, match="not found on this worker"):
        stream_on_cluster(
            source, source.with_name("two.zarr"), make_failing_network, inferer=INFERER, blocks=2,
            channels=2, scheduler=workers.scheduler.address,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["KilledWorker", "CancelledError"])
def test_a_block_that_dask_gives_up_is_a_resource_error(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    distributed = pytest.importorskip("distributed")
    raised = getattr(distributed, kind)("block-1", None, 3)

    class Future:
        def result(self) -> int:
            raise raised

    class Client:
        def map(self, *_: Any, **__: Any) -> list[Future]:
            return [Future()]

    monkeypatch.setattr(distributed, "as_completed", lambda futures: futures)
    job: Any = type("Job", (), {"target": "r.zarr", "key": "key"})()
    with pytest.raises(ResourceError, match=r"r\.zarr: .* a block|of one block.*start again"):
        cluster._compute_all(Client(), job, [1])


def test_without_dask_the_extra_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigurationError, match=r"pip install 'lamina\[cluster\]'"):
        stream_on_cluster(
            source, source.with_name("two.zarr"), make_network, inferer=INFERER, blocks=2
        )


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "_TIMEOUT_S", 0.5)
    address = "tcp://127.0.0.1:1"
    with (
        pytest.raises(ConfigurationError, match=f"'{address}' does not answer"),
        local_or_running(address, 2),
    ):
        pass


def test_dask_speaks_of_what_goes_wrong_only(workers: Any) -> None:
    handlers = logging.getLogger("distributed").handlers
    assert all(handler.level >= logging.WARNING for handler in handlers)
