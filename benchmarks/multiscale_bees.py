"""Joint multi-scale training against training at one scale: bees with and without pollen.

    python benchmarks/multiscale_bees.py --dataset_dir $LAMINA_DATA/classification/pollen_bees \
        [--output_dir runs/multiscale_bees] [--seeds 3] [--folds 3] [--epochs 30]

The same small network, number of steps and augmentation, by the bundle multiscale_classifier: once
at 128 px alone, once at 128, 96 and 64 px in every step with a consistency loss. Both are tested at
sizes they were trained at and at 48 px, which neither saw. The manifest deals blocks of 250 video
frames into train, val and test in three ways; each is run with three seeds. Validation chooses the
epoch, the test images are looked at once. Figures are accuracies on the test images: mean and
standard deviation over seeds and splits.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import yaml

SIZES = (128, 96, 64, 48)
MODES = ("single", "joint")
GOALS = {("joint", 128): 0.96, ("joint", 48): 0.92}
LEAST_GAIN = 0.04  # of joint over single training at 48 px


def main() -> None:
    options = _options()
    found: dict[str, list[dict[int, float]]] = {mode: [] for mode in MODES}
    for fold in range(options.folds):
        for seed in range(options.seeds):
            for mode in MODES:
                spent_s, accuracy = _run(options, mode, fold, seed)
                found[mode].append(accuracy)
                figures = "  ".join(f"{size} px {accuracy[size]:.4f}" for size in SIZES)
                run = f"split {fold} seed {seed} {mode:7s} {spent_s:5.0f} CPU s"
                print(f"{run}  {figures}", flush=True)
    if options.seeds * options.folds > 1:
        _print_table(found)


def _print_table(found: dict[str, list[dict[int, float]]]) -> None:
    print(f"\naccuracy over {len(found['joint'])} runs, mean (deviation)")
    for mode in MODES:
        values = {size: [run[size] for run in found[mode]] for size in SIZES}
        figures = "  ".join(f"{s} px {mean(v):.4f} ({stdev(v):.4f})" for s, v in values.items())
        print(f"{mode:7s} {figures}")
    gain = mean(j[48] - s[48] for j, s in zip(found["joint"], found["single"], strict=True))
    print(f"joint - single at 48 px: {gain:+.4f} (asked: {LEAST_GAIN:+.2f})")
    for (mode, size), goal in GOALS.items():
        reached = mean(run[size] for run in found[mode])
        print(f"{mode} at {size} px: {reached:.4f} (asked: {goal})")


def _run(
    options: argparse.Namespace, mode: str, fold: int, seed: int
) -> tuple[float, dict[int, float]]:
    """Train and test in processes of their own; return the training's CPU time and accuracies."""
    folder = Path(options.output_dir) / f"{mode}_fold{fold}_seed{seed}"
    common = ["--dataset_dir", str(options.dataset_dir), "--manifest", "pollen_bees"]
    common += ["--fold", str(fold), "--output_dir", str(folder), "--threads", "1"]
    common += ["--device", "cpu", "--mode", mode]
    train = ["train", "multiscale_classifier", *common, "--seed", str(seed)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _call([*train, "--max_epochs", str(options.epochs)], folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    best = str(folder / "checkpoints" / "best.pt")
    _call(["evaluate", "multiscale_classifier", *common, "--ckpt_path", best], folder)
    text = (folder / "evaluation" / "test" / "test_metrics.yaml").read_text(encoding="utf-8")
    figures = yaml.safe_load(text)["pooled_metrics"]
    return spent_s, {size: figures[f"accuracy_{size}"] for size in SIZES}


def _call(arguments: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{arguments[0]}.log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "pipeline", *arguments]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    root = os.environ.get("LAMINA_DATA")
    bees = Path(root, "classification", "pollen_bees") if root else None
    parser.add_argument("--dataset_dir", default=bees, required=bees is None)
    parser.add_argument("--output_dir", default="runs/multiscale_bees")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    return parser.parse_args()


if __name__ == "__main__":
    main()
