"""insect_pests on photographs, on a data set of IP102's shape, and in ever smaller memories.

    python benchmarks/insect_pests_devices.py [--dataset_dir hymenoptera] [--epochs 60]

First the small network, from random weights, on 245 photographs of ants and bees; the other 153 are
scored with the averaged weights of the last epoch, so that none of them chooses anything. Then on
drawn insects of 102 classes, the largest 80 times the smallest, as the classes of IP102 are: the
epoch is chosen by the macro-F1 of validation, the test images are scored once, with the classes as
they are and with logit adjustment. Beside each stands the share of the most frequent class, which
is what a guess without looking is worth. At last the same short training with less and less memory
allowed: how the plan divides the batch, and how far the loss of any epoch is from the undivided.

Everything is computed on the CPU by one thread. Times are CPU seconds of training and validation.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from pipeline.bundles import run_bundle
from pipeline.classification.phantom import write_phantom_dataset
from pipeline.training.checkpoints import read_checkpoint

BUNDLE = "insect_pests"
HERE: dict[str, Any] = {"device": "cpu", "threads": 1, "tensorboard": False}
IP102_SHAPE: dict[str, Any] = {  # the shares of IP102's splits
    "counts": {"train": 3000, "val": 500, "test": 1500},
    "classes": 102,
    "imbalance": 80,
    "size_px": 64,
}
EFFECTIVE = 32
SHARES = (1.0, 0.8, 0.7, 0.51)  # of the memory that the undivided batch takes


def main() -> None:
    options = _options()
    absent = "ants and bees: neither --dataset_dir nor $LAMINA_DATA says where they are"
    scores = [absent if options.dataset_dir is None else _photographs(options), _drawn(options)]
    memories = _memories(options)
    print("\nset                        images  classes  most frequent  accuracy  balanced"
          "  macro-F1  epoch  CPU s")  # fmt: skip
    print("\n".join(scores))
    print("\nmemory  effective batch  batch x steps  estimated MB  loss, largest relative change")
    print("\n".join(memories))


def _options() -> argparse.Namespace:
    data = os.environ.get("LAMINA_DATA")
    photographs = Path(data) / "classification" / "hymenoptera" if data else None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_dir", type=Path, default=photographs)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/insect_pests"))
    parser.add_argument("--epochs", type=int, default=60, help="of ants and bees")
    parser.add_argument("--drawn_epochs", type=int, default=15, help="of the drawn insects")
    return parser.parse_args()


def _photographs(options: argparse.Namespace) -> str:
    data = {"dataset_dir": str(options.dataset_dir), "manifest": "hymenoptera"}
    data |= {"image_size_px": 96, "cache_rate": 0.0}
    settings = {"max_epochs": options.epochs, "early_stopping::enabled": False}
    run = options.output_dir / "hymenoptera"
    return _row("ants and bees, 96 px", run, data, settings, "swa", "val")


def _drawn(options: argparse.Namespace) -> str:
    folder = write_phantom_dataset(options.output_dir / "phantom", **IP102_SHAPE)
    data = {"dataset_dir": str(folder), "manifest": "split_lists", "image_size_px": 64}
    settings = {"max_epochs": options.drawn_epochs}
    return _row("drawn, 64 px", options.output_dir / "drawn", data, settings, "best", "test")


def _row(
    name: str, run: Path, data: dict[str, Any], settings: dict[str, Any], weights: str, split: str
) -> str:
    """Train, score a split and return a row of the table."""
    before = time.process_time()
    run_bundle(BUNDLE, "train", output_dir=str(run), **HERE, **data, **settings)
    spent_s = time.process_time() - before
    checkpoint = run / "checkpoints" / f"{weights}.pt"
    run_bundle(
        BUNDLE, "evaluate", output_dir=str(run), ckpt_path=str(checkpoint), split=split,
        save_predictions=False, **HERE, **data,
    )  # fmt: skip
    scored = run / "evaluation" / split
    figures = _loaded(scored / "test_metrics.yaml")
    found = figures["pooled_metrics"]
    truth = Counter(row["truth"] for row in _loaded(scored / "per_image_metrics.yaml"))
    images = sum(truth.values())
    frequent = truth.most_common(1)[0][1] / images
    return (
        f"{name:26} {images:6} {figures['classes']:8} {frequent:14.1%} {found['accuracy']:9.1%}"
        f" {found['balanced_accuracy']:9.1%} {found['macro_f1']:9.3f} {figures['epoch']:6}"
        f" {spent_s:6.0f}"
    )


def _memories(options: argparse.Namespace) -> list[str]:
    """Return how a batch is divided by less and less memory, and what becomes of the losses."""
    counts = {"train": 150, "val": 10}  # the last update of an epoch is a smaller one
    folder = write_phantom_dataset(options.output_dir / "few", counts, classes=4, size_px=64)
    data = {"dataset_dir": str(folder), "manifest": "split_lists", "image_size_px": 64}
    whole: dict[str, Any] = {}
    expected: list[float] = []
    lines = []
    for share in SHARES:
        run = options.output_dir / f"memory_{share:g}"
        limit = {"memory_limit_bytes": int(whole["estimated_bytes"] * share)} if whole else {}
        run_bundle(
            BUNDLE, "train", output_dir=str(run), resume=False, max_epochs=3,
            effective_batch_size=EFFECTIVE, **HERE, **data, **limit,
        )  # fmt: skip
        plan = read_checkpoint(run / "checkpoints" / "last.pt")["plan"]
        rows = _loaded(run / "metrics_history.yaml")
        losses = [loss for row in rows for loss in (row["train"]["loss"], row["val"]["val_loss"])]
        whole, expected = whole or plan, expected or losses
        apart = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
        division = f"{plan['batch_size']} x {plan['accumulation_steps']}"
        lines.append(
            f"{share:6.0%} {plan['effective_batch_size']:16} {division:>14}"
            f" {plan['estimated_bytes'] / 1e6:13.1f} {apart:29.1e}"
        )
    return lines


def _loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
