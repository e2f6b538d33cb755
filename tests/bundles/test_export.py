"""Networks of every bundle as files for other programs: they answer as torch does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.bundles import bundle_configs, read_config
from pipeline.data.checksums import file_sha256
from pipeline.exporting import TOLERANCES, export_bundle

# Tracing tells of every size that it takes for a constant; agreement is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".ts", "openvino": ".xml"}


@dataclass(frozen=True)
class Random:
    """A checkpoint of a bundle's default network with random weights, and a window for it."""

    path: Path
    network: Any
    size: tuple[int, ...]

    def windows(self, count: int = 1, seed: int = 5):
        import torch

        channels = getattr(self.network, "in_channels", 3)
        noise = torch.Generator().manual_seed(seed)
        return torch.rand((count, channels, *self.size), generator=noise)

    def answers(self, windows):
        import torch

        with torch.no_grad():
            return self.network(windows)


@pytest.fixture(scope="module")
def random(bundle, tmp_path_factory) -> Random:
    import torch
    from monai.bundle import ConfigParser

    from pipeline.running_config import RunningConfig
    from pipeline.training.checkpoints import write_checkpoint

    config = read_config(bundle_configs(bundle.root)["inference"])
    classes = ["first", "second", "third"][: 2 if "scales" in config else 3]
    config["checkpoint"] = {"threshold": 0.5, "class_names": classes}
    parser = ConfigParser(config)
    parser.parse()
    running = RunningConfig(parser)
    torch.manual_seed(0)
    network = parser.get_parsed_content("network_def").eval()
    content = {
        "bundle": bundle.name,
        "architecture": "default",
        "epoch": 1,
        "iteration": 1,
        "model": network.state_dict(),
        "network_def": running.plain("network_def"),
        "preprocessing": running.plain("deterministic_transforms"),
        "threshold": 0.5,
    }
    if "class_names" in config:
        content["class_names"] = classes
    path = tmp_path_factory.mktemp(bundle.name) / "random.pt"
    metadata = read_config(bundle.root / "configs" / "metadata.json")
    axes = len(metadata["network_data_format"]["inputs"]["image"]["spatial_shape"])
    return Random(write_checkpoint(path, content), network, (32,) * 3 if axes == 3 else (64, 48))


def opened(kind: str, path: Path):
    """Return what a file computes and the text it keeps, as a program without Lamina reads it."""
    import torch

    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        about = session.get_modelmeta().custom_metadata_map["lamina.json"]
        name = session.get_inputs()[0].name
        return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), about
    if kind == "openvino":
        from concurrent.futures import ThreadPoolExecutor

        import openvino

        def read():  # in a thread of its own: see `pipeline.inference.runtimes`
            model = openvino.Core().read_model(path)
            settings = {"INFERENCE_PRECISION_HINT": "f32"}
            compiled = openvino.Core().compile_model(model, "CPU", settings)
            return compiled, model.get_rt_info(["lamina.json"]).astype(str)

        with ThreadPoolExecutor(1) as thread:
            compiled, about = thread.submit(read).result()
        return lambda x: torch.from_numpy(compiled([x.numpy()])[0].copy()), about
    kept = {"lamina.json": ""}
    if kind == "pt2":
        module = torch.export.load(path, extra_files=kept).module()
    else:
        module = torch.jit.load(path, _extra_files=kept)
    about = kept["lamina.json"]
    return module, about if isinstance(about, str) else about.decode()


@pytest.mark.parametrize("kind", list(SUFFIXES))
def test_an_exported_network_answers_as_torch_does_and_says_what_it_is(
    bundle, random, tmp_path, kind
):
    import torch

    path = tmp_path / f"network{SUFFIXES[kind]}"
    export = export_bundle(bundle.root, path, size=random.size, ckpt_path=random.path)
    assert export.agreement["relative"] <= TOLERANCES[kind] <= 1e-4
    run, text = opened(kind, path)
    for windows in (random.windows(), random.windows(count=2, seed=6)):
        expected = random.answers(windows)
        with torch.no_grad():
            found = run(windows)
        assert found.shape == expected.shape
        assert float((found - expected).norm() / expected.norm()) <= TOLERANCES[kind]
    about = json.loads(text)
    beside = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
    assert about.items() <= beside.items()
    assert about["bundle"] == bundle.name
    assert about["network_def"]["_target_"].startswith("pipeline.")
    assert about["preprocessing"]
    assert about["checkpoint_sha256"] == file_sha256(random.path)
    assert beside["sha256"][path.name] == file_sha256(path)
    assert {one.name for one in tmp_path.iterdir()} == {one.name for one in export.paths}


def test_the_model_zoos_check_takes_the_shipped_network(bundle, random, tmp_path):
    """As `verify_torchscript` of the zoo's checks: scripted, from a state dict and nothing else."""
    import torch
    from monai.bundle import ConfigParser, ckpt_export
    from monai.data import load_net_with_metadata

    shipped = bundle.root / "models" / "model.pt"
    if not shipped.is_file():
        pytest.skip(f"{bundle.name} ships no weights yet: models/model.pt is missing")
    weights = torch.load(shipped, weights_only=True)["model"]
    torch.save(weights, tmp_path / "model.pt")
    metadata, config = (bundle.root / "configs" / f for f in ("metadata.json", "inference.yaml"))
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "verify_model.ts"),
        ckpt_file=str(tmp_path / "model.pt"),
        meta_file=str(metadata),
        config_file=str(config),
        bundle_root=str(bundle.root),
    )
    scripted, about, files = load_net_with_metadata(
        str(tmp_path / "verify_model.ts"), more_extra_files=["inference.json"]
    )
    assert about == read_config(metadata)
    assert json.loads(files["inference.json"]) == ConfigParser.load_config_file(config)

    parser = ConfigParser(read_config(config))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(weights)
    assert scripted.state_dict().keys() == weights.keys()
    windows = random.windows(count=2)
    with torch.no_grad():
        for seen in (windows, windows[..., 3:, :-5]):  # any size: the script pads and crops
            torch.testing.assert_close(scripted(seen), network(seen))


def test_monais_own_export_takes_the_network(bundle, random, tmp_path):
    """As `python -m monai.bundle ckpt_export --use_trace True`."""
    import torch
    from monai.bundle import ckpt_export

    windows = random.windows()
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(random.path),
        meta_file=str(bundle.root / "configs" / "metadata.json"),
        config_file=str(bundle.root / "configs" / "inference.yaml"),
        key_in_ckpt="model",
        use_trace=True,
        input_shape=list(windows.shape),
        ckpt_path=str(random.path),
    )
    with torch.no_grad():
        torch.testing.assert_close(
            torch.jit.load(tmp_path / "model.ts")(windows), random.answers(windows)
        )
