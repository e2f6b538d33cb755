"""What ends a run from outside: signals, and loader workers that are killed."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from types import FrameType
from typing import Any

from monai.data.utils import worker_init_fn

from pipeline.errors import Interrupted, LaminaError, Preempted, ResourceError
from pipeline.training.processes import any_process

__all__ = ["Interruption", "explained", "shielded_worker"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers pass on a signal that reached the run already, so one wish may arrive twice.
_ECHO_S = 1.0
_KILLED_WORKER = re.compile(
    r"DataLoader worker \(pid\S* [\d, ]+\) (is killed by signal: [\w ]+\w|exited unexpectedly)"
)
_NOTICE_S = 1.0
_GRACE_S = 60


class Interruption:
    """Hold SIGTERM and Ctrl-C back until the run has saved its state.

    Between `begin` and `end` the first signal is only noted: the run saves at the end of its step
    and raises `error`. The second one, a second later or more, goes to whoever handled it before,
    which ends the process at once.
    """

    def __init__(self) -> None:
        self.noted: signal.Signals | None = None
        self._noted_s = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._process = 0

    def begin(self) -> None:
        """Listen; only the main thread of a process may, elsewhere signals do what they did."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        self.noted = None
        self._process = os.getpid()
        for signum in _SIGNALS:
            self._previous[signum] = signal.signal(signum, self._note)

    def end(self) -> None:
        """Give the signals back to their previous handlers; without effect before `begin`."""
        while self._previous:
            signum, handler = self._previous.popitem()
            # None: a handler that was not installed from Python and cannot be put back
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def asked(self) -> bool:
        """Return whether to stop; several processes agree, and all must call it at this place."""
        return any_process(self.noted is not None)

    def error(self, what: str) -> Interrupted | Preempted:
        """Return the error that ends the run.

        Args:
            what: what became of the state, such as "the state is in last.pt".
        """
        noted = self.noted or signal.SIGTERM  # not noted here: in another of several processes
        kind = Interrupted if noted is signal.SIGINT else Preempted
        return kind(
            f"stopped by {noted.name}: {what}; the same command goes on from there (resume: auto)"
        )

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A process forked meanwhile. Ctrl-C reaches all of a terminal's: the run decides.
            if signum != signal.SIGINT:
                signal.signal(signum, signal.SIG_DFL)
                signal.raise_signal(signum)
            return
        if self.noted is None:
            # Nothing else, not even a line in the log: its stream may be in use at this moment.
            self.noted, self._noted_s = signal.Signals(signum), time.monotonic()
        elif time.monotonic() - self._noted_s >= _ECHO_S:
            self.end()
            signal.raise_signal(signum)


def shielded_worker(worker_id: int) -> None:
    """Leave signals to the run; for a DataLoader's `worker_init_fn`.

    Schedulers and terminals signal every process of a run, and a loader worker that ends takes the
    run with it before the state is saved. The run itself still ends its workers with SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.signal(signal.SIGTERM, _end_later)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(_run_process(),), daemon=True).start()
    threading.Thread(target=_end_with_run, daemon=True).start()
    worker_init_fn(worker_id)  # what MONAI's DataLoader does where no other function is given


def _run_process() -> int:
    """Return the process whose worker this is, which a fork server only stands in for."""
    parent = multiprocessing.parent_process()
    return os.getppid() if parent is None or parent.pid is None else parent.pid


def _end_with_run() -> None:
    """End this process when its run is gone, killed for instance."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _obey(process: int) -> None:
    """End this process when `process` sends it SIGTERM; that of others goes unheard."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        pass
    os._exit(0)


def _end_later(signum: int, frame: FrameType | None) -> None:
    """End this process a while after a SIGTERM that a thread took before `_obey` could.

    Libraries let the signal through again, multiprocessing for one where it starts its resource
    tracker, and then nobody knows who sent it. The run has time to save its state either way.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.alarm(_GRACE_S)


def explained(error: BaseException, interruption: Interruption | None = None) -> BaseException:
    """Return an error with a hint for that of a killed loader worker, any other as it is.

    Args:
        error: what ended the run.
        interruption: the run's; where a signal was noted, it is what killed the worker.
    """
    ours = isinstance(error, LaminaError | KeyboardInterrupt)
    killed = None if ours else _killed_worker(error)
    if killed is None:
        return error
    if interruption is not None and interruption.noted is not None:
        return interruption.error(
            f"a loader worker ended first ({killed}) and the steps since the last save are lost"
        )
    return ResourceError(
        f"a loader worker was lost ({killed}): most often memory ran out; lower num_workers or "
        "batch_size, or give the container more shared memory; started again with resume: auto, "
        "the run goes on from its last checkpoint"
    )


def _killed_worker(error: BaseException) -> str | None:
    """Return what torch says of a lost worker, searched in `error` and what it came from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, RuntimeError) and (found := _KILLED_WORKER.search(str(current))):
            return found[0]
        if isinstance(current, ConnectionError | EOFError) and _from_loader(current):
            return _notice_of_death()
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return None


def _from_loader(error: BaseException) -> bool:
    """Return whether an error was raised while the loader took a batch from a worker."""
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.endswith("torch/utils/data/dataloader.py") for name in files)


def _notice_of_death() -> str:
    """Wait for the system's notice that a worker is gone, and return what torch says of it.

    Its connection may break before: torch raises its error as the notice comes, wherever the
    program is then, and that is better here than in what follows.
    """
    try:
        time.sleep(_NOTICE_S)
    except RuntimeError as notice:
        if found := _KILLED_WORKER.search(str(notice)):
            return found[0]
        raise
    return "its connection broke"
