"""A bundle's network with a checkpoint's weights, as a file for other programs.

Exported is the network alone, from windows to logits: what stands before and behind it is told in
the file's metadata, and stays with the bundle.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.arguments import EXPORT_SUFFIXES
from pipeline.bundles import open_config
from pipeline.errors import ConfigurationError, first_line
from pipeline.resolving import build

if TYPE_CHECKING:
    from monai.bundle import ConfigParser
    from torch import Tensor, nn

    from pipeline.network_files import NetworkFile

__all__ = ["TOLERANCES", "Export", "export_bundle", "export_text"]

# Largest relative difference to the network in torch. The last two run torch's own kernels.
TOLERANCES = {"onnx": 1e-4, "openvino": 1e-4, "pt2": 1e-5, "torchscript": 1e-5}
_MULTIPLES = 8  # what `n` in a bundle's metadata stands for where no window is configured


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        paths: the files: the one to open first, and the JSON with the metadata last.
        about: the metadata: `bundle`, `network_def`, `preprocessing`, `checkpoint_sha256`, ...
        agreement: with the network in torch: `relative`, `max_abs`, `tolerance`.
        other_sizes: per further shape of windows whether the file `agrees`, and what it gave.
    """

    paths: tuple[Path, ...]
    about: dict[str, Any]
    agreement: dict[str, float]
    other_sizes: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def export_bundle(
    bundle: str | PathLike[str],
    path: Path | str,
    kind: str | None = None,
    size: Sequence[int] | None = None,
    **overrides: Any,
) -> Export:
    """Write a bundle's network as `path`, and what it is as JSON beside it.

    The bytes are opened and held against the network in torch before anything is written.

    Args:
        bundle: name or folder.
        path: the file; OpenVINO's weights go beside it as `.bin`.
        kind: `onnx`, `pt2`, `torchscript` or `openvino`; None: what the suffix of `path` means.
        size: of the example window; None: the window that inference uses.
        overrides: `ckpt_path` alone; without it the weights that the bundle ships.

    Raises:
        ConfigurationError: no such bundle, id or format, a package is missing, or the exported
            network disagrees with torch.
        CheckpointError: the checkpoint is damaged or of another bundle.
        ResourceError: the file cannot be written.
    """
    from pipeline.network_files import network_file

    kind, path = _kind(kind, Path(path)), Path(path)
    parser, checkpoint = open_config(bundle, "inference", (), {**overrides, "device": "cpu"})
    if other := [id for id in overrides if id != "ckpt_path"]:
        raise ConfigurationError(
            f"--{other[0]}: export writes the network as it was trained; give --ckpt_path alone"
        )
    if checkpoint is None:
        raise ConfigurationError(f"{bundle}: its inference.yaml names no ckpt_path to export")
    source = str(parser.get_parsed_content("ckpt_path"))
    network = _network(parser, checkpoint, source)
    window = _window(parser, network, size)
    about = {
        **_about(parser, checkpoint, source, window),
        "format": kind,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    made = network_file(kind, network, window, _text(about))
    agreement = _checked(made, network, window, f"{path}: not written, {kind}", TOLERANCES[kind])
    others = tuple(_asked(made, network, other, TOLERANCES[kind]) for other in _others(window))
    return Export(_written(path, made, about, agreement, others), about, agreement, others)


def export_text(export: Export) -> str:
    """Return what `export_bundle` did, in lines for a person."""
    first, *beside = export.paths
    agreement, about = export.agreement, export.about
    lines = [
        f"{first}: {about['format']}, {about['bundle']} ({about['architecture']}), "
        f"{about['parameters']:,} parameters, {first.stat().st_size / 1e6:.1f} MB; "
        f"beside it {', '.join(path.name for path in beside)}",
        f"agrees with torch on windows {_by(about['input']['shape'])}: relative difference "
        f"{agreement['relative']:.1e}, largest {agreement['max_abs']:.1e} "
        f"(at most {agreement['tolerance']:.0e} relative)",
    ]
    for other in export.other_sizes:
        verdict = "agrees" if other["agrees"] else f"not for these: {other['found'][:80]}"
        lines.append(f"windows {_by(other['shape'])}: {verdict}")
    return "\n".join(lines)


def _kind(kind: str | None, path: Path) -> str:
    known = ", ".join(EXPORT_SUFFIXES)
    if kind is None:
        by_suffix = {suffix: name for name, suffix in EXPORT_SUFFIXES.items()}
        if path.suffix not in by_suffix:
            raise ConfigurationError(
                f"{path}: its suffix names no format, expected one of "
                f"{', '.join(by_suffix)}; or give --format, one of {known}"
            )
        return by_suffix[path.suffix]
    if kind not in EXPORT_SUFFIXES:
        close = difflib.get_close_matches(kind, EXPORT_SUFFIXES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {known}"
        raise ConfigurationError(f"--format: no format {kind!r}; {hint}")
    if kind == "openvino" and path.suffix != EXPORT_SUFFIXES[kind]:
        raise ConfigurationError(
            f"{path}: OpenVINO finds the weights by the name, which must end in "
            f"{EXPORT_SUFFIXES[kind]}; give another -o"
        )
    return kind


def _network(parser: ConfigParser, checkpoint: Mapping[str, Any], source: str) -> nn.Module:
    """Return the network of a checkpoint of this bundle, with its weights."""
    from pipeline.definitions import build_network
    from pipeline.training.checkpoints import check_definition, load_weights

    name = _bundle_name(parser)
    check_definition(checkpoint, source=source, settings={"bundle": name})
    network: nn.Module = build_network(checkpoint, source)
    load_weights(network, checkpoint, source)
    return network.eval()


def _bundle_name(parser: ConfigParser) -> str:
    if "definition::bundle" in parser:
        return str(parser["definition::bundle"])
    return Path(build(parser, ["bundle_root"])["bundle_root"]).name


def _window(parser: ConfigParser, network: nn.Module, size: Sequence[int] | None) -> Tensor:
    """Return noise like one window of inference, `(1, C, *spatial)`."""
    import torch
    from monai.bundle import ConfigParser

    root = Path(build(parser, ["bundle_root"])["bundle_root"])
    metadata = ConfigParser.load_config_file(root / "configs" / "metadata.json")
    described = metadata["network_data_format"]["inputs"]["image"]
    channels = getattr(network, "in_channels", described["num_channels"])
    axes = described["spatial_shape"]
    if size is None and "inferer::roi_size" in parser:
        size = build(parser, ["inferer::roi_size"])["inferer::roi_size"]
    if size is None:
        size = [_pixels(axis) for axis in axes]
    if len(size) != len(axes) or min(size) < 1:
        raise ConfigurationError(
            f"--size: {_by(size)} has {len(size)} sides, the network's windows have {len(axes)}: "
            f"give such as {_by([96] * len(axes))}"
        )
    generator = torch.Generator().manual_seed(0)
    return torch.rand((1, int(channels), *map(int, size)), generator=generator)


def _pixels(axis: object) -> int:
    """Return a size that a side such as `16*n`, `*` or `128` of the metadata allows."""
    text = str(axis)
    if text.isdigit():
        return int(text)
    factor = text.partition("*")[0]
    return _MULTIPLES * (int(factor) if factor.isdigit() else 16)


def _about(
    parser: ConfigParser, checkpoint: Mapping[str, Any], source: str, window: Tensor
) -> dict[str, Any]:
    from pipeline.data.checksums import file_sha256
    from pipeline.hardware.environment import package_versions

    known = ("architecture", "network_def", "preprocessing", "threshold", "class_names", "epoch")
    return {
        "bundle": _bundle_name(parser),
        **{key: checkpoint[key] for key in known if key in checkpoint},
        "checkpoint": Path(source).name,
        "checkpoint_sha256": file_sha256(source),
        "input": {"shape": list(window.shape), "dtype": "float32"},
        "output": "logits",
        "versions": package_versions(("lamina", "torch", "monai")),
    }


def _checked(
    made: NetworkFile, network: nn.Module, window: Tensor, what: str, tolerance: float
) -> dict[str, float]:
    """Return the agreement on `window`, or raise a ConfigurationError that begins with `what`."""
    asked = _asked(made, network, window, tolerance)
    if not asked["agrees"]:
        raise ConfigurationError(
            f"{what} disagrees with the network in torch on windows {_by(window.shape)} "
            f"({asked['found']}), expected at most {tolerance:.0e}; choose another --format"
        )
    return {**asked["agreement"], "tolerance": tolerance}


def _asked(
    made: NetworkFile, network: nn.Module, windows: Tensor, tolerance: float
) -> dict[str, Any]:
    """Return whether the file gives for `windows` what the network gives, and what it gave."""
    from pipeline.hardware.out_of_memory import is_out_of_memory
    from pipeline.inference.exported import Agreement, flat_outputs

    expected = flat_outputs(network, windows)
    try:
        agreement = Agreement.between(made.run(windows), expected)
    except (RuntimeError, AssertionError, ValueError) as error:  # the size does not suit the file
        if is_out_of_memory(error):
            raise
        return {"shape": list(windows.shape), "agrees": False, "found": first_line(error)[:200]}
    return {
        "shape": list(windows.shape),
        "agrees": agreement.relative <= tolerance,
        "found": str(agreement),
        "agreement": asdict(agreement),
    }


def _others(window: Tensor) -> list[Tensor]:
    """Return a batch of two, a window that is twice as wide, and one a pixel narrower."""
    import torch

    generator = torch.Generator().manual_seed(1)
    count, channels, *sides, width = window.shape
    shapes = [(2, *window.shape[1:])]
    shapes += [(count, channels, *sides, other) for other in (2 * width, width - 1)]
    return [torch.rand(shape, generator=generator) for shape in shapes]


def _written(
    path: Path,
    made: NetworkFile,
    about: Mapping[str, Any],
    agreement: Mapping[str, float],
    others: Sequence[Mapping[str, Any]],
) -> tuple[Path, ...]:
    """Write the files, the one to open last: it never stands without what belongs to it."""
    from pipeline.data.atomic import write_bytes, write_json

    data, *beside = made.files.values()
    paths = [path, *(path.with_suffix(suffix) for suffix in list(made.files)[1:])]
    sidecar = path.with_name(f"{path.name}.json")
    digests = {
        one.name: hashlib.sha256(content).hexdigest()
        for one, content in zip(paths, made.files.values(), strict=True)
    }
    facts = {**about, "sha256": digests, "agreement": agreement, "other_sizes": list(others)}
    for one, content in zip(paths[1:], beside, strict=True):
        write_bytes(one, content)
    write_json(sidecar, facts)
    write_bytes(path, data)
    return (*paths, sidecar)


def _text(about: Mapping[str, Any]) -> str:
    from pipeline.data.atomic import to_plain

    return json.dumps(to_plain(about, finite=True))


def _by(sizes: Sequence[int]) -> str:
    return "x".join(str(int(size)) for size in sizes)
