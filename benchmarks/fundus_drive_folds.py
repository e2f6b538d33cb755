"""Out-of-fold vessel scores over the 20 training photographs of DRIVE, beside Frangi's filter.

    python benchmarks/fundus_drive_folds.py --dataset_dir DRIVE [--folds 0 1] [--max_epochs 60]

Each fold trains on 16 photographs and scores the other 4 with the last averaged weights
(`swa.pt`), so that no epoch is picked on the photographs that are scored. Its threshold is
the mean of those that the other folds chose. Frangi's filter (scikit-image, on the inverted
green channel) gets the threshold that is best on the 16. All scores are inside the field of view.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import yaml
from skimage.filters import frangi

from pipeline.bundles import run_bundle
from pipeline.data.folds import split_samples
from pipeline.data.images import read_image
from pipeline.data.labels import read_label, read_mask
from pipeline.data.manifests import find_samples, load_manifest
from pipeline.data.samples import Sample
from pipeline.data.writers import result_path
from pipeline.fundus.metrics import Case, choose_threshold, pooled_metrics, vessel_metrics
from pipeline.training.checkpoints import read_checkpoint

BUNDLE = "fundus_vessels"
SEED = 42  # deals the folds, too


def main() -> None:
    options = _options()
    samples = find_samples(load_manifest("drive"), options.dataset_dir)
    started, cpu = time.monotonic(), time.process_time()
    for fold in options.folds:
        _train(fold, options)
    print(f"trained in {time.monotonic() - started:.0f} s, {time.process_time() - cpu:.0f} CPU s")

    thresholds = {k: read_checkpoint(_weights(k, options))["threshold"] for k in options.folds}
    network: list[Case] = []
    filtered: list[tuple[Case, float]] = []
    for fold in options.folds:
        split = split_samples(samples, load_manifest("drive"), fold, SEED)
        others = [thresholds[k] for k in options.folds if k != fold] or [0.5]
        network += _evaluated(fold, split.val, statistics.mean(others), options)
        threshold = choose_threshold([_frangi(sample) for sample in split.train])
        filtered += [(_frangi(sample), threshold) for sample in split.val]
    masked = [((p >= t).astype(np.float32), label, fov) for (p, label, fov), t in filtered]
    report = {"fundus_vessels": _scores(network), "frangi": _scores(masked)}
    report["fundus_vessels"]["auc"] = statistics.mean(_auc(fold, options) for fold in options.folds)
    print(f"{len(network)} photographs out of fold; thresholds chosen by fold: {thresholds}")
    for name, scores in report.items():
        print(f"{name:15s} " + "  ".join(f"{key} {value:.4f}" for key, value in scores.items()))
    (options.output_dir / "folds.json").write_text(json.dumps(report, indent=2))


def _options() -> argparse.Namespace:
    data = os.environ.get("LAMINA_DATA")
    drive = Path(data) / "fundus" / "DRIVE" if data else None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_dir", type=Path, default=drive, required=drive is None)
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--max_epochs", type=int, default=60)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/drive_folds"))
    return parser.parse_args()


def _train(fold: int, options: argparse.Namespace) -> None:
    if _weights(fold, options).exists():  # an interrupted benchmark goes on with the next fold
        return
    run_bundle(
        BUNDLE,
        "train",
        dataset_dir=str(options.dataset_dir),
        manifest="drive",
        fold=fold,
        seed=SEED,
        fold_seed=SEED,
        max_epochs=options.max_epochs,
        output_dir=str(options.output_dir / f"fold_{fold}"),
        threads=1,
        log_images=False,
        **{"early_stopping::enabled": False},
    )


def _weights(fold: int, options: argparse.Namespace) -> Path:
    folder: Path = options.output_dir / f"fold_{fold}"
    return folder / "checkpoints" / "swa.pt"


def _evaluated(
    fold: int, samples: list[Sample], threshold: float, options: argparse.Namespace
) -> list[Case]:
    """Score a fold through the bundle and return its masks, as it wrote them."""
    folder = options.output_dir / f"fold_{fold}" / "evaluation"
    run_bundle(
        BUNDLE,
        "evaluate",
        dataset_dir=str(options.dataset_dir),
        manifest="drive",
        fold=fold,
        fold_seed=SEED,
        split="val",
        threshold=threshold,
        ckpt_path=str(_weights(fold, options)),
        output_dir=str(options.output_dir / f"fold_{fold}"),
        evaluation_dir=str(folder),
        tensorboard=False,
    )
    cases: list[Case] = []
    for sample in samples:
        mask = read_image(result_path(sample.relative, ".", folder / "predictions", ".png")) > 127
        cases.append((mask.astype(np.float32), *_truth(sample)))
    return cases


def _auc(fold: int, options: argparse.Namespace) -> float:
    """Return the pooled AUC of a fold, as its evaluation wrote it."""
    table = options.output_dir / f"fold_{fold}" / "evaluation" / "test_metrics.yaml"
    auc: float = yaml.safe_load(table.read_text())["pooled_metrics"]["auc"]
    return auc


def _truth(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    assert sample.label is not None
    assert sample.fov is not None
    return read_label(sample.label) > 0, read_mask(sample.fov)


def _frangi(sample: Sample) -> Case:
    """Return Frangi's vesselness of the green channel, scaled to 0..1 by rank inside the FOV."""
    label, fov = _truth(sample)
    green = read_image(sample.image)[..., 1].astype(np.float64)
    green[~fov] = np.median(green[fov])
    vesselness = frangi(green, sigmas=(1, 2, 3), black_ridges=True)
    ranks = np.zeros(fov.shape, dtype=np.float32)
    ranks[fov] = np.argsort(np.argsort(vesselness[fov])) / fov.sum()
    # A vessel share of about 12 % lies in the top ranks: spread them over the threshold grid.
    return np.clip((ranks - 0.75) / 0.25, 0, 1).astype(np.float32), label, fov


def _scores(cases: list[Case]) -> dict[str, float]:
    pooled = pooled_metrics(cases)
    means = [vessel_metrics(*case)["dice"] for case in cases]
    return {
        "dice_pooled": pooled["dice"],
        "dice_mean": statistics.mean(means),
        "dice_min": min(means),
        "sensitivity": pooled["sensitivity"],
        "specificity": pooled["specificity"],
        "cldice": pooled["cldice"],
    }


if __name__ == "__main__":
    main()
