"""Training by `python -m monai.bundle run`, as a person starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cli


@pytest.fixture(scope="module")
def started(bundle, dataset, tmp_path_factory):
    """Two trainings side by side: each costs some ten seconds, most of them imports."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    inside = tmp_path_factory.mktemp("inside")
    small = {**bundle.case.training, **bundle.case.frame, "device": "cpu", "max_epochs": 1}
    settings = [word for key, value in small.items() for word in (f"--{key}", json.dumps(value))]

    def start(folder: Path, config_file: Path | str, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "monai.bundle", "run", "training"]
        command += ["--config_file", str(config_file), *words, *settings]
        return subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    data = ("--dataset_dir", str(dataset), "--output_dir", str(inside))
    default = elsewhere / "runs" / bundle.name / "default"
    processes = {
        "elsewhere": (start(elsewhere, bundle.root / "configs" / "train.yaml"), default),
        "inside": (start(bundle.root, Path("configs") / "train.yaml", *data), inside),
    }
    yield processes
    for process, _ in processes.values():
        process.kill()
        process.communicate()


def finished(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    return output


def test_it_trains_on_the_phantom_from_any_folder_and_says_so_first(started):
    process, run = started["elsewhere"]
    output = finished(process)
    first = (run / "run.log").read_text(encoding="utf-8").splitlines()[0]
    assert "phantom" in first.lower()
    assert first.split(": ", 1)[1] in output
    assert (run / "checkpoints" / "best.pt").is_file()
    assert (run / "report.html").is_file()


def test_it_trains_from_inside_the_bundle_and_leaves_nothing_there(bundle, started):
    process, run = started["inside"]
    finished(process)
    assert (run / "checkpoints" / "best.pt").is_file()
    assert not (bundle.root / "runs").exists()
