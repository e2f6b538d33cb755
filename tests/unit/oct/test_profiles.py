"""The original project's profiles: every key of them reaches the object that it is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigWorkflow

from pipeline.bundles import find_bundle_root, prepare_run, read_config
from pipeline.oct.phantom import write_phantom_dataset

PROFILES = ("gpu_4gb", "gpu_80gb")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oct") / "data"
    return write_phantom_dataset(folder, {"train": 2, "val": 1}, bscans=1, size_px=(96, 128))


@pytest.fixture(params=PROFILES)
def profile(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def written(profile: str) -> dict[str, Any]:
    """The profile's own keys."""
    path = Path(find_bundle_root("oct_layers")) / "configs" / f"{profile}.yaml"
    return read_config(path)


@pytest.fixture
def run(profile: str, dataset: Path, tmp_path: Path) -> ConfigWorkflow:
    root = find_bundle_root("oct_layers")
    files, settings = prepare_run(root, "train", ("hybrid_attention", profile))
    small = {"frame": [96, 128], "roi_size": [96, 128], "base_channels": 2, "device": "cpu"}
    paths = {"dataset_dir": str(dataset), "output_dir": str(tmp_path)}
    return ConfigWorkflow(
        config_file=[str(path) for path in files],
        workflow_type="train",
        **{**settings, **small, **paths, "tune_allocator": False},
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create 16")  # the profile's own number
def test_every_key_of_a_profile_has_its_effect(
    run: ConfigWorkflow, written: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = run.parser.get_parsed_content
    plan, loader, step = parsed("plan"), parsed("train::dataloader"), parsed("train::step")
    image = parsed("train::dataset")[0]["image"]
    found = {
        "name": parsed("name"),
        "max_epochs": parsed("train::trainer").state.max_epochs,
        "patches_per_bscan": len(parsed("train::dataset")) // len(parsed("cases").train),
        "patch_columns": image.shape[-1],
        "batch_size": loader.batch_sampler.batch_size,
        "accumulation_steps": step.accumulation_steps,
        "learning_rate": parsed("optimizer").defaults["lr"],
        "reference_batch_size": plan.effective_batch_size,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "precision": step.precision,
        "memory_efficient": plan.memory_efficient,
        "compile": plan.compile,
    }
    expected = {**written, "patch_columns": 128}
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_blocks_are_computed_again_where_the_profile_says_so(
    run: ConfigWorkflow, written: dict[str, Any]
) -> None:
    calls = [text for text in run.parser["initialize"] if "checkpoint_blocks" in text]
    assert calls == ["$checkpoint_blocks(@network) if @plan.memory_efficient else None"]
    assert run.parser.get_parsed_content("plan").memory_efficient is bool(
        written.get("memory_efficient", False)
    )
