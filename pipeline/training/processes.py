"""Several processes that train one network together, each on its share of every batch.

`torchrun` starts them and `join_processes` connects them; without torchrun there is one, and
everything here does what it would do without this module.

Gradients are summed once per update, by `sum_gradients`, instead of during the backward pass as
DistributedDataParallel does: a process that ran out of memory computes its share again, or meets a
value that is not finite, without the others waiting in the middle of theirs; shares may differ in
size; and parameters keep their names, so that a checkpoint runs anywhere.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.handlers import ValidationHandler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import ConfigurationError, LaminaError

__all__ = [
    "Processes",
    "Validation",
    "any_process",
    "from_writer",
    "is_writer",
    "join_processes",
    "least_of_processes",
    "leave_processes",
    "share_statistics",
    "share_weights",
    "sum_gradients",
    "sum_over_processes",
    "texts_of_processes",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
_BUCKET_BYTES = 2**25  # gradients sent together


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Args:
        rank: number of this process; 0 writes the files.
        count: how many there are.
        device: where this process computes, as `choose_device` takes it.
    """

    rank: int
    count: int
    device: str


def join_processes(device: str = "auto", timeout_minutes: float = 240) -> Processes:
    """Connect this process with the others that torchrun started.

    Args:
        device: `cpu`; `cuda`: the GPU of this process's number on its machine; `auto`: GPUs where
            there are any.
        timeout_minutes: how long to wait for another process, which may be validating.

    Returns:
        Rank, count and device; a count of 1 where torchrun did not start this process.

    Raises:
        ConfigurationError: there are fewer GPUs than processes, or a single GPU is named.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes(0, 1, device)
    rank = int(os.environ["RANK"])
    chosen = _own_device(device)
    if chosen != "cpu":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        # gloo beside nccl: plain values travel without touching a GPU
        backend = "gloo" if chosen == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))
        # Else ignite does it when one process first asks it for its rank, and waits for the others.
        idist.sync()
    if rank > 0:  # one voice on the screen; warnings of every process are heard
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("pipeline").setLevel(logging.WARNING)
    logger.info("%d processes, this one on %s", count, chosen)
    return Processes(rank, count, chosen)


def _own_device(request: str) -> str:
    """Return the device of this process, by its number on this machine."""
    here, local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.environ.get("LOCAL_RANK", "0")
    gpus = torch.cuda.device_count()
    if request == "cpu" or (request == "auto" and not gpus):
        return "cpu"
    if request not in ("auto", "cuda"):
        raise ConfigurationError(
            f"device is {request!r}; with several processes it must be auto, cuda or cpu: each "
            "process takes the GPU of its own number"
        )
    if gpus < here:
        raise ConfigurationError(
            f"{here} processes on this machine, which has {gpus} GPUs; start one process per GPU "
            "(torchrun --nproc_per_node), or set device to cpu"
        )
    return f"cuda:{local}"


def leave_processes() -> None:
    """Wait for the other processes and let go of them, at the end of a run."""
    if dist.is_available() and dist.is_initialized():
        _together(dist.barrier)
        dist.destroy_process_group()
        idist.sync()


def _count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _together(collective: Callable[..., object], *arguments: Any, **settings: Any) -> None:
    """Call a collective operation of `torch.distributed`, which all processes call at this place.

    Raises:
        LaminaError: another process is gone.
    """
    try:
        collective(*arguments, **settings)
    except RuntimeError as error:  # gloo has no type of its own
        raise LaminaError(
            f"process {dist.get_rank()} has lost another one, whose own message says why; started "
            "again with resume: auto, the run goes on from its last checkpoint"
        ) from error


def is_writer() -> bool:
    """Return whether this process writes the run's files: number 0, or the only one."""
    return _count() == 1 or dist.get_rank() == 0


def from_writer(make: Callable[[], T]) -> T:
    """Return, in every process, what `make` returns in process 0.

    Args:
        make: called in process 0 alone; it returns something that can be pickled.

    Raises:
        LaminaError: in the other processes, where `make` raised in process 0.
    """
    if _count() == 1:
        return make()
    sent: list[Any] = [None, False]
    try:
        if is_writer():
            sent = [make(), True]
    finally:  # the others are told of a failure too, or they would wait for hours
        _together(dist.broadcast_object_list, sent, src=0)
    if not sent[1]:
        raise LaminaError("process 0 has stopped; its own message says why")
    made: T = sent[0]
    return made


def sum_over_processes(values: Sequence[float]) -> list[float]:
    """Return the sums of numbers over all processes."""
    if _count() == 1:
        return [float(value) for value in values]
    sums = torch.tensor(list(values), dtype=torch.float64)
    _together(dist.all_reduce, sums)
    return [float(value) for value in sums.tolist()]


def least_of_processes(number: int) -> int:
    """Return the smallest of a number over all processes, such as the memory that each has."""
    if _count() == 1:
        return number
    least = torch.tensor(number, dtype=torch.int64)
    _together(dist.all_reduce, least, op=dist.ReduceOp.MIN)
    return int(least)


def any_process(flag: bool) -> bool:
    """Return whether `flag` is set in any process, such as a wish to stop."""
    return sum_over_processes([flag])[0] > 0


def texts_of_processes(text: str) -> list[str]:
    """Return the texts of all processes in order, empty ones left out."""
    texts: list[str] = [text]
    if _count() > 1:
        gathered: list[Any] = [None] * _count()
        _together(dist.all_gather_object, gathered, text)
        texts = gathered
    return [text for text in texts if text]


def sum_gradients(parameters: Sequence[nn.Parameter], used: Sequence[bool]) -> None:
    """Replace gradients by their sums over all processes.

    Args:
        parameters: the same ones, in the same order, in every process.
        used: whether any process has a gradient of each; one that has none adds zero.
    """
    gradients = []
    for parameter, wanted in zip(parameters, used, strict=True):
        if wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        _together(dist.all_reduce, flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield runs of tensors of one kind that together stay below a size, or single ones."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and (not alike or size + tensor.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


@torch.no_grad()
def share_weights(network: nn.Module, iteration: int) -> None:
    """Give every process the parameters and buffers of process 0, before the first step.

    Args:
        network: the network that is trained.
        iteration: where this process stands.

    Raises:
        ConfigurationError: the processes stand at different iterations: they have not resumed from
            the same checkpoint.
    """
    found = {int(text) for text in texts_of_processes(str(iteration))}
    if len(found) > 1:
        listed = ", ".join(map(str, sorted(found)))
        raise ConfigurationError(
            f"the processes are at iterations {listed}; output_dir must be one folder that all of "
            "them see, or begin anew with resume: false"
        )
    for tensor in (*network.parameters(), *network.buffers()):
        shared = tensor.contiguous()
        _together(dist.broadcast, shared, src=0)
        tensor.copy_(shared)


@torch.no_grad()
def share_statistics(network: nn.Module) -> None:
    """Give every process the means over all of them of batch norm's running statistics.

    Each process sees its share of the samples. What is not renewed in training, such as frozen
    layers and constant buffers, is the same in all of them and stays as it is.
    """
    if _count() == 1:
        return
    found = [
        statistic
        for layer in network.modules()
        if isinstance(layer, _BatchNorm) and layer.training
        for statistic in (layer.running_mean, layer.running_var)
        if statistic is not None
    ]
    for bucket in _buckets(found):
        flat = torch.cat(bucket)
        _together(dist.all_reduce, flat)
        for statistic, total in zip(bucket, flat.split([s.numel() for s in bucket]), strict=True):
            statistic.copy_(total / _count())


class Validation(ValidationHandler):
    """Run the validator in process 0 and tell its metrics to the others.

    They then agree on the best epoch and on when to stop. Its metrics must not gather by
    themselves: the other processes do not take part. With `epoch_level` the last epoch is validated
    wherever the interval falls: after a falling learning rate it is often the best one.
    """

    def attach(self, engine: Engine) -> None:
        """Validate when one of the trainer's epochs, or iterations, is due.

        Raises:
            ConfigurationError: the interval is no number of epochs.
        """
        if not self.epoch_level:
            super().attach(engine)
            return
        if not isinstance(self.interval, int) or self.interval < 1:
            raise ConfigurationError(
                f"val_interval must be a whole number of epochs, at least 1, got {self.interval!r}"
            )

        def due(engine: Engine, epoch: int) -> bool:
            return epoch % self.interval == 0 or epoch == engine.state.max_epochs

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)
        if self.exec_at_start:
            engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Validate the trainer's present epoch."""
        epoch = engine.state.epoch
        validator: Any = self.validator

        def measured() -> dict[str, Any]:
            super(Validation, self).__call__(engine)
            return {name: _plain(value) for name, value in validator.state.metrics.items()}

        metrics = from_writer(measured)
        if not is_writer():
            validator.state.metrics = metrics
            validator.state.epoch = epoch


def _plain(value: Any) -> Any:
    """Return a tensor as a number or on the CPU: it would be unpickled on its own device."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.numel() == 1 else value.cpu()
