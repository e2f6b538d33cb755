"""The weights that a bundle ships."""

from __future__ import annotations

import pytest

from pipeline.bundles import load_bundle, read_config
from pipeline.training.checkpoints import read_checkpoint


@pytest.fixture
def weights(bundle):
    path = bundle.root / "models" / "model.pt"
    if not path.is_file():
        pytest.skip(f"{bundle.name} ships no weights yet: models/model.pt is missing")
    return path


def test_the_weights_are_small_and_say_how_they_are_used(bundle, weights):
    content = read_checkpoint(weights)
    assert weights.stat().st_size < 5e6
    assert content["bundle"] == bundle.name
    assert content["architecture"] == "default"
    assert content["metrics"][bundle.case.chosen] > 0
    assert "training_state" not in content


def test_the_weights_fit_the_configuration_that_is_shipped_with_them(bundle, weights, inputs):
    """A plain run checks them against its configuration and starts."""
    workflow = bundle.workflow(
        "inference", dataset_dir=inputs[0], output_dir="results", frame=False
    )
    workflow.initialize()
    assert workflow.parser.get_parsed_content("ckpt_path") == str(weights)


def test_the_weights_find_what_a_phantom_shows(bundle, weights):
    assert bundle.case.score(load_bundle(bundle.root)) > bundle.case.least_score


def test_the_figures_are_told_in_metadata(bundle, weights):
    metadata = read_config(bundle.root / "configs" / "metadata.json")
    assert metadata["eval_metrics"]
    assert metadata["data_source"]
