"""One network on several devices, whose results come in the order of the work."""

from __future__ import annotations

import contextlib
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ConfigurationError

__all__ = ["Replicas"]

_AHEAD = 2  # batches per device: one at work, one waiting


class Replicas:
    """Share batches among devices, one thread each; a single device needs no thread.

    Args:
        predictors: one per device, each a function of a batch there; what it gives is a tensor, or
            a mapping or row of tensors.
        devices: of the predictors.

    Raises:
        ConfigurationError: there is no device, or not one predictor for each.
    """

    def __init__(
        self,
        predictors: Sequence[Callable[[Tensor], Any]],
        devices: Sequence[torch.device | str],
    ) -> None:
        if not predictors or len(predictors) != len(devices):
            raise ConfigurationError(
                f"devices: {len(devices)} devices for {len(predictors)} networks; expected one "
                "network for each device, and at least one"
            )
        self._places = [
            (predictor, torch.device(device))
            for predictor, device in zip(predictors, devices, strict=True)
        ]

    def run(self, batches: Iterable[Tensor]) -> Iterator[Any]:
        """Yield the output for each of `batches`, in their order and on their device.

        An error of a batch comes in the place of its output. Batches are taken in the caller's
        thread, at most two per device ahead of the output that is due.
        """
        if len(self._places) == 1:
            ((predictor, device),) = self._places
            for batch in batches:
                yield _predict(predictor, device, batch)
        else:
            yield from self._share(batches)

    def _share(self, batches: Iterable[Tensor]) -> Iterator[Any]:
        idle: queue.SimpleQueue[tuple[Callable[[Tensor], Any], torch.device]] = queue.SimpleQueue()
        for place in self._places:
            idle.put(place)

        def work(batch: Tensor, modes: _Modes) -> Any:
            predictor, device = idle.get()  # never waits: there are as many threads as places
            try:
                with modes.entered(), _current(device):
                    return _predict(predictor, device, batch)
            finally:
                idle.put((predictor, device))

        threads = ThreadPoolExecutor(len(self._places), thread_name_prefix="device")
        try:
            submitted = (threads.submit(work, batch, _Modes()) for batch in batches)
            yield from _in_order(submitted, _AHEAD * len(self._places))
        finally:  # also where the caller stops early
            threads.shutdown(wait=True, cancel_futures=True)


def _in_order(submitted: Iterator[Future[Any]], ahead: int) -> Iterator[Any]:
    due: deque[Future[Any]] = deque()
    while True:
        try:
            due.append(next(submitted))
        except StopIteration:
            break
        except Exception:  # no further batch can be had: first comes what is under way
            while due:
                yield due.popleft().result()
            raise
        if len(due) == ahead:
            yield due.popleft().result()
    while due:
        yield due.popleft().result()


class _Modes:
    """The caller's gradient and autocast modes, which a thread does not inherit."""

    def __init__(self) -> None:
        self._inference = torch.is_inference_mode_enabled()
        self._grad = torch.is_grad_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            yield


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _predict(predictor: Callable[[Tensor], Any], device: torch.device, batch: Tensor) -> Any:
    return _to(predictor(batch.to(device)), batch.device)


def _to(outputs: Any, device: torch.device) -> Any:
    """Return `outputs` on `device`, in the form they have."""
    if isinstance(outputs, Tensor):
        return outputs.to(device)
    if isinstance(outputs, Mapping):
        return {name: _to(output, device) for name, output in outputs.items()}
    return tuple(_to(output, device) for output in outputs)
