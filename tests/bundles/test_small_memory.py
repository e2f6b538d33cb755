"""A small memory divides a batch; it changes neither the batch nor what is learnt from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from monai.bundle import ConfigParser

from pipeline.bundles import run_bundle
from pipeline.classification.phantom import write_phantom_dataset
from pipeline.training.checkpoints import read_checkpoint

EFFECTIVE = 8
IMAGES = 22  # the last update of an epoch is a smaller one
SMALL: dict[str, dict[str, Any]] = {  # the classifiers: group norm, and a loss per sample
    "insect_pests": {"manifest": "image_folders", "image_size_px": 32},
    "multiscale_classifier": {"scales": [48, 32], "evaluation_scale": 48, "unseen_scales": []},
}


def planned(bundle, dataset: Path, folder: Path, **settings: Any):
    """Return the plan of a training run that is not begun."""
    settings |= {"batch_size": "auto", "effective_batch_size": EFFECTIVE, "precision": "float32"}
    run = bundle.workflow("train", dataset_dir=dataset, output_dir=folder, **settings)
    run.parser.parse()
    return run.parser.get_parsed_content("plan")


def test_a_small_memory_divides_the_batch_and_keeps_its_size_and_rate(bundle, dataset, tmp_path):
    whole = planned(bundle, dataset, tmp_path)
    limit = whole.estimated_bytes - 1  # one byte less than it takes
    small = planned(bundle, dataset, tmp_path, memory_limit_bytes=limit)
    assert (whole.batch_size, whole.accumulation_steps) == (EFFECTIVE, 1)
    assert small.batch_size < EFFECTIVE
    assert small.batch_size * small.accumulation_steps == EFFECTIVE
    assert small.estimated_bytes <= limit
    assert small.effective_batch_size == whole.effective_batch_size == EFFECTIVE
    assert small.learning_rate == whole.learning_rate
    assert not small.memory_efficient  # blocks are computed again where no sample fits otherwise


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("insects") / "data"
    counts = {"train": IMAGES, "val": 4}
    return write_phantom_dataset(
        folder, counts, classes=2, imbalance=1, size_px=48, layout="folders"
    )


def trained(name: str, photographs: Path, folder: Path, **settings: Any):
    """Train for two epochs; return the plan, and the losses of every epoch."""
    run_bundle(
        name, "train", dataset_dir=photographs, output_dir=folder, device="cpu", threads=1,
        tune_allocator=False, tensorboard=False, max_epochs=2, effective_batch_size=EFFECTIVE,
        **SMALL[Path(name).name], **settings,
    )  # fmt: skip
    history = yaml.safe_load((folder / "metrics_history.yaml").read_text(encoding="utf-8"))
    losses = [loss for row in history for loss in (row["train"]["loss"], row["val"]["val_loss"])]
    return read_checkpoint(folder / "checkpoints" / "last.pt")["plan"], losses


@pytest.mark.parametrize("name", SMALL)
def test_a_small_memory_leaves_the_loss_curve_as_it_is(name, photographs, tmp_path, repository):
    root = str(repository / "bundles" / name)
    whole, expected = trained(root, photographs, tmp_path / "whole")
    limit = whole["estimated_bytes"] - 1  # one byte less than it takes
    small, losses = trained(root, photographs, tmp_path / "small", memory_limit_bytes=limit)
    assert (whole["batch_size"], whole["accumulation_steps"]) == (EFFECTIVE, 1)
    assert small["batch_size"] * small["accumulation_steps"] == EFFECTIVE > small["batch_size"]
    assert small["effective_batch_size"] == whole["effective_batch_size"]
    assert losses == pytest.approx(expected, rel=1e-4)  # float32 sums in another order


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({}, 128),
        ({"scale_by_scale": False}, 232),  # 128^2 + 96^2 + 64^2 pixels, 128 high
        ({"scale_by_scale": False, "mode": "progressive"}, 128),
    ],
)
def test_scales_in_one_graph_are_planned_with_the_pixels_of_all(repository, settings, width):
    files = repository / "bundles" / "multiscale_classifier" / "configs" / "train.yaml"
    parser = ConfigParser({**ConfigParser.load_config_file(files), **settings})
    assert parser.get_parsed_content("planned_width") == width
