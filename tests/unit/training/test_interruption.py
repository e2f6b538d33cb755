"""Signals and killed loader workers, sent for real to a tiny run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import CheckpointError, Interrupted, Preempted, ResourceError, exit_code
from pipeline.training import interruption
from pipeline.training.checkpoints import read_checkpoint
from pipeline.training.interruption import Interruption, explained, shielded_worker
from pipeline.training.monitor import Monitor
from pipeline.training.ordering import DataOrder, OrderedBatches
from pipeline.training.run_folder import RunFolder
from pipeline.training.saving import CheckpointHandler

STEPS, EPOCHS, GROUP = 5, 3, 2  # groups of 2, 2 and 1 steps
CODES = {signal.SIGTERM: (Preempted, 75), signal.SIGINT: (Interrupted, 130)}
SIGNALS = pytest.mark.parametrize("signum", list(CODES), ids=lambda signum: signum.name)


class Aborted(Exception):  # noqa: N818 - stands for what a second signal does
    """The handler from before the run was called."""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Give each test handlers of its own, and check that its runs put them back."""

    def handle(signum: int, frame: Any) -> None:
        raise Aborted(signal.Signals(signum).name)

    before = {signum: signal.signal(signum, handle) for signum in CODES}
    try:
        yield
        assert {signal.getsignal(signum) for signum in CODES} == {handle}
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def send(*signals: signal.Signals) -> None:
    for signum in signals:
        os.kill(os.getpid(), signum)


def send_from_outside(process: psutil.Process, signum: signal.Signals) -> None:
    subprocess.run(["kill", f"-{signum.name}", str(process.pid)], check=True)


def workers() -> list[psutil.Process]:
    return psutil.Process().children()


class Items(Dataset[Tensor]):
    """Item `(epoch, index)` follows from both; one of them may be poisonous."""

    def __init__(self, poison: tuple[int, int] | None = None) -> None:
        self.poison = poison

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        if key == self.poison:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.randn(3, generator=torch.Generator().manual_seed(10 * key[0] + key[1]))


class Run:
    """Three epochs of five steps; `at` says what happens in the middle of which step."""

    def __init__(
        self,
        folder: Path,
        at: dict[int, Callable[[], None]] | None = None,
        with_folder: bool = True,
        **loader: Any,
    ) -> None:
        torch.manual_seed(0)
        self.folder, self.at = folder, at or {}
        self.network = nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1, momentum=0.9)
        dataset = loader.pop("dataset", Items())
        batches = OrderedBatches(dataset, batch_size=1, seed=0)
        self.loader = DataLoader(dataset, batch_sampler=batches, **loader)
        self.trainer = Engine(self.step)
        if with_folder:
            RunFolder(str(folder), {}, "cpu").attach(self.trainer)
        DataOrder(batches, seed=0).attach(self.trainer)
        CheckpointHandler(
            str(folder / "checkpoints"),
            self.network,
            {"optimizer": self.optimizer},
            {"bundle": "phantom"},
            Monitor(Engine(lambda *_: None), "val_dice"),
            accumulation_steps=GROUP,
        ).attach(self.trainer)

    def step(self, trainer: Engine, batch: Tensor) -> None:
        iteration = trainer.state.iteration
        within = (iteration - 1) % STEPS
        if within % GROUP == 0:
            self.optimizer.zero_grad()
        self.network(batch).square().sum().backward()
        if iteration in self.at:
            self.at.pop(iteration)()
        if within % GROUP == GROUP - 1 or within == STEPS - 1:
            self.optimizer.step()

    def start(self) -> Run:
        self.trainer.run(self.loader, max_epochs=EPOCHS)
        return self

    def last(self) -> dict[str, Any]:
        return read_checkpoint(self.folder / "checkpoints" / "last.pt")

    def weights(self) -> list[float]:
        return [*self.network.weight.flatten().tolist(), *self.network.bias.tolist()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The weights of the run that nobody disturbed."""
    return Run(tmp_path_factory.mktemp("whole")).start().weights()


@SIGNALS
@pytest.mark.parametrize(
    ("during", "saved"), [(1, 2), (2, 2), (3, 4), (5, 5), (6, 7), (10, 10), (15, 15)]
)
def test_a_signal_stops_the_run_at_the_end_of_its_group_and_nothing_is_lost(
    tmp_path: Path, whole: list[float], signum: signal.Signals, during: int, saved: int
) -> None:
    kind, code = CODES[signum]
    run = Run(tmp_path, {during: lambda: send(signum)})
    message = rf"stopped by {signum.name}: .* iteration {saved} is in .*last\.pt; .*resume: auto"
    with pytest.raises(kind, match=message) as caught:
        run.start()
    assert exit_code(caught.value) == code
    assert run.trainer.state.iteration == saved
    assert run.last()["iteration"] == saved
    assert run.last()["epoch"] == saved // STEPS
    assert Run(tmp_path).start().weights() == whole


@SIGNALS
def test_a_run_may_be_stopped_again_and_again(
    tmp_path: Path, whole: list[float], signum: signal.Signals
) -> None:
    for iteration in (1, 3, 5, 6, 9, 14):
        with pytest.raises(CODES[signum][0]):
            Run(tmp_path, {iteration: lambda: send(signum)}).start()
    assert Run(tmp_path).start().weights() == whole


def test_a_signal_while_the_epoch_ends_waits_for_the_save(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer.add_event_handler(
        Events.EPOCH_COMPLETED(once=2), lambda: send(signal.SIGTERM)
    )  # behind the handler that saves: the next group ends before the run is asked again
    with pytest.raises(Preempted, match="iteration 12"):
        run.start()
    assert run.last()["iteration"] == 12


def test_handlers_behind_see_the_last_step_too(tmp_path: Path) -> None:
    seen: list[int] = []
    run = Run(tmp_path, {3: lambda: send(signal.SIGINT)})
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda trainer: seen.append(trainer.state.iteration)
    )
    with pytest.raises(Interrupted):
        run.start()
    assert seen == [1, 2, 3, 4]


@SIGNALS
@pytest.mark.parametrize("first", list(CODES), ids=lambda signum: f"after_{signum.name}")
def test_the_second_signal_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: signal.Signals, signum: signal.Signals
) -> None:
    monkeypatch.setattr(interruption, "_ECHO_S", 0.0)
    run = Run(tmp_path, {8: lambda: send(first, signum)})
    with pytest.raises(Aborted, match=signum.name):
        run.start()
    assert run.trainer.state.iteration == 8
    assert run.last()["iteration"] == 5  # the end of the epoch before


def test_a_signal_that_a_launcher_passes_on_counts_once(tmp_path: Path) -> None:
    run = Run(tmp_path, {1: lambda: send(signal.SIGINT, signal.SIGTERM, signal.SIGINT)})
    with pytest.raises(Interrupted, match="iteration 2"):
        run.start()


@pytest.mark.parametrize("with_folder", [True, False])
@pytest.mark.parametrize("event", [Events.STARTED, Events.ITERATION_COMPLETED, Events.COMPLETED])
def test_signals_are_given_back_after_an_error(
    tmp_path: Path, event: Events, with_folder: bool
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    run = Run(tmp_path, with_folder=with_folder)
    run.trainer.add_event_handler(event, fail)
    with pytest.raises(ZeroDivisionError):
        run.start()


def test_signals_are_not_taken_by_a_run_that_cannot_resume(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError):
        Run(tmp_path).start()


def test_listeners_that_swallow_errors_do_not_swallow_the_stop(tmp_path: Path) -> None:
    run = Run(tmp_path, {3: lambda: send(signal.SIGTERM)})
    run.trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda *_: None)
    with pytest.raises(Preempted):
        run.start()
    log = (tmp_path / "run.log").read_text("utf-8").splitlines()
    assert "WARNING pipeline.training.run_folder: stopped: stopped by SIGTERM" in log[-1]


def test_a_thread_trains_without_signals(tmp_path: Path, whole: list[float]) -> None:
    run = Run(tmp_path)
    thread = threading.Thread(target=run.start)
    thread.start()
    thread.join()
    assert run.weights() == whole


def test_a_forked_process_leaves_ctrl_c_to_the_run_and_ends_on_sigterm() -> None:
    held = Interruption()
    held.begin()
    child = multiprocessing.get_context("fork").Process(
        target=send, args=(signal.SIGINT, signal.SIGTERM), daemon=True
    )
    child.start()
    held.end()
    child.join(10)
    assert child.exitcode == -signal.SIGTERM
    assert held.noted is None


def test_a_killed_worker_leaves_a_hint_and_a_run_that_goes_on(
    tmp_path: Path, whole: list[float]
) -> None:
    run = Run(tmp_path, num_workers=1, dataset=Items(poison=(2, 3)))
    hint = r"a loader worker was lost \(.*\): .*num_workers.*shared memory.*resume: auto"
    with pytest.raises(ResourceError, match=hint) as caught:
        run.start()
    assert exit_code(caught.value) == 5
    assert "\n" not in str(caught.value)
    assert run.last()["iteration"] == 5
    assert Run(tmp_path, num_workers=1).start().weights() == whole


@SIGNALS
def test_a_signal_to_every_process_of_the_run_loses_nothing(
    tmp_path: Path, whole: list[float], signum: signal.Signals
) -> None:
    def send_to_all() -> None:
        for worker in workers():
            send_from_outside(worker, signum)
        send(signum)
        time.sleep(0.2)  # the death of a worker would be noticed in this time

    run = Run(tmp_path, {6: send_to_all}, num_workers=2, worker_init_fn=shielded_worker)
    with pytest.raises(CODES[signum][0], match="iteration 7"):
        run.start()
    assert Run(tmp_path, num_workers=2).start().weights() == whole


def test_a_worker_that_the_signal_ended_first_is_no_failure(tmp_path: Path) -> None:
    def send_to_all() -> None:
        send(signal.SIGTERM)
        for worker in workers():
            worker.kill()
            worker.wait()
        time.sleep(0.2)

    run = Run(tmp_path, {6: send_to_all}, num_workers=1)
    with pytest.raises(Preempted, match=r"stopped by SIGTERM: .*resume: auto"):
        run.start()
    assert run.last()["iteration"] == 5


SHIELDED = """
import psutil, signal, subprocess, sys, time
from torch.utils.data import DataLoader
from pipeline.training.interruption import shielded_worker

class Items(list):
    def __getitem__(self, index):
        if "unblock" in sys.argv:  # as multiprocessing does where it starts its resource tracker
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        return index

loading = iter(DataLoader(Items(range(9)), num_workers=1, worker_init_fn=shielded_worker))
next(loading)  # the worker is ready
(worker,) = psutil.Process().children()
for name in ("TERM", "INT"):
    subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
time.sleep(0.2)
print(worker.status() != psutil.STATUS_ZOMBIE)
worker.terminate()
worker.wait(10)  # as interpreters do when they exit, without a limit
print("ended")
"""


@pytest.mark.cli
@pytest.mark.parametrize("way", ["blocked", "unblock"])
def test_a_shielded_worker_obeys_its_run_alone(way: str) -> None:
    """In a process of its own: torch looks after the workers of all loaders of one at once."""
    run = subprocess.run(
        [sys.executable, "-c", SHIELDED, way],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.stdout.split() == ["True", "ended"], run.stderr


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 12) is killed by signal: Killed. ",
        "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that ...",
        "DataLoader worker (pid(s) 12, 13) exited unexpectedly",
    ],
)
def test_torchs_words_for_a_lost_worker_are_known(text: str) -> None:
    wrapped = ValueError("applying transform <...>")
    wrapped.__cause__ = RuntimeError(text)
    for error in (RuntimeError(text), wrapped):
        told = explained(error)
        assert isinstance(told, ResourceError)
        assert text[:40] in str(told)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ResourceError("disk full")])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert explained(error) is error


@pytest.mark.parametrize(
    ("place", "lost"), [("/lib/torch/utils/data/dataloader.py", True), ("mine.py", False)]
)
def test_a_connection_that_breaks_inside_the_loader_is_a_lost_worker(
    monkeypatch: pytest.MonkeyPatch, place: str, lost: bool
) -> None:
    """A worker that dies may be noticed so before the system tells of its death."""
    monkeypatch.setattr(interruption, "_NOTICE_S", 0.0)
    broken = compile("raise ConnectionResetError(104, 'reset by peer')", place, "exec")
    with pytest.raises(ConnectionResetError) as caught:
        exec(broken)
    told = explained(caught.value)
    assert isinstance(told, ResourceError) == lost
    assert lost == ("a loader worker was lost (its connection broke)" in str(told))
