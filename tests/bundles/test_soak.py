"""Real runs, ended from outside: killed at random moments, and asked to stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.training.checkpoints import read_checkpoint

pytestmark = pytest.mark.cli

SIGNALS = {signal.SIGTERM: 75, signal.SIGINT: 130}


def test_killed_runs_end_with_the_states_of_the_undisturbed_one(repository: Path) -> None:
    """The short form of the benchmark; its own settings make 20 kills."""
    command = [sys.executable, str(repository / "benchmarks" / "soak_resume.py"), "--forked"]
    command += ["--trials", "2", "--trials_per_write", "2", "--folder", "."]
    command += ["--max_epochs", "3", "--val_interval", "1"]
    soak = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert soak.returncode == 0, soak.stdout + soak.stderr
    *_, inside, equal = soak.stdout.splitlines()
    assert inside == "1 of 2 killed inside a checkpoint write"
    assert equal == "2 of 2 equal"


@pytest.fixture(scope="module")
def stopped(bundle, dataset, tmp_path_factory):
    """Two trainings side by side, each sent a signal once its first checkpoint is there."""
    small = {**bundle.case.training, **bundle.case.frame, "device": "cpu", "max_epochs": 500}
    small["dataset_dir"] = str(dataset)
    runs = {}
    for signum in SIGNALS:
        folder = tmp_path_factory.mktemp(signum.name)
        settings = {**small, "output_dir": str(folder), "checkpoint_every": 1}
        words = [
            word
            for key, value in settings.items()
            for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "train", bundle.name, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        runs[signum] = (process, folder)
    ended = {}
    try:
        for signum, (process, folder) in runs.items():
            while process.poll() is None and not (folder / "checkpoints" / "last.pt").exists():
                time.sleep(0.05)
            process.send_signal(signum)
        for signum, (process, folder) in runs.items():
            _, complaint = process.communicate(timeout=120)
            ended[signum] = (process.returncode, complaint.splitlines(), folder)
    finally:
        for process, _ in runs.values():
            process.kill()
            process.communicate()
    return ended


@pytest.mark.parametrize("signum", list(SIGNALS), ids=lambda signum: signum.name)
def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(stopped, signum) -> None:
    code, complaint, folder = stopped[signum]
    assert code == SIGNALS[signum], complaint
    iteration = read_checkpoint(folder / "checkpoints" / "last.pt")["iteration"]
    assert f"stopped by {signum.name}: the state after iteration {iteration} is" in complaint[-1]
    assert "resume: auto" in complaint[-1]
