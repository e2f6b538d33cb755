"""The default recipe against the original project's, on drawn scrolls neither was trained on.

    python benchmarks/surface_recipes.py --output_dir runs/surface_recipes \
        [--epochs 8] [--original_epochs 8] [--volumes 18] [--shipped_epochs 30] \
        [--precision bfloat16]

Both train the same small network on the same phantoms of mixed difficulty, on one thread and in
bfloat16, as the original does (`--precision float32` with fewer epochs where a CPU has no units for
it); the epochs are set so that both take about the same CPU time, which is printed. Each is scored
as the competition scores, on five phantoms of each difficulty, by the threshold alone, by its own
repair and, for the original's network, by the default repair as well. The threshold is the one that
training settled on its validation volumes, or that with the best mean score on twelve more phantoms
of mixed difficulty.

The weights of the bundle are scored beside them: the default recipe again, for an hour on twice as
many phantoms. `--shipped_epochs 30` trains such weights anew, and scores those.

VOI rises when less is found, an empty mask has 1: the last tables show these two, repaired and
beside their threshold alone, at every threshold. Nothing is chosen there.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.bundles import find_bundle_root
from pipeline.data.cases import Cases
from pipeline.inference.evaluation_tables import column_means
from pipeline.inference.sliding_window import SlidingWindow
from pipeline.training.checkpoints import load_weights, read_checkpoint
from pipeline.vesuvius.cases import training_cases
from pipeline.vesuvius.evaluation import score_row
from pipeline.vesuvius.networks import SmallUNet3D
from pipeline.vesuvius.phantom import write_phantom_dataset
from pipeline.vesuvius.topology import PostProcess
from pipeline.vesuvius.transforms import LoadVolumed, ScalePercentilesd

PARTS = ("score", "topology", "surface_dice", "voi_score")
DIFFICULTIES = ("easy", "medium", "hard")
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ORIGINAL_REPAIR = {"recipe": "original", "max_hole_size": 50, "kernel_size": 2}
CHAINS = {
    "threshold": None,
    "default repair": {"smoothing": 1.0},
    "original's repair": ORIGINAL_REPAIR,
}
# What the original's recipe has to leave on a CPU and in volumes of 96 voxels.
ORIGINAL_ON_CPU = ["--patch_size", "[96, 96, 96]", "--roi_size", "[96, 96, 96]"]
ORIGINAL_ON_CPU += ["--manifest", "vesuvius_surface"]

Pair = tuple[NDArray[np.float32], NDArray[np.uint8]]


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    root = Path(options.output_dir)
    choice = write_phantom_dataset(root / "choice", {"test": 12}, seed=500)
    tests = {
        name: write_phantom_dataset(root / name, {"test": 5}, difficulty=name, seed=1000 + index)
        for index, name in enumerate(DIFFICULTIES)
    }
    checkpoints = _checkpoints(root, options)
    chosen, own, tested = {}, {}, {}
    for name, checkpoint in checkpoints.items():
        validated = _predicted(checkpoint, _cases(choice, root).test)
        tested[name] = {d: _predicted(checkpoint, _cases(tests[d], root).test) for d in tests}
        repair = "original's repair" if name == "original" else "default repair"
        settled = float(read_checkpoint(checkpoint)["threshold"])
        own[name] = _table(f"{name}, {repair} at its own", tested[name], repair, settled)
        for chain in dict.fromkeys(("threshold", "default repair", repair)):
            best = max(THRESHOLDS, key=lambda t: _means(validated, chain, t)["score"])
            chosen[name, chain] = _table(f"{name}, {chain} at", tested[name], chain, best)
    for name in ("default", "shipped"):
        _print(f"{name} - original, own thresholds", _difference(own[name], own["original"]))
        ours = chosen[name, "default repair"]
        _print(f"{name} - original, each its repair",
               _difference(ours, chosen["original", "original's repair"]))  # fmt: skip
        _print(f"{name} - original, both default repair",
               _difference(ours, chosen["original", "default repair"]))  # fmt: skip
        _print(f"{name} - original, both threshold",
               _difference(chosen[name, "threshold"], chosen["original", "threshold"]))  # fmt: skip
    for name, threshold in product(("default", "shipped"), THRESHOLDS):
        repaired = _table(f"{name}, default repair at", tested[name], "default repair", threshold)
        alone = {d: _means(pairs, "threshold", threshold) for d, pairs in tested[name].items()}
        _print("  what repair adds to the threshold", _difference(repaired, alone))


def _checkpoints(root: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Train what is not there yet, and return the checkpoints by name."""
    data = _phantoms(root / "data", options.volumes)
    original = ["original", *ORIGINAL_ON_CPU]
    epochs, precision = options.epochs, options.precision
    default = _train(root / "default", data, [], epochs, precision)
    theirs = _train(root / "original", data, original, options.original_epochs, precision)
    shipped = Path(find_bundle_root("vesuvius_surface")) / "models" / "model.pt"
    if options.shipped_epochs:
        more = _phantoms(root / "more_data", 2 * options.volumes)
        shipped = _train(root / "shipped", more, [], options.shipped_epochs, precision)
    return {"default": default, "original": theirs, "shipped": shipped}


def _phantoms(folder: Path, volumes: int) -> Path:
    return write_phantom_dataset(folder, {"train": volumes, "val": volumes // 3}, seed=0)


def _table(
    name: str, tested: dict[str, list[Pair]], chain: str, threshold: float
) -> dict[str, dict[str, float]]:
    """Print and return the mean parts of the score by difficulty."""
    rows = {difficulty: _means(pairs, chain, threshold) for difficulty, pairs in tested.items()}
    _print(f"{name} {threshold}", rows)
    return rows


def _train(folder: Path, data: Path, arguments: list[str], epochs: int, precision: str) -> Path:
    """Train in a process of its own, print its CPU time and return its best checkpoint."""
    command = [sys.executable, "-m", "pipeline", "train", "vesuvius_surface", *arguments]
    command += ["--dataset_dir", str(data), "--output_dir", str(folder), "--threads", "1"]
    command += ["--max_epochs", str(epochs), "--fold_seed", "0", "--precision", precision]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{folder.name}: {epochs} epochs in {spent:.0f} CPU s", flush=True)
    return folder / "checkpoints" / "best.pt"


def _cases(data: Path, root: Path) -> Cases:
    return training_cases(str(data), "vesuvius_surface", str(root / "unused"))


def _predicted(checkpoint: Path, cases: list[dict[str, Any]]) -> list[Pair]:
    network = SmallUNet3D(1, 1, widths=(8, 24, 48, 96)).eval()
    load_weights(network, read_checkpoint(checkpoint), checkpoint)
    inferer = SlidingWindow((96, 96, 96), 0.5, "gaussian")
    read, scale = LoadVolumed(), ScalePercentilesd("image")

    def pairs() -> Iterator[Pair]:
        for case in cases:
            item = scale(read(case))
            with torch.inference_mode():
                logits = inferer(item["image"].as_tensor()[None], network)
            label = np.asarray(item["label"])[0].astype(np.uint8)
            yield torch.sigmoid(logits)[0, 0].numpy(), label

    return list(pairs())


def _means(pairs: list[Pair], chain: str, threshold: float) -> dict[str, float]:
    settings = CHAINS[chain]
    rows = []
    for probability, label in pairs:
        if settings is None:
            mask = (probability >= threshold).astype(np.uint8)
        else:
            mask = PostProcess(threshold=threshold, betti=False, **settings)(probability).mask
        rows.append(score_row(mask, label))
    means = column_means(rows, complete=True)
    return {part: means[part] for part in PARTS}


def _difference(
    one: dict[str, dict[str, float]], other: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    return {d: {p: one[d][p] - other[d][p] for p in PARTS} for d in one}


def _print(name: str, rows: dict[str, dict[str, float]]) -> None:
    every = {part: float(np.mean([means[part] for means in rows.values()])) for part in PARTS}
    for difficulty, means in {**rows, "all": every}.items():
        figures = "  ".join(f"{part} {means[part]:+.4f}" for part in PARTS)
        print(f"{name:42s} {difficulty:7s} {figures}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", default="runs/surface_recipes")
    parser.add_argument("--volumes", type=int, default=18, help="training phantoms")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--original_epochs", type=int, default=8)
    parser.add_argument("--shipped_epochs", type=int, default=0, help="0: the bundle's weights")
    parser.add_argument("--precision", default="bfloat16", help="of training, for both")
    return parser.parse_args()


if __name__ == "__main__":
    main()
