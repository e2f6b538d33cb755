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
INTERRUPTED = {"fundus_vessels", "insect_pests"}  # by Ctrl-C; the others by the system


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


def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(bundle, dataset, tmp_path):
    signum = signal.SIGINT if bundle.name in INTERRUPTED else signal.SIGTERM
    small = {**bundle.case.training, **bundle.case.frame, "device": "cpu", "max_epochs": 500}
    small |= {"dataset_dir": str(dataset), "output_dir": str(tmp_path), "checkpoint_every": 1}
    command = [sys.executable, "-m", "pipeline", "train", bundle.name]
    for key, value in small.items():
        command += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    last = tmp_path / "checkpoints" / "last.pt"
    try:
        while process.poll() is None and not last.exists():
            time.sleep(0.05)
        process.send_signal(signum)
        complaint = process.communicate(timeout=120)[1].splitlines()
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == SIGNALS[signum], complaint
    iteration = read_checkpoint(last)["iteration"]
    assert f"stopped by {signum.name}: the state after iteration {iteration} is" in complaint[-1]
    assert "resume: auto" in complaint[-1]
