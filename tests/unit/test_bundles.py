from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.bundles import (
    build_part,
    bundle_configs,
    bundle_names,
    bundle_status,
    find_bundle_root,
    load_bundle,
    prepare_run,
    run_bundle,
)
from pipeline.errors import CheckpointError, ConfigurationError, InputError

TRAIN = """
imports:
- $from pipeline.bundles import find_bundle_root
- $from pipeline.running_config import running_config
bundle_root: $find_bundle_root('tiny')
output_dir: $@bundle_root + '/runs'
ckpt_path: $@output_dir + '/best.pt'
dataset_dir: null
width: 2
scale: 1.0
architecture: default
network_def: {_target_: torch.nn.Conv2d, in_channels: 3, out_channels: 1, kernel_size: '@width'}
deterministic_transforms:
- {_target_: ScaleIntensityd, keys: image, minv: 0.0, maxv: '@scale'}
train:
  preprocessing: {_target_: Compose, transforms: '@deterministic_transforms'}
definition:
  _target_: dict
  architecture: '@architecture'
  network_def: $running_config().plain('network_def')
  preprocessing: $running_config().plain('deterministic_transforms')
initialize: [$dict(started=True)]
run: ['$dict(@definition, width=@width)']
training: '@run'
finalize: [$dict(ended=True)]
"""
EVALUATE = """
threshold: 0.5
run: ['$dict(network=@network_def, threshold=@threshold, architecture=@architecture)']
"""
INFERENCE = """
imports:
- $from pipeline.bundles import find_bundle_root
- $from pipeline.inference.ensembles import load_ensemble
- $from pipeline.training.checkpoints import load_weights
- $from pipeline.training.checkpoints import read_checkpoint
bundle_root: $find_bundle_root('tiny')
output_dir: runs/tiny
ckpt_path: $@bundle_root + '/models/model.pt'
device: auto
architecture: default
threshold: 0.5
width: 1
scale: 1.0
network_def: {_target_: torch.nn.Conv2d, in_channels: 3, out_channels: 1, kernel_size: '@width'}
network: $@network_def.to(@device)
predictor: $load_ensemble(@network, [@ckpt_path], read=read_checkpoint, load=load_weights)
deterministic_transforms:
- {_target_: ScaleIntensityd, keys: image, minv: 0.0, maxv: '@scale'}
preprocessing:
  _target_: Compose
  transforms: '$[@to_tensor] + @deterministic_transforms'
to_tensor: {_target_: EnsureChannelFirstd, keys: image, channel_dim: -1}
inferer: {_target_: SimpleInferer}
postprocessing:
  _target_: Compose
  transforms: [{_target_: Activationsd, keys: pred, sigmoid: true}]
run: ['$dict(network=@network_def, threshold=@threshold)']
"""
WIDE = "width: 3\narchitecture: wide\n"
FAILING = """
run: [$dict(x=@broken)]
broken: {_target_: pipeline.data.images.read_image, path: nowhere.png}
"""


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    root = tmp_path / "work" / "bundles" / "tiny"
    (root / "configs").mkdir(parents=True)
    texts = {"train": TRAIN, "evaluate": EVALUATE, "inference": INFERENCE}
    texts |= {"wide": WIDE, "failing": FAILING}
    for name, text in texts.items():
        (root / "configs" / f"{name}.yaml").write_text(text)
    (root / "configs" / "metadata.json").write_text(json.dumps({"version": "0.3.0"}))
    monkeypatch.chdir(tmp_path / "work")
    return root


def checkpoint(path: Path, width: int = 3, threshold: float = 0.25, scale: float = 1.0) -> Path:
    import torch

    from pipeline.training.checkpoints import write_checkpoint

    network = torch.nn.Conv2d(3, 1, width)
    definition = {
        "_target_": "torch.nn.Conv2d",
        "in_channels": 3,
        "out_channels": 1,
        "kernel_size": width,
    }
    transforms = [{"_target_": "ScaleIntensityd", "keys": "image", "minv": 0.0, "maxv": scale}]
    content = {
        "bundle": "tiny",
        "epoch": 1,
        "iteration": 1,
        "model": network.state_dict(),
        "network_def": definition,
        "architecture": "wide",
        "preprocessing": transforms,
        "threshold": threshold,
        "metrics": {},
    }
    return write_checkpoint(path, content)


def test_a_bundle_is_found_from_everywhere_below(bundle, monkeypatch):
    for folder in (bundle.parents[1], bundle, bundle / "configs", bundle.parent):
        monkeypatch.chdir(folder)
        assert Path(find_bundle_root("tiny")) == bundle
        assert "tiny" in bundle_names()


def test_an_unknown_bundle_is_refused_with_the_closest_name(bundle):
    with pytest.raises(ConfigurationError, match="did you mean tiny"):
        find_bundle_root("tinny")


def test_the_bundles_of_the_package_are_found_from_a_foreign_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in bundle_names():
        assert (Path(find_bundle_root(name)) / "configs" / "train.yaml").is_file()


def test_configs_and_overlays_are_told_apart(bundle):
    configs = bundle_configs("tiny")
    assert configs["train"] == bundle / "configs" / "train.yaml"
    assert sorted(configs["overlays"]) == ["failing", "wide"]
    assert bundle_configs(bundle) == configs


def test_the_order_of_the_files_is_that_of_the_workflow(bundle):
    def names(workflow):
        return [path.stem for path in prepare_run("tiny", workflow, ["wide"])[0]]

    assert names("train") == ["train", "wide"]
    assert names("evaluate") == ["train", "wide", "evaluate"]
    assert names("inference") == ["inference", "wide"]


def test_an_unknown_overlay_or_id_is_refused_before_anything_runs(bundle):
    with pytest.raises(ConfigurationError, match="did you mean wide"):
        run_bundle("tiny", "train", ["wode"])
    with pytest.raises(ConfigurationError, match="did you mean width"):
        run_bundle("tiny", "train", widht=4)


def test_status_tells_version_and_weights(bundle):
    (status,) = [entry for entry in bundle_status() if entry["name"] == "tiny"]
    assert status["version"] == "0.3.0"
    assert status["weights"] is None
    (bundle / "models").mkdir()
    (bundle / "models" / "model.pt").write_bytes(b"1234")
    (status,) = [entry for entry in bundle_status() if entry["name"] == "tiny"]
    assert status["weights_bytes"] == 4


def test_a_run_gives_what_its_expressions_gave(bundle):
    result = run_bundle("tiny", "train", ["wide"], **{"output_dir": "out"})
    (values,) = result["results"]
    assert values["network_def"]["kernel_size"] == 3
    assert values["preprocessing"][0]["maxv"] == 1.0
    assert values["architecture"] == "wide"
    assert result["output_dir"] == "out"
    assert Path(result["bundle_root"]) == bundle


def test_a_bundle_given_by_its_folder_is_not_its_namesake(bundle, tmp_path, monkeypatch):
    import shutil

    other = tmp_path / "other" / "tiny"
    shutil.copytree(bundle, other)
    monkeypatch.chdir(bundle)
    assert Path(run_bundle(other, "train")["bundle_root"]) == other
    with pytest.raises(ConfigurationError, match=r"metadata\.json"):
        run_bundle(tmp_path / "other", "train")


def test_our_error_is_raised_out_of_monais_wrapping(bundle):
    with pytest.raises(InputError, match=r"nowhere\.png"):
        run_bundle("tiny", "train", ["failing"])


def test_a_checkpoint_runs_by_its_path_alone(bundle, tmp_path):
    path = checkpoint(tmp_path / "wide.pt")
    for workflow in ("evaluate", "inference"):
        (values,) = run_bundle("tiny", workflow, ckpt_path=path)["results"]
        assert values["threshold"] == 0.25
        assert values["network"].kernel_size == (3, 3)


def test_an_explicit_threshold_stands_over_the_checkpoint(bundle, tmp_path):
    path = checkpoint(tmp_path / "wide.pt")
    (values,) = run_bundle("tiny", "inference", ckpt_path=path, threshold=0.75)["results"]
    assert values["threshold"] == 0.75


def test_an_override_of_what_the_checkpoint_fixes_is_refused(bundle, tmp_path):
    path = checkpoint(tmp_path / "wide.pt")
    run_bundle("tiny", "inference", ckpt_path=path, width=3, scale=1.0)
    with pytest.raises(ConfigurationError, match=r"--width: .*wide\.pt"):
        run_bundle("tiny", "inference", ckpt_path=path, width=2)
    with pytest.raises(ConfigurationError, match="--scale"):
        run_bundle("tiny", "evaluate", ckpt_path=path, scale=2.0)


def test_a_missing_checkpoint_is_named(bundle):
    with pytest.raises(CheckpointError, match=r"models/model\.pt"):
        run_bundle("tiny", "inference")


def test_a_loaded_bundle_maps_an_image_to_probability_and_mask(bundle, tmp_path):
    import numpy as np

    loaded = load_bundle("tiny", checkpoint(tmp_path / "one.pt", width=1), "cpu")
    image = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    result = loaded(image)
    assert result["pred"].shape == result["mask"].shape == (5, 7)
    assert 0 <= result["pred"].min() <= result["pred"].max() <= 1
    np.testing.assert_array_equal(result["mask"], result["pred"] >= 0.25)


def test_what_a_transform_refuses_is_our_error(bundle, tmp_path):
    import numpy as np

    def refuse(case):
        raise InputError("two channels")

    from monai.transforms import Compose

    loaded = load_bundle("tiny", checkpoint(tmp_path / "one.pt", width=1), "cpu")
    loaded.preprocessing = Compose([refuse])
    with pytest.raises(InputError, match="two channels"):
        loaded(np.zeros((5, 7, 2), np.uint8))


def test_one_part_of_a_bundle_is_built_without_the_rest(bundle):
    import numpy as np

    part = build_part("tiny", "train", "train::preprocessing", scale=3.0)
    assert float(part({"image": np.float32([[[0, 1]]])})["image"].max()) == 3.0
    with pytest.raises(ConfigurationError, match="validate"):
        build_part("tiny", "train", "validate::preprocessing")
