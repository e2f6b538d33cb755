"""Training by `python -m monai.bundle run`, as a person starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.bundles import find_bundle_root

pytestmark = pytest.mark.cli


def trained(folder: Path, config_file: Path | str, settings: dict[str, Any]) -> str:
    """Train for an epoch on the phantom from `folder`; return what was printed."""
    command = [sys.executable, "-m", "monai.bundle", "run", "training"]
    command += ["--config_file", str(config_file)]
    small = {**settings, "device": "cpu", "max_epochs": 1}
    command += [word for key, value in small.items() for word in (f"--{key}", json.dumps(value))]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    output = run.stdout + run.stderr
    assert run.returncode == 0, output[-3000:]
    return output


def test_it_trains_on_the_phantom_from_inside_the_bundle_and_says_so_first(bundle, tmp_path):
    settings = {**bundle.case.training, **bundle.case.frame, "output_dir": str(tmp_path)}
    output = trained(bundle.root, Path("configs") / "train.yaml", settings)
    first = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()[0]
    assert "phantom" in first.lower()
    assert first.split(": ", 1)[1] in output
    assert (tmp_path / "checkpoints" / "best.pt").is_file()
    assert (tmp_path / "report.html").is_file()
    assert not (bundle.root / "runs").exists()


def test_it_trains_from_any_folder_into_that_folder(tmp_path):
    config_file = Path(find_bundle_root("fundus_vessels")) / "configs" / "train.yaml"
    settings = {"val_interval": 1, "patches_per_image": 1, "patch_size": [64, 64], "threads": 1}
    trained(tmp_path, config_file, {**settings, "fov_size_px": 128})
    run = tmp_path / "runs" / "fundus_vessels" / "default"
    assert (run / "checkpoints" / "best.pt").is_file()
