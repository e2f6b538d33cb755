"""Averaged weights in two processes, one of which is killed, against one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch import nn

from pipeline.training import processes
from pipeline.training.averaging import AveragedNetwork, SWAHandler
from pipeline.training.checkpoints import read_checkpoint
from pipeline.training.epoch_metrics import ValidationLoss
from pipeline.training.history import History
from pipeline.training.losses import DiceLoss
from pipeline.training.monitor import Monitor
from pipeline.training.ordering import DataOrder, KeyedDataset, OrderedBatches
from pipeline.training.saving import CheckpointHandler
from pipeline.training.step import TrainingStep

EPOCHS, LENGTH = 4, 3
SAMPLES = 13  # by 6: an epoch's last batch has one, and nothing for the second process
KILLED_AT = 8  # within the third epoch, when averaging has begun

EXPONENTIAL: dict[str, Any] = {"start_epoch": 1, "unit": "step", "learning_rate": None}
STOCHASTIC: dict[str, Any] = {"start_epoch": 2, "learning_rate": 0.01, "anneal_epochs": 2}
RUNS: dict[str, dict[str, Any]] = {
    "exponential": {"norm": "group", "decay": 0.9, "averaging": EXPONENTIAL},
    "stochastic": {"norm": "group", "averaging": STOCHASTIC},
    "exponential with batch norm": {"norm": "batch", "decay": 0.9, "averaging": EXPONENTIAL},
    "stochastic with batch norm": {"norm": "batch", "averaging": STOCHASTIC},
    # Weights that stay: only the statistics renewed at the end can differ.
    "renewal": {"norm": "batch", "averaging": STOCHASTIC | {"learning_rate": None}, "rate": 0.0},
}


class NoTransform:
    def set_random_state(self, seed: int | None = None) -> None:
        """Nothing here is random."""


class Labelled(torch.utils.data.Dataset[Any]):
    """Double-precision images, each brighter than the one before, and labels."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(SAMPLES, 1, 6, 6, generator=generator, dtype=torch.float64)
        self.images = noise + torch.arange(SAMPLES).view(-1, 1, 1, 1) / 4
        self.labels = (noise > 0.3).double()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}


def make_network(norm: str) -> nn.Module:
    """Two normalisations: what the second one sees depends on how the first one normalises."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4) if norm == "batch" else nn.GroupNorm(2, 4) for _ in range(2)]
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), norms[0], nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1), norms[1], nn.Tanh(), nn.Conv2d(4, 1, 1),
    ).double()  # fmt: skip


def train(
    folder: Path,
    batch_size: int,
    rank: int = 0,
    count: int = 1,
    *,
    norm: str,
    averaging: dict[str, Any],
    decay: float | None = None,
    rate: float = 0.05,
    killed_at: int | None = None,
) -> dict[str, Any]:
    """Train to the end, where nothing kills this process, and return all weights."""
    dataset = KeyedDataset(Labelled(), NoTransform(), seed=5)
    batches = OrderedBatches(dataset, batch_size, 5, rank, count)
    loader = DataLoader(dataset, batch_sampler=batches)
    network = make_network(norm)
    average = AveragedNetwork(network, decay, warm_up=False)
    loss = DiceLoss(per_sample=True, ignore_label=None)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    validator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader([Labelled()[0], Labelled()[1]], batch_size=1),
        network=average.module,
        val_handlers=[ValidationLoss(loss)],
    )
    monitor = Monitor(validator, "val_loss", mode="min", early_stopping=False)
    step = TrainingStep(2, batch_size, SAMPLES, rank=rank, processes=count)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=EPOCHS,
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        loss_function=loss,
        iteration_update=step,
        decollate=False,
        train_handlers=[
            DataOrder(batches, seed=5),
            SWAHandler(
                average, network, optimizer, 2, loader=loader, validator=validator, **averaging
            ),
            processes.Validation(1, validator),
            History(str(folder / "history.yaml"), monitor, optimizer),
            CheckpointHandler(
                str(folder), network, {"average": average, "optimizer": optimizer, "step": step},
                definition={}, monitor=monitor, averaged=average.module, every=2,
                accumulation_steps=2,
            ),
        ],
    )  # fmt: skip
    if killed_at is not None:
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED(once=killed_at),
            lambda: os.kill(os.getpid(), signal.SIGKILL),
        )
    trainer.run()
    optimised = {k: v["momentum_buffer"] for k, v in optimizer.state_dict()["state"].items()}
    return {
        "average": dict(average.module.state_dict()),
        "network": dict(network.state_dict()),
        "momentum": {str(k): v for k, v in optimised.items()},
        "figures": {
            k: torch.as_tensor(v, dtype=torch.float64) for k, v in validator.state.metrics.items()
        },
    }


def act(task: str, folder: str) -> None:
    """Be one of two processes, which write what they found into `folder`."""
    torch.set_num_threads(1)
    mine = processes.join_processes("cpu", timeout_minutes=2)
    own, shared = Path(folder) / f"{mine.rank}", Path(folder) / "killed"
    run = RUNS["stochastic with batch norm"]
    if task == "resume":
        begun = read_checkpoint(shared / "last.pt")["iteration"]
        found = {"begun": begun, "resumed": train(shared, 3, mine.rank, 2, **run)}
    else:  # each into a folder of its own, to see who writes
        found = {
            name: train(own / name, 3, mine.rank, 2, **settings)
            for name, settings in RUNS.items()
        }  # fmt: skip
    torch.save(found, Path(folder) / f"{task} {mine.rank}.pt")
    if task != "resume":
        train(shared, 3, mine.rank, 2, **run, killed_at=KILLED_AT if mine.rank else None)
    processes.leave_processes()


@pytest.fixture(scope="module")
def folder(run_in_two: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have trained, one was killed, and both went on."""
    folder = tmp_path_factory.mktemp("averaging")
    first, then = run_in_two(__file__, ["train", folder], ["resume", folder])
    (one, told), (other, _) = first
    assert other == -signal.SIGKILL
    assert one == 1, told
    assert "process 0 has lost another one" in told
    assert [code for code, _ in then] == [0, 0], then
    for begun in found_by_both(folder, "resume", "begun"):
        assert LENGTH < begun < EPOCHS * LENGTH
    return folder


def found_by_both(folder: Path, task: str, name: str) -> list[Any]:
    return [torch.load(folder / f"{task} {rank}.pt", weights_only=True)[name] for rank in range(2)]


def assert_same(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 0.0) -> None:
    for kind, tensors in wanted.items():
        assert found[kind].keys() == tensors.keys()
        for name, tensor in tensors.items():
            difference = (found[kind][name] - tensor).double().norm()
            assert float(difference) <= tolerance * float(tensor.double().norm()), (kind, name)


@pytest.mark.cli
@pytest.mark.parametrize("name", RUNS)
def test_both_processes_hold_the_same_bit_for_bit(folder: Path, name: str) -> None:
    one, other = found_by_both(folder, "train", name)
    assert_same(one, other)


@pytest.mark.cli
@pytest.mark.parametrize("name", ["exponential", "stochastic", "renewal"])
def test_two_processes_average_as_one_with_the_larger_batch(
    folder: Path, tmp_path: Path, name: str
) -> None:
    alone = train(tmp_path, 6, **RUNS[name])
    compared = {kind: alone[kind] for kind in ("average", "figures")}
    assert_same(found_by_both(folder, "train", name)[1], compared, tolerance=1e-10)


@pytest.mark.cli
@pytest.mark.parametrize("name", RUNS)
def test_the_second_process_writes_nothing(folder: Path, name: str) -> None:
    written = {path.name for path in (folder / "0" / name).iterdir()}
    assert {"best.pt", "last.pt", "previous.pt", "swa.pt", "history.yaml"} <= written
    assert not (folder / "1").exists()


@pytest.mark.cli
def test_a_run_of_two_goes_on_after_a_kill_as_if_there_had_been_none(folder: Path) -> None:
    whole = found_by_both(folder, "train", "stochastic with batch norm")[0]
    for resumed in found_by_both(folder, "resume", "resumed"):
        assert_same(resumed, whole)
    saved = [
        read_checkpoint(parent / "swa.pt")
        for parent in (folder / "killed", folder / "0" / "stochastic with batch norm")
    ]
    assert_same({"model": saved[0]["model"]}, {"model": saved[1]["model"]})
    assert saved[0]["metrics"] == saved[1]["metrics"]
