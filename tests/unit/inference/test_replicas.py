from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import ConfigurationError
from pipeline.inference.replicas import Replicas

CPUS = ["cpu", "cpu"]


def batches(count: int) -> Iterator[Tensor]:
    return (torch.full((1, 1, 2), float(number)) for number in range(count))


def firsts(outputs: Iterator[Any]) -> list[float]:
    return [float(output.flatten()[0]) for output in outputs]


@given(count=st.integers(0, 12), devices=st.integers(1, 4))
def test_outputs_come_in_the_order_of_the_batches(count: int, devices: int) -> None:
    def uneven(batch: Tensor) -> Tensor:
        time.sleep(0.001 * (int(batch.flatten()[0]) * 7 % 3))
        return batch * 10

    replicas = Replicas([uneven] * devices, ["cpu"] * devices)
    assert firsts(replicas.run(batches(count))) == [10.0 * number for number in range(count)]


def test_devices_work_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=20)

    def meet(batch: Tensor) -> Tensor:
        meeting.wait()
        return batch

    assert len(firsts(Replicas([meet, meet], CPUS).run(batches(6)))) == 6


def test_a_device_never_runs_two_batches_at_once() -> None:
    locks = [threading.Lock(), threading.Lock()]

    def alone(lock: threading.Lock, batch: Tensor) -> Tensor:
        assert lock.acquire(blocking=False)
        time.sleep(0.002)
        lock.release()
        return batch

    predictors = [lambda batch, lock=lock: alone(lock, batch) for lock in locks]
    assert len(firsts(Replicas(predictors, CPUS).run(batches(20)))) == 20


def test_one_device_needs_no_thread() -> None:
    def here(batch: Tensor) -> Tensor:
        assert threading.current_thread() is threading.main_thread()
        return batch

    assert firsts(Replicas([here], ["cpu"]).run(batches(3))) == [0, 1, 2]


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_batches_are_taken_two_per_device_ahead_at_most(devices: int) -> None:
    taken = 0

    def counted() -> Iterator[Tensor]:
        nonlocal taken
        for batch in batches(20):
            taken += 1
            yield batch

    replicas = Replicas([torch.sigmoid] * devices, ["cpu"] * devices)
    ahead = [taken - done for done, _ in enumerate(replicas.run(counted()))]
    assert max(ahead) <= 2 * devices


def fails_at(number: int) -> Any:
    def predict(batch: Tensor) -> Tensor:
        if batch.flatten()[0] == number:
            raise ArithmeticError(f"batch {number}")
        return batch

    return predict


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("number", [0, 3, 7])
def test_an_error_comes_in_the_place_of_its_output(number: int, devices: int) -> None:
    outputs = Replicas([fails_at(number)] * devices, ["cpu"] * devices).run(batches(8))
    assert [float(next(outputs).flatten()[0]) for _ in range(number)] == list(range(number))
    with pytest.raises(ArithmeticError, match=f"batch {number}"):
        next(outputs)


@pytest.mark.parametrize("devices", [1, 2])
def test_an_error_of_the_source_comes_after_the_outputs_before_it(devices: int) -> None:
    def broken() -> Iterator[Tensor]:
        yield from batches(3)
        raise OSError("no more")

    outputs = Replicas([torch.sigmoid] * devices, ["cpu"] * devices).run(broken())
    assert len([next(outputs) for _ in range(3)]) == 3
    with pytest.raises(OSError, match="no more"):
        next(outputs)


def test_no_thread_is_left_after_the_end_an_error_or_an_early_close() -> None:
    before = set(threading.enumerate())  # which may end meanwhile

    def begun() -> set[threading.Thread]:
        return set(threading.enumerate()) - before

    firsts(Replicas([torch.sigmoid] * 2, CPUS).run(batches(4)))
    assert not begun()
    with pytest.raises(ArithmeticError):
        firsts(Replicas([fails_at(2)] * 2, CPUS).run(batches(8)))
    assert not begun()
    early = Replicas([torch.sigmoid] * 2, CPUS).run(batches(8))
    next(early)
    assert begun()
    early.close()  # type: ignore[attr-defined]
    assert not begun()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_threads_compute_in_the_modes_of_the_caller(mode: Any) -> None:
    def modes(batch: Tensor) -> Tensor:
        flags = [torch.is_inference_mode_enabled(), torch.is_grad_enabled()]
        flags.append(torch.is_autocast_enabled("cpu"))
        return torch.tensor(flags)

    with mode(), torch.autocast("cpu", torch.bfloat16):
        expected = modes(torch.zeros(1))
        for found in Replicas([modes, modes], CPUS).run(batches(4)):
            assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "form",
    [
        lambda batch: (batch, -batch),
        lambda batch: {"a": batch, "b": -batch},
        lambda batch: batch,
    ],
    ids=["row", "mapping", "tensor"],
)
def test_outputs_keep_their_form(form: Any) -> None:
    for devices in (1, 2):
        found = list(Replicas([form] * devices, ["cpu"] * devices).run(batches(2)))
        for output, batch in zip(found, batches(2), strict=True):
            torch.testing.assert_close(output, form(batch), rtol=0, atol=0)


@pytest.mark.parametrize(("networks", "devices"), [(0, []), (1, CPUS), (2, ["cpu"])])
def test_each_device_needs_its_network(networks: int, devices: Sequence[str]) -> None:
    with pytest.raises(ConfigurationError, match="one network for each device"):
        Replicas([torch.sigmoid] * networks, devices)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_go_to_the_device_and_outputs_come_back() -> None:
    def on_gpu(batch: Tensor) -> Tensor:
        assert batch.is_cuda
        return batch * 2

    outputs = list(Replicas([on_gpu, on_gpu], ["cuda", "cuda"]).run(batches(4)))
    assert [output.device.type for output in outputs] == ["cpu"] * 4
