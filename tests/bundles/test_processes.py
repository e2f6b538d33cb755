"""Two processes train a bundle on a CPU, and one process goes on from where they stopped."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from pipeline.bundles import bundle_configs
from pipeline.training.checkpoints import read_checkpoint

OVERLAY = "multi_gpu_train"
AVERAGING = "swa"  # all processes renew statistics together when training ends


@pytest.mark.cli
def test_a_run_of_two_processes_leaves_one_set_of_files_that_one_process_resumes(
    bundle, dataset, tmp_path
):
    configs = bundle_configs(bundle.root)
    averaging = tuple(name for name in (AVERAGING,) if name in configs["overlays"])
    overlays = [configs["overlays"][name] for name in (*averaging, OVERLAY)]
    files = [str(path) for path in (configs["train"], *overlays)]
    settings = {**bundle.case.training, **bundle.case.frame, "batch_size": 1, "max_epochs": 1}
    settings |= {"dataset_dir": dataset, "output_dir": tmp_path / "run"}
    settings |= {"device": "cpu", "tune_allocator": False}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "monai.bundle", "run", "--config_file", str(files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]

    log = (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
    assert log.count("epoch 1/1") == 1
    assert "batch 2 = 1 x 1 x 2" in log
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    events = [path for path in (tmp_path / "run" / "tensorboard").iterdir() if path.is_file()]
    assert len(events) == 1
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert not any(name.startswith("module.") for name in last["model"])
    assert log.count("computed anew") == 1
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "swa.pt")["epoch"] == 1

    settings = {"dataset_dir": dataset, "output_dir": tmp_path / "run"}
    bundle.run("train", averaging, **settings, batch_size=2, max_epochs=2)
    history = yaml.safe_load((tmp_path / "run" / "metrics_history.yaml").read_text("utf-8"))
    assert [entry["epoch"] for entry in history] == [1, 2]


def test_every_bundle_can_train_in_several_processes(bundle):
    """One of them validates, and the others must hear of it before they decide anything."""
    overlays = bundle_configs(bundle.root)["overlays"]
    assert OVERLAY in overlays
    training = yaml.safe_load(bundle_configs(bundle.root)["train"].read_text("utf-8"))["train"]
    targets = [handler["_target_"].rpartition(".")[2] for handler in training["handlers"]]
    assert "Validation" in targets
    assert "ValidationHandler" not in targets
