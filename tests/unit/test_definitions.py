"""Only networks and transforms with plain arguments are built from a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.definitions import build_network, check_definitions
from pipeline.errors import CheckpointError


@pytest.mark.parametrize(
    "definitions",
    [
        {"_target_": "pipeline.fundus.networks.UNet", "depths": [8, 16], "norm": None},
        [
            {"_target_": "CropForegroundd", "keys": ["image"]},
            {"_target_": "monai.transforms.Flipd"},
        ],
        0.5,
        "default",
    ],
)
def test_networks_and_transforms_with_plain_arguments_pass(definitions: Any) -> None:
    check_definitions(definitions, "best.pt")


@pytest.mark.parametrize(
    "definitions",
    [
        {"_target_": "os.system", "command": "true"},
        {"_target_": "subprocess.run"},
        {"_target_": "monai.bundle.run"},
        {"_target_": "pipeline.cli.main"},
        {"_target_": "pipeline.fundus.networks.$x"},
        {"_target_": "UNet", "in_channels": "$__import__('os').getpid()"},
        {"_target_": "UNet", "in_channels": "@device"},
        [{"_target_": "Compose", "transforms": [{"_target_": "builtins.eval"}]}],
        {"_target_": "UNet", "_mode_": "debug"},
        {"_target_": ["UNet"]},
        "%other.yaml::run",
    ],
)
def test_anything_else_is_refused_naming_the_file(definitions: Any) -> None:
    with pytest.raises(CheckpointError, match=r"best\.pt: .*only networks and transforms"):
        check_definitions(definitions, "best.pt")


def test_a_network_is_built_from_what_a_checkpoint_defines():
    definition = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}
    network = build_network({"network_def": definition}, "a.pt")
    assert network.weight.shape == (3, 2)


@pytest.mark.parametrize("definition", [None, {"_target_": "os.system", "command": "true"}])
def test_no_network_is_built_from_anything_else(definition):
    with pytest.raises(CheckpointError, match=r"^a\.pt: "):
        build_network({"network_def": definition}, "a.pt")
