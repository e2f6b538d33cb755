"""What `metadata.json` says, held against a strict schema and against the network."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import re
from typing import Any

import jsonschema
import pytest
import torch
from monai.bundle import ConfigParser, verify_net_in_out
from packaging.requirements import Requirement

from pipeline.bundles import read_config
from pipeline.data.images import read_image

TEXT = {"type": "string", "minLength": 1}
VERSION = {"type": "string", "pattern": r"^\d+(\.\d+)+$"}
FIGURES = {"type": "object", "additionalProperties": {"type": ["number", "string"]}}
DATA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "type": TEXT,
        "format": TEXT,
        "modality": TEXT,
        "num_channels": {"type": "integer", "minimum": 1},
        "spatial_shape": {
            "type": "array",
            "items": {"type": ["integer", "string"], "pattern": r"^(\*|[\dpn* ]+)$"},
        },
        "dtype": {"enum": ["float32", "float16", "uint8", "int64"]},
        "value_range": {"type": "array", "items": {"type": "number"}, "maxItems": 2},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {
            "type": "object",
            "propertyNames": {"pattern": r"^\d+$"},
            "additionalProperties": TEXT,
        },
    },
}
# As MONAI's schema 20240725, but closed: there a misspelt optional key passes.
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": [
        "schema",
        "version",
        "changelog",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "required_packages_version",
        "name",
        "task",
        "description",
        "authors",
        "copyright",
        "network_data_format",
    ],
    "properties": {
        "schema": {"const": "https://project-monai.github.io/schema/meta_schema_20240725.json"},
        "version": VERSION,
        "changelog": {
            "type": "object",
            "propertyNames": VERSION,
            "minProperties": 1,
            "additionalProperties": TEXT,
        },
        "monai_version": VERSION,
        "pytorch_version": VERSION,
        "numpy_version": VERSION,
        "required_packages_version": {
            "type": "object",
            "required": ["lamina"],
            "additionalProperties": VERSION,
        },
        **dict.fromkeys(["name", "task", "description", "authors", "copyright"], TEXT),
        **dict.fromkeys(["data_source", "data_type", "image_classes", "label_classes"], TEXT),
        **dict.fromkeys(["pred_classes", "intended_use"], TEXT),
        "eval_metrics": FIGURES,
        "references": {"type": "array", "items": TEXT},
        "supported_apps": {"type": "object"},
        "network_data_format": {
            "type": "object",
            "additionalProperties": False,
            "required": ["inputs", "outputs"],
            "properties": {
                "inputs": {
                    "type": "object",
                    "required": ["image"],
                    "additionalProperties": DATA,
                },
                "outputs": {"type": "object", "required": ["pred"], "additionalProperties": DATA},
                "post_processed_outputs": {"type": "object", "additionalProperties": DATA},
            },
        },
    },
}


@pytest.fixture
def metadata(bundle) -> dict[str, Any]:
    text = (bundle.root / "configs" / "metadata.json").read_text(encoding="utf-8")
    return json.loads(text)


def extent(pattern: int | str, p: int, n: int) -> int:
    """Return a length that fits an entry of `spatial_shape`; any length fits `*`."""
    if isinstance(pattern, int):
        return pattern
    numbers = re.sub("n", str(n), re.sub("p", str(p), pattern)).replace(" ", "")
    if numbers == "*":
        return 32 * n
    product = 1
    for factor in re.split(r"(?<!\*)\*(?!\*)", numbers):
        base, _, exponent = factor.partition("**")
        product *= int(base) ** int(exponent or 1)
    return product


def shapes(entry: dict[str, Any], sizes: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Return shapes `(1, C, ...)` of an entry, the axes of different lengths."""
    axes = entry["spatial_shape"]
    spread = [
        [extent(pattern, p, n + index) for index, pattern in enumerate(axes)] for p, n in sizes
    ]
    return [(1, entry["num_channels"], *lengths) for lengths in spread]


def test_metadata_has_every_field_and_no_other(metadata):
    jsonschema.Draft202012Validator(SCHEMA).validate(metadata)


def test_the_changelog_has_the_version(metadata):
    assert metadata["version"] in metadata["changelog"]


def test_the_versions_named_satisfy_the_package(metadata):
    """A bundle that asks for versions that `lamina` refuses cannot be installed."""
    needed = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, importlib.metadata.requires("lamina") or [])
        if requirement.marker is None
    }
    named = metadata["required_packages_version"] | {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
    }
    assert {name: v for name, v in named.items() if name in needed and v not in needed[name]} == {}
    assert sorted(named.keys() - needed.keys()) == ["lamina"]


def test_channels_and_ranges_are_whole(metadata):
    parts = metadata["network_data_format"]
    for entry in itertools.chain(*(group.values() for group in parts.values())):
        defined = entry.get("channel_def", {})
        assert [str(index) for index in range(entry["num_channels"])] == list(defined)
        assert len(entry["value_range"]) != 1
        assert sorted(entry["value_range"]) == entry["value_range"]


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2)], ids=["smallest", "wide", "second"])
def test_the_network_does_what_metadata_says(bundle, metadata, size):
    """Channels, spatial shape and type, of inputs that are not square."""
    image = metadata["network_data_format"]["inputs"]["image"]
    pred = metadata["network_data_format"]["outputs"]["pred"]
    (given,), (expected,) = shapes(image, [size]), shapes(pred, [size])
    low, high = image["value_range"] or (0.0, 1.0)
    config = read_config(bundle.root / "configs" / "inference.yaml")
    network = ConfigParser(config).get_parsed_content("network_def").eval()
    generator = torch.Generator().manual_seed(0)
    batch = low + (high - low) * torch.rand(given, generator=generator)
    with torch.inference_mode():
        output = network(batch.to(getattr(torch, image["dtype"])))
    assert tuple(output.shape) == expected
    assert output.dtype == getattr(torch, pred["dtype"])
    assert torch.isfinite(output).all()


def test_monais_own_check_of_the_network_passes(bundle):
    configs = bundle.root / "configs"
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.yaml"),
        device="cpu",
        n=2,
    )


def test_every_overlay_builds_a_network_that_takes_what_preprocessing_gives(combination, tmp_path):
    """On torch's meta device: shapes without memory or arithmetic."""
    if combination.workflow != "inference":
        return
    bundle = combination.bundle
    (name, *_) = bundle.case.make_inputs(tmp_path)
    parser = ConfigParser({**combination.config, **bundle.case.frame})
    preprocessing = parser.get_parsed_content("preprocessing")
    image = preprocessing({"image": read_image(tmp_path / name)})["image"]
    with torch.device("meta"):
        network = parser.get_parsed_content("network_def").eval()
        output = network(torch.empty((1, *image.shape)))
    metadata = read_config(bundle.root / "configs" / "metadata.json")
    pred = metadata["network_data_format"]["outputs"]["pred"]
    assert output.shape[:2] == (1, pred["num_channels"])
    if pred["spatial_shape"] == metadata["network_data_format"]["inputs"]["image"]["spatial_shape"]:
        assert output.shape[2:] == image.shape[1:]
