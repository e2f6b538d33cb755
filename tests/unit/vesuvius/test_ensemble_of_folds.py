"""The folds of a cross-validation as one predictor: live, and averaged from what each wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.bundles import run_bundle
from pipeline.data.checksums import file_sha256
from pipeline.data.images import read_image
from pipeline.data.writers import write_tiff
from pipeline.inference.saved_predictions import average_predictions
from pipeline.training.checkpoints import write_checkpoint
from pipeline.vesuvius.networks.small import SmallUNet3D
from pipeline.vesuvius.phantom import scroll_phantom
from pipeline.vesuvius.topology import PostProcess

WIDTHS = [2, 4]


def write_fold(folder: Path, fold: int, seed: int) -> Path:
    """A checkpoint of a tiny network that was never trained."""
    torch.manual_seed(seed)
    network = SmallUNet3D(1, 1, WIDTHS)
    target = "pipeline.vesuvius.networks.SmallUNet3D"
    content = {
        "bundle": "vesuvius_surface",
        "architecture": "default",
        "network_def": {"_target_": target, "in_channels": 1, "out_channels": 1, "widths": WIDTHS},
        "epoch": 1,
        "metrics": {"val_surface": 0.5},
        "threshold": 0.5,
        "model": network.state_dict(),
    }
    return write_checkpoint(folder / f"fold_{fold}" / "checkpoints" / "best.pt", content)


def predict(
    source: Path, output: Path, checkpoint: Path, *ensemble: Path, window: int = 40
) -> dict[str, Any]:
    run_bundle(
        "vesuvius_surface", "inference", device="cpu", tune_allocator=False,
        dataset_dir=str(source), output_dir=str(output), ckpt_path=str(checkpoint),
        ensemble=[str(path) for path in ensemble], patch_size=[window] * 3, save_probability=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads((output / "scroll.json").read_text())
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    return write_tiff(folder / "scroll.tif", scroll_phantom(0, (32, 36, 40)).image).parent


@pytest.mark.parametrize("window", [40, 24])
def test_folds_averaged_live_and_on_disk_are_one_prediction(
    source: Path, tmp_path: Path, window: int
) -> None:
    """In one window exactly; in several, the live mean is blended and the other one of blends."""
    folds = [write_fold(tmp_path / "cv", fold, seed=fold) for fold in (0, 1)]
    fold_1 = tmp_path / "cv" / "fold_1"
    live = predict(source, tmp_path / "live", folds[0], fold_1, window=window)
    assert live["settings"]["ensemble"]["sources"] == [file_sha256(path) for path in folds]
    assert live["member_difference"] > 1e-4
    assert not any("members" in warning for warning in live["warnings"])
    for fold, path in enumerate(folds):
        predict(source, tmp_path / f"out_{fold}", path, window=window)
    outputs = [tmp_path / "out_0", tmp_path / "out_1"]
    (mean,) = average_predictions(outputs, tmp_path / "mean")

    expected = read_image(tmp_path / "live" / "scroll_probability.tif").astype(int)
    found = read_image(mean).astype(int)
    alone = [read_image(out / "scroll_probability.tif").astype(int) for out in outputs]
    apart = np.abs(alone[0] - alone[1]).mean()
    assert apart > 100  # steps of 1/65535
    off = np.abs(found - expected)
    assert off.max() <= 2 if window == 40 else off.mean() < apart / 10
    repaired = PostProcess(threshold=0.5)(read_image(mean)).mask
    differing = repaired != read_image(tmp_path / "live" / "scroll.tif")
    assert differing.mean() < (1e-3 if window == 40 else 0.05)


def test_a_fold_that_is_a_copy_of_another_is_told(source: Path, tmp_path: Path) -> None:
    folds = [write_fold(tmp_path / "cv", fold, seed=0) for fold in (0, 1)]
    found = predict(source, tmp_path / "out", folds[0], tmp_path / "cv" / "fold_1")
    assert found["member_difference"] == 0
    assert any("they are one model" in warning for warning in found["warnings"])
