"""Bundles: where they are, running one in this process, and loading one to call it on an array.

The only module that knows how a bundle's folder is laid out. MONAI and torch are imported inside
functions: finding a bundle and checking a setting's name need neither.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from pipeline.configs import check_overrides, read_config
from pipeline.data.shipped import shipped_folder
from pipeline.errors import ConfigurationError
from pipeline.resolving import build, unwrapped, with_checkpoint
from pipeline.running_config import RunningConfig, running_config

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

    from pipeline.inference.loaded import LoadedBundle

__all__ = [
    "BundleConfigs",
    "RunningConfig",
    "Workflow",
    "build_part",
    "bundle_configs",
    "bundle_names",
    "bundle_status",
    "check_overrides",
    "find_bundle_root",
    "load_bundle",
    "open_config",
    "prepare_run",
    "read_config",
    "run_bundle",
    "running_config",
]

Workflow = Literal["train", "evaluate", "inference"]
_MAIN_CONFIGS: tuple[Workflow, ...] = ("train", "evaluate", "inference")


class BundleConfigs(TypedDict):
    """The configuration files of one bundle; an overlay goes by its name without suffix."""

    train: Path
    evaluate: Path
    inference: Path
    overlays: dict[str, Path]


def find_bundle_root(name: str) -> str:
    """Return the folder of the bundle `name`, found from any working directory.

    Looked at in this order: the working directory itself, its `bundles` folder, the same for each
    parent, then the bundles that came with the package.

    Raises:
        ConfigurationError: there is no such bundle; the message names those there are.
    """
    for candidate in _candidates(name):
        if _is_bundle(candidate):
            return str(candidate)
    known = bundle_names()
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known) or 'none'}:"
    raise ConfigurationError(
        f"no bundle {name!r} in {Path.cwd()}, its parents or the installed package; {hint} go to "
        "the repository's root, or give the bundle's folder (--bundle_root under monai.bundle)"
    )


def bundle_names() -> list[str]:
    """Return the names of the bundles that `find_bundle_root` would find, sorted."""
    here = Path.cwd()
    own = {folder.name for folder in (here, *here.parents) if _is_bundle(folder)}
    folders = (*(folder / "bundles" for folder in (here, *here.parents)), shipped_folder("bundles"))
    inside = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
    return sorted(own | {path.name for path in inside if _is_bundle(path)})


def bundle_configs(name_or_path: str | PathLike[str]) -> BundleConfigs:
    """Return the configuration files of a bundle, named or given by its folder."""
    configs = _root(name_or_path) / "configs"
    overlays = {
        path.stem: path for path in sorted(configs.glob("*.yaml")) if path.stem not in _MAIN_CONFIGS
    }
    train, evaluate, inference = (configs / f"{stem}.yaml" for stem in _MAIN_CONFIGS)
    return {"train": train, "evaluate": evaluate, "inference": inference, "overlays": overlays}


def bundle_status() -> list[dict[str, Any]]:
    """Return name, version, folder and shipped weights of every bundle, for `doctor`."""
    status = []
    for name in bundle_names():
        root = Path(find_bundle_root(name))
        weights = root / "models" / "model.pt"
        metadata = json.loads((root / "configs" / "metadata.json").read_text(encoding="utf-8"))
        size_bytes = weights.stat().st_size if weights.is_file() else None
        status.append(
            {
                "name": name,
                "version": metadata.get("version"),
                "root": str(root),
                "weights": str(weights) if size_bytes is not None else None,
                "weights_bytes": size_bytes,
            }
        )
    return status


def prepare_run(
    name_or_path: str | PathLike[str],
    workflow: Workflow,
    overlays: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> tuple[list[Path], dict[str, Any]]:
    """Return the files of a run in their order and its overrides, every name checked.

    `tracking`, which is MONAI's switch and no id, may stand among the overrides of a training.

    Raises:
        ConfigurationError: an unknown bundle, overlay or id; the message names the closest.
    """
    configs = bundle_configs(name_or_path)
    if workflow not in _MAIN_CONFIGS:
        raise ConfigurationError(f"workflow must be one of {_MAIN_CONFIGS}, got {workflow!r}")
    chosen = [_overlay(configs, overlay) for overlay in overlays]
    files = {
        "train": [configs["train"], *chosen],
        "evaluate": [configs["train"], *chosen, configs["evaluate"]],
        "inference": [configs["inference"], *chosen],
    }[workflow]
    config = read_config(files)
    settings = dict(overrides or {})
    tracked = _tracked(workflow, settings.pop("tracking", None))
    if "bundle_root" in config:  # a bundle given by its folder must not look for its namesake
        settings.setdefault("bundle_root", str(_root(name_or_path)))
    return files, {**check_overrides(config, settings), **tracked}


def run_bundle(
    name_or_path: str | PathLike[str],
    workflow: Workflow,
    overlays: Iterable[str] = (),
    **overrides: Any,
) -> dict[str, Any]:
    """Run a bundle in this process: create, initialize, run, finalize.

    For `evaluate` and `inference` the checkpoint's network definition, preprocessing and threshold
    stand over the configuration's, so that `ckpt_path` alone is enough; explicit overrides stand
    over both.

    Args:
        name_or_path: a bundle's name, or its folder.
        workflow: which of its three configurations.
        overlays: files of its `configs` folder, without suffix, merged in this order.
        overrides: value per id, nested ids as in `**{"train::trainer::max_epochs": 1}`.

    Returns:
        `workflow`, `bundle_root`, `output_dir`, `evaluation_dir` of an evaluation, and `results`:
        what each expression of `run` gave.

    Raises:
        LaminaError: what stopped the run, without MONAI's wrapping.
    """
    files, settings = prepare_run(name_or_path, workflow, overlays, overrides)
    return unwrapped(lambda: _run(files, workflow, settings))


def load_bundle(
    name: str | PathLike[str],
    ckpt_path: str | PathLike[str] | None = None,
    device: str = "cpu",
    **overrides: Any,
) -> LoadedBundle:
    """Return a bundle ready to be called on an image.

    Args:
        name: a bundle's name, or its folder.
        ckpt_path: a checkpoint of the bundle; None takes the weights that it ships.
        device: `cpu`, `cuda`, `cuda:1`, `mps` or `auto`.
        overrides: value per id of its `inference.yaml`.

    Example:
        >>> bundle = load_bundle("fundus_vessels")            # doctest: +SKIP
        >>> result = bundle(image)                            # doctest: +SKIP
        >>> result["pred"].shape == image.shape[:2]           # doctest: +SKIP
        True
    """
    from pipeline.hardware.devices import choose_device
    from pipeline.inference.loaded import LoadedBundle

    if ckpt_path is not None:
        overrides["ckpt_path"] = str(ckpt_path)
    chosen = choose_device(device)
    parser, checkpoint = open_config(name, "inference", (), {**overrides, "device": str(chosen)})
    if checkpoint is None:
        raise ConfigurationError(f"{name}: its inference.yaml names no ckpt_path: pass ckpt_path=")
    wanted = ["predictor", "preprocessing", "inferer", "postprocessing"]
    wanted += ["threshold"] if "threshold" in parser else []
    parts = build(parser, wanted)
    return LoadedBundle(**parts, device=chosen)


def build_part(name: str | PathLike[str], workflow: Workflow, id: str, **overrides: Any) -> Any:
    """Return one object of a bundle's configuration, such as `train::preprocessing`.

    Only what `id` refers to is built.

    Raises:
        LaminaError: what was wrong, without MONAI's wrapping.
    """
    from monai.bundle import ConfigParser

    files, settings = prepare_run(name, workflow, (), overrides)
    parser = ConfigParser(read_config(files))
    parser.update(settings)
    if id not in parser:
        raise ConfigurationError(f"{name}: its {workflow} configuration has no id {id}")
    return build(parser, [id])[id]


def open_config(
    name: str | PathLike[str],
    workflow: Workflow,
    overlays: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> tuple[ConfigParser, dict[str, Any] | None]:
    """Return the configuration that `run_bundle` would run, unbuilt, and the checkpoint it uses.

    The checkpoint of a training, and of a configuration without `ckpt_path`, is None.

    Raises:
        LaminaError: as `prepare_run`, or the checkpoint cannot be used.
    """
    from monai.bundle import ConfigParser

    files, settings = prepare_run(name, workflow, overlays, overrides)
    config = read_config(files)
    checkpoint = None
    if workflow != "train":
        settings, checkpoint = unwrapped(lambda: with_checkpoint(config, settings))
    parser = ConfigParser(config)
    parser.update(settings)
    return parser, checkpoint


def _run(files: list[Path], workflow: Workflow, settings: dict[str, Any]) -> dict[str, Any]:
    from monai.bundle import ConfigWorkflow

    config = read_config(files)
    if workflow != "train":
        settings, _ = with_checkpoint(config, settings)
    run = ConfigWorkflow(
        config_file=[str(path) for path in files],
        workflow_type="infer" if workflow == "inference" else "train",
        **settings,
    )
    run.initialize()
    results = run.run()
    run.finalize()
    if "tracking" in settings:
        from pipeline.training.tracking import record_report

        record_report(*build(run.parser, ["output_dir", "tracking_uri"]).values())
    found: dict[str, Any] = {
        id: run.parser.get_parsed_content(id)
        for id in ("bundle_root", "output_dir", "evaluation_dir")
        if id in config
    }
    return {"workflow": workflow, **found, "results": results}


def _tracked(workflow: Workflow, tracking: Any) -> dict[str, Any]:
    """Return MONAI's switch, and the ids that keep its own handlers and files out of the way."""
    if tracking is None:
        return {}
    if workflow != "train" or tracking != "mlflow":
        raise ConfigurationError(
            f"--tracking: expected mlflow, and a training, got {tracking!r} for {workflow}: "
            "leave it out"
        )
    from pipeline.training.tracking import check_mlflow

    check_mlflow()
    return {"tracking": tracking, "is_not_rank0": True, "save_execute_config": False}


def _candidates(name: str) -> Iterator[Path]:
    """Yield where the bundle `name` may be, nearest first."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if folder.name == name:
            yield folder
        yield folder / "bundles" / name
    yield shipped_folder("bundles") / name


def _is_bundle(folder: Path) -> bool:
    return (folder / "configs" / "metadata.json").is_file()


def _root(name_or_path: str | PathLike[str]) -> Path:
    path = Path(name_or_path)
    if len(path.parts) > 1 or path.is_absolute():
        if not _is_bundle(path):
            raise ConfigurationError(f"{path}: not a bundle, it has no configs/metadata.json")
        return path.resolve()
    return Path(find_bundle_root(str(name_or_path)))


def _overlay(configs: BundleConfigs, name: str) -> Path:
    known = configs["overlays"]
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known) or 'none'}"
    raise ConfigurationError(f"no overlay {name!r} in {configs['train'].parent}: {hint}")
