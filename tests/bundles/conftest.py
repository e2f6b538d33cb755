"""What the generic tests need to know of each bundle, and one short run of each.

A new bundle adds one entry to `CASES` and passes the same tests.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.bundles import bundle_configs, prepare_run, read_config, run_bundle
from pipeline.data.images import read_image
from pipeline.data.writers import write_png

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"


SLIDING_WINDOW = "pipeline.inference.sliding_window.SlidingWindow"


@dataclass(frozen=True)
class Case:
    """What differs between bundles: how to make a run of seconds, and what it leaves.

    Args:
        training: settings that make training take a second, two epochs long.
        frame: those of them that inference has too, since a checkpoint is used as it was trained.
        overlay: an overlay of another architecture, and settings that make it small.
        make_dataset: writes a labelled data folder with two test images, and returns it.
        training_inputs: where the training inputs are in it, as a glob pattern.
        make_inputs: writes two inputs into a folder, and returns their names in it.
        spoil_input: makes one input file unreadable.
        results: suffixes of what inference writes for an input, after its stem.
        check_result: asserts that a result fits its input.
        figures: of an epoch's `val`, without the prefix `val_`, and of an evaluated image.
        score: quality between 0 and 1 of the loaded bundle on a phantom it has not seen.
        least_score: what the shipped weights reach at least.
        mask: suffix of the predictions that evaluation writes, None where tables hold them.
        pooled: whether evaluation has figures pooled over the images.
        pictures: whether training draws pictures at its best epoch.
        chosen: the figure that validation chooses and evaluation and inference use.
        unbeatable: a value of the monitored figure that no epoch reaches.
        loader: what gives the inputs of an inference run.
        inferer: what runs the network over an input.
        validate_inferer: what runs it in validation.
        results_have_pictures: whether inference draws one per input.
        content: what of a result is the same whenever it is made.
    """

    training: Mapping[str, Any]
    frame: Mapping[str, Any]
    overlay: tuple[str, Mapping[str, Any]]
    make_dataset: Callable[[Path], Path]
    training_inputs: str
    make_inputs: Callable[[Path], list[str]]
    spoil_input: Callable[[Path], None]
    results: tuple[str, ...]
    check_result: Callable[[Path, Path], None]
    figures: tuple[str, ...]
    score: Callable[[Any], float]
    least_score: float
    mask: str | None = ".png"
    pooled: bool = True
    pictures: bool = True
    chosen: str = "threshold"
    unbeatable: float = 1.5
    loader: str = "pipeline.inference.accepted.AcceptedLoader"
    inferer: str = SLIDING_WINDOW
    validate_inferer: str = SLIDING_WINDOW
    results_have_pictures: bool = True
    content: Callable[[Path], Any] = Path.read_bytes


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _fundus_dataset(folder: Path) -> Path:
    from pipeline.fundus.phantom import write_phantom_dataset

    return write_phantom_dataset(folder, {"train": 3, "val": 1, "test": 2}, size_px=128)


def _fundus_inputs(folder: Path) -> list[str]:
    from pipeline.fundus.phantom import fundus_phantom

    names = ["left/eye.png", "right/eye.png"]  # equal names in two folders
    for seed, name in enumerate(names):
        write_png(folder / name, fundus_phantom(seed, (96 + 32 * seed, 128)).image)
    return names


def _fundus_result(result: Path, source: Path) -> None:
    mask = read_image(result)
    assert mask.shape == read_image(source).shape[:2]
    assert set(np.unique(mask)) <= {0, 255}


def _fundus_score(bundle: Any) -> float:
    from pipeline.fundus.metrics import vessel_metrics
    from pipeline.fundus.phantom import fundus_phantom

    phantom = fundus_phantom(seed=7, size_px=(512, 512))
    probability = bundle(phantom.image)["pred"]
    return vessel_metrics(probability, phantom.label, phantom.fov, bundle.threshold)["dice"]


def _scroll_dataset(folder: Path) -> Path:
    from pipeline.vesuvius.phantom import write_phantom_dataset

    return write_phantom_dataset(folder, {"train": 2, "val": 2, "test": 2}, size_vx=40)


def _scroll_inputs(folder: Path) -> list[str]:
    from pipeline.data.writers import write_tiff
    from pipeline.vesuvius.phantom import scroll_phantom

    names = ["left/scroll.tif", "right/scroll.tif"]  # equal names in two folders
    for seed, name in enumerate(names):
        write_tiff(folder / name, scroll_phantom(seed, (36, 40, 44 - 4 * seed)).image)
    return names


def _scroll_result(result: Path, source: Path) -> None:
    mask = read_image(result)
    assert mask.shape == read_image(source).shape
    assert set(np.unique(mask)) <= ({0, 255} if "visualization" in result.name else {0, 1})


def _scroll_score(bundle: Any) -> float:
    from pipeline.vesuvius.metrics import surface_dice
    from pipeline.vesuvius.phantom import scroll_phantom

    phantom = scroll_phantom(seed=7, size_vx=(64, 64, 64), difficulty="medium")
    mask = bundle(phantom.image)["pred"] >= bundle.threshold
    return surface_dice(mask.astype(np.uint8), phantom.label)


def _oct_dataset(folder: Path) -> Path:
    from pipeline.oct.phantom import write_phantom_dataset

    counts = {"train": 2, "val": 1, "test": 1}
    return write_phantom_dataset(folder, counts, bscans=1, size_px=(128, 160))


def _oct_inputs(folder: Path) -> list[str]:
    from pipeline.oct.phantom import oct_phantom

    names = ["left/scan.png", "right/scan.png"]  # equal names in two folders
    for seed, name in enumerate(names):
        write_png(folder / name, oct_phantom(seed, (128, 144 + 16 * seed)).image)
    return names


def _oct_result(result: Path, source: Path) -> None:
    from pipeline.oct.formats import read_predictions

    columns = read_image(source).shape[1]
    if result.suffix == ".csv":
        assert len(result.read_text(encoding="utf-8").splitlines()) == 1 + columns
    else:
        assert read_predictions(result).volume.bscans.shape == (1, *read_image(source).shape[:2])


def _oct_score(bundle: Any) -> float:
    from pipeline.oct.coordinates import extract_layers
    from pipeline.oct.phantom import oct_phantom

    phantom = oct_phantom(seed=7, size_px=(480, 768))
    layers = extract_layers(bundle(phantom.image)["pred"][None])
    errors = layers.ilm_px[0] - phantom.ilm, layers.bm_px[0] - phantom.bm
    return 1 / (1 + float(np.mean(np.abs(errors))))


def _insect_dataset(folder: Path) -> Path:
    from pipeline.classification.phantom import write_phantom_dataset

    counts = {"train": 6, "val": 4, "test": 2}
    return write_phantom_dataset(
        folder, counts, classes=2, imbalance=1, size_px=48, layout="folders"
    )


def _insect_inputs(folder: Path) -> list[str]:
    from pipeline.classification.phantom import insect_phantom

    names = ["left/insect.png", "right/insect.png"]  # equal names in two folders
    for seed, name in enumerate(names):
        write_png(folder / name, insect_phantom(seed, label=seed, size_px=48 + 16 * seed).image)
    return names


def _insect_result(result: Path, source: Path) -> None:
    said = json.loads(result.read_text(encoding="utf-8"))
    assert said["top"][0]["class"] == said["class"]
    assert 0 < said["probability"] <= 1


def _guesses(result: Path) -> Any:
    return json.loads(result.read_text(encoding="utf-8"))["top"]


def _insect_score(bundle: Any) -> float:
    """Return the accuracy on drawn insects of six classes."""
    from pipeline.classification.phantom import insect_phantom

    drawn = [insect_phantom(seed=90_000 + n, label=n % 6, size_px=160) for n in range(24)]
    return float(np.mean([bundle(d.image)["pred"].argmax() == d.label for d in drawn]))


_FEW = {"train": 12, "val": 6, "test": 6}
_CLASSIFIER: dict[str, Any] = {
    "overlay": ("efficientnet_b0", {}),
    "make_dataset": _insect_dataset,
    "training_inputs": "train/*/*.jpg",
    "make_inputs": _insect_inputs,
    "spoil_input": _truncate,
    "results": (".json",),
    "check_result": _insect_result,
    "content": _guesses,
    "figures": ("nll",),
    "score": _insect_score,
    "mask": None,
    "pictures": False,
    "results_have_pictures": False,
    "chosen": "temperature",
    "inferer": "pipeline.inference.whole_images.WholeImages",
}

CASES = {
    "insect_pests": Case(
        training={
            "manifest": "image_folders",
            "phantom": {"classes": 3, "imbalance": 2, "counts": _FEW},
            "max_epochs": 2,
            "batch_size": 2,
            "effective_batch_size": 2,
            "threads": 1,
        },
        frame={"image_size_px": 32},
        least_score=0.6,
        validate_inferer="SimpleInferer",
        **_CLASSIFIER,
    ),
    "multiscale_classifier": Case(
        training={
            "phantom": {"classes": 3, "imbalance": 1, "size_px": 64, "counts": _FEW},
            "max_epochs": 2,
            "batch_size": 2,
            "effective_batch_size": 2,
            "threads": 1,
        },
        frame={"scales": [48, 32], "evaluation_scale": 48},
        least_score=0.6,
        unbeatable=-1.0,
        validate_inferer="pipeline.classification.scale_validation.ScalesInferer",
        **_CLASSIFIER,
    ),
    "oct_layers": Case(
        training={
            "max_epochs": 2,
            "val_interval": 1,
            "patches_per_bscan": 2,
            "batch_size": 2,
            "effective_batch_size": 2,
            "patch_columns": 48,
            "threads": 1,
        },
        frame={"frame": [96, 128], "roi_size": [96, 128]},
        overlay=("hybrid_attention", {"base_channels": 2}),
        make_dataset=_oct_dataset,
        training_inputs="train.h5",
        make_inputs=_oct_inputs,
        spoil_input=_truncate,
        results=(".csv",),
        check_result=_oct_result,
        figures=("mae_px", "ilm_mae_px", "bm_mae_px"),
        score=_oct_score,
        least_score=0.3,
        mask=".csv",
        pooled=False,
        pictures=False,
        chosen="max_sigma_px",
        unbeatable=-1.0,
        loader="pipeline.oct.bscan_loader.BScanLoader",
    ),
    "vesuvius_surface": Case(
        training={
            "max_epochs": 2,
            "val_interval": 1,
            "patches_per_volume": 1,
            "batch_size": 2,
            "effective_batch_size": 2,
            "patch_size": [16, 16, 16],
            "roi_size": [32, 32, 32],
            "thresholds": [0.3, 0.5],
            "threshold_volumes": 1,
            "threads": 1,
        },
        frame={},
        overlay=("topology_aware", {"initial_filters": 2, "depth": 1}),
        make_dataset=_scroll_dataset,
        training_inputs="train_images/*.tif",
        make_inputs=_scroll_inputs,
        spoil_input=_truncate,
        results=(".tif", "_visualization.tif"),
        check_result=_scroll_result,
        figures=("surface_dice", "voi_score", "dice"),
        score=_scroll_score,
        least_score=0.6,
        mask=".tif",
        pooled=False,
        pictures=False,
    ),
    "fundus_vessels": Case(
        training={
            "max_epochs": 2,
            "val_interval": 1,
            "patches_per_image": 2,
            "batch_size": 2,
            "effective_batch_size": 2,
            "patch_size": [64, 64],
            "image_log_frequency": 1,
            "threads": 1,
        },
        frame={"fov_size_px": 128},
        overlay=("roinet", {"depths": [4, 4, 4, 4, 4, 4], "kernel_size": 3}),
        make_dataset=_fundus_dataset,
        training_inputs="train/image/*.png",
        make_inputs=_fundus_inputs,
        spoil_input=_truncate,
        results=("_vessels.png",),
        check_result=_fundus_result,
        figures=("dice", "iou", "auc"),
        score=_fundus_score,
        least_score=0.6,
    ),
}


@dataclass(frozen=True)
class Bundle:
    """A bundle of this repository with its case."""

    name: str
    root: Path
    case: Case

    @property
    def overlays(self) -> dict[str, list[str]]:
        """The workflows that each overlay says, in its head, it is merged after."""
        return {
            name: _merged_after(path)
            for name, path in bundle_configs(self.root)["overlays"].items()
        }

    def run(self, workflow: str, overlays: tuple[str, ...] = (), **overrides: Any) -> dict:
        """Run it in this process, on the CPU, with the case's small settings."""
        settings = {"device": "cpu", "tune_allocator": False, **overrides}
        if workflow != "inference":
            settings = {**self.case.training, **settings}
        if workflow == "train":
            settings = {**self.case.frame, **settings}
        with unchanged_process():  # for the runs of session fixtures; see `_undisturbed`
            return run_bundle(self.root, workflow, overlays, **settings)

    def workflow(
        self, workflow: str, overlays: tuple[str, ...] = (), frame: bool = True, **overrides: Any
    ) -> Any:
        """Return MONAI's own workflow, as `monai.bundle run` makes it, with the small settings.

        Without `frame`, inputs are seen as the shipped weights see them.
        """
        from monai.bundle import ConfigWorkflow

        files, settings = prepare_run(self.root, workflow, overlays)
        small = {} if workflow == "inference" else self.case.training
        settings |= {"device": "cpu", "tune_allocator": False, **small}
        settings |= self.case.frame if frame else {}
        return ConfigWorkflow(
            config_file=[str(path) for path in files],
            workflow_type="infer" if workflow == "inference" else "train",
            **settings | {key: _plain(value) for key, value in overrides.items()},
        )


@dataclass(frozen=True)
class Combination:
    """Configuration files that are meant to be merged."""

    bundle: Bundle
    workflow: str
    overlays: tuple[str, ...]

    def __str__(self) -> str:
        return "+".join((f"{self.bundle.name}-{self.workflow}", *self.overlays))

    @property
    def config(self) -> dict[str, Any]:
        """The merged text, a new copy each time."""
        return read_config(prepare_run(self.bundle.root, self.workflow, self.overlays)[0])

    def within(self, workflow: str) -> Combination:
        """The same overlays in another workflow."""
        return Combination(self.bundle, workflow, self.overlays)

    @property
    def plain(self) -> Combination:
        """The same workflow without overlays."""
        return Combination(self.bundle, self.workflow, ())


def folders() -> list[Path]:
    return sorted(path.parents[1] for path in BUNDLES.glob("*/configs/metadata.json"))


def bundles() -> list[Bundle]:
    missing = [folder.name for folder in folders() if folder.name not in CASES]
    if missing:
        raise pytest.UsageError(f"{__file__}: CASES has no entry for {', '.join(missing)}")
    return [Bundle(folder.name, folder, CASES[folder.name]) for folder in folders()]


def _merged_after(overlay: Path) -> list[str]:
    lines = overlay.read_text(encoding="utf-8").splitlines()
    said = [line for line in lines if line.startswith("#") and "Merged after" in line]
    return re.findall(r"(train|inference)\.yaml", said[0].split("Merged after")[1]) if said else []


def combinations() -> Iterator[Combination]:
    for bundle in bundles():
        for workflow in ("train", "evaluate", "inference"):
            yield Combination(bundle, workflow, ())
        for name, workflows in bundle.overlays.items():
            for workflow in [*workflows, *(["evaluate"] if "train" in workflows else [])]:
                yield Combination(bundle, workflow, (name,))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Spread a test over bundles, over merged configurations, or over configuration files."""
    if "combination" in metafunc.fixturenames:
        metafunc.parametrize("combination", list(combinations()), ids=str)
    if "config_file" in metafunc.fixturenames:
        files = [path for folder in folders() for path in sorted(folder.glob("configs/*.yaml"))]
        ids = [f"{path.parents[1].name}-{path.stem}" for path in files]
        metafunc.parametrize("config_file", files, ids=ids)


@contextlib.contextmanager
def unchanged_process() -> Iterator[None]:
    """Undo what a workflow does to the process: log handlers and levels, import path, seeds."""
    from monai.utils import set_determinism

    loggers = [logging.getLogger(), logging.getLogger("pipeline")]
    logs = [(log, log.handlers[:], log.level) for log in loggers]
    path = sys.path[:]
    try:
        yield
    finally:
        for log, handlers, level in logs:
            log.handlers[:] = handlers
            log.setLevel(level)
        sys.path[:] = path
        set_determinism(seed=None)


@pytest.fixture(autouse=True)
def _undisturbed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Stand in an empty folder, so that nothing writes into the checkout; clean up the process."""
    monkeypatch.chdir(tmp_path)
    with unchanged_process():
        yield


@pytest.fixture(scope="session", params=bundles(), ids=lambda bundle: bundle.name)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """Each bundle in turn."""
    return request.param


@pytest.fixture(scope="session")
def dataset(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small labelled data folder."""
    return bundle.case.make_dataset(tmp_path_factory.mktemp(bundle.name) / "data")


@pytest.fixture(scope="session")
def inputs(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder of unlabelled inputs, and their names."""
    folder = tmp_path_factory.mktemp(f"{bundle.name}_inputs")
    return folder, bundle.case.make_inputs(folder)


@dataclass(frozen=True)
class Run:
    """What a run left.

    Args:
        folder: where its results are.
        before, after: files that it must not touch, with their times.
    """

    folder: Path
    before: Mapping[str, int]
    after: Mapping[str, int]

    @property
    def best(self) -> Path:
        return self.folder / "checkpoints" / "best.pt"


def times(folder: Path) -> dict[str, int]:
    """Return the files below a folder with their times of change."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def trained(bundle: Bundle, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training run of the default configuration, finished. Tests only read it."""
    folder = tmp_path_factory.mktemp(f"{bundle.name}_run")
    before = times(bundle.root)
    bundle.run("train", dataset_dir=dataset, output_dir=folder)
    return Run(folder, before, times(bundle.root))


@pytest.fixture(scope="session")
def evaluated(bundle: Bundle, trained: Run, dataset: Path) -> Run:
    """The evaluation of the training run's best checkpoint on the test split."""
    before = times(trained.folder / "checkpoints")
    bundle.run("evaluate", dataset_dir=dataset, output_dir=trained.folder, ckpt_path=trained.best)
    after = times(trained.folder / "checkpoints")
    return Run(trained.folder / "evaluation" / "test", before, after)


@pytest.fixture(scope="session")
def inferred(
    bundle: Bundle,
    trained: Run,
    inputs: tuple[Path, list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The results of inference with the training run's best checkpoint."""
    folder = tmp_path_factory.mktemp(f"{bundle.name}_results")
    bundle.run("inference", dataset_dir=inputs[0], output_dir=folder, ckpt_path=trained.best)
    return folder


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, os.PathLike) else value
