"""How a network stands photographs that another camera might have taken.

    python benchmarks/fundus_altered_photographs.py --dataset_dir DRIVE [CHECKPOINT ...]

DRIVE's validation photographs (37-40) are blurred, made noisy, re-exposed, tinted, flattened and
cropped to a narrower field of view; each alteration is scored like the original, pooled inside the
field of view. Without a checkpoint the shipped weights are scored. Choose augmentation by this
table, and not by a dataset that is kept to report figures on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.bundles import load_bundle
from pipeline.data.folds import split_samples
from pipeline.data.images import read_image
from pipeline.data.labels import read_label, read_mask
from pipeline.data.manifests import find_samples, load_manifest
from pipeline.fundus.metrics import pooled_metrics

Photograph = NDArray[np.float32]
Mask = NDArray[np.bool_]


def main() -> None:
    options = _options()
    manifest = load_manifest("drive")
    samples = split_samples(find_samples(manifest, options.dataset_dir), manifest).val
    cases = [
        (read_image(s.image) / np.float32(255), read_label(s.label) > 0, read_mask(s.fov))
        for s in samples
        if s.label is not None and s.fov is not None
    ]
    print(f"{'':24s}" + "".join(f"{name:>16s}" for name in (*ALTERATIONS, "narrow fov", "mean")))
    for checkpoint in options.checkpoints or [None]:
        bundle = load_bundle("fundus_vessels", ckpt_path=checkpoint)
        scores = []
        for alter in ALTERATIONS.values():
            altered = [
                (_uint8(alter(image, fov) * fov[..., None]), t, fov) for image, t, fov in cases
            ]
            scores.append(_score(bundle, altered))
        scores.append(_score(bundle, [_narrowed(*case) for case in cases]))
        scores.append(tuple(np.mean(scores, axis=0)))
        name = "shipped" if checkpoint is None else Path(checkpoint).stem
        print(f"{name:24s}" + "".join(f"{dice:>9.3f}/{auc:.4f}" for dice, auc in scores))


def _options() -> argparse.Namespace:
    data = os.environ.get("LAMINA_DATA")
    drive = Path(data) / "fundus" / "DRIVE" if data else None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="*")
    parser.add_argument("--dataset_dir", type=Path, default=drive, required=drive is None)
    return parser.parse_args()


def _noisy(image: Photograph, fov: Mask) -> Photograph:
    grain = np.random.default_rng(0).normal(0, 0.05, image.shape)
    return (image + grain).astype(np.float32)


def _flat(image: Photograph, fov: Mask) -> Photograph:
    mean = image[fov].mean(axis=0)
    return (image - mean) * np.float32(0.5) + mean


def _shaded(image: Photograph, fov: Mask) -> Photograph:
    return image * np.linspace(0.5, 1.2, image.shape[1], dtype=np.float32)[None, :, None]


def _without_detail(image: Photograph, fov: Mask) -> Photograph:
    return 0.35 * image + 0.65 * ndimage.gaussian_filter(image, (12, 12, 0))


ALTERATIONS: dict[str, Callable[[Photograph, Mask], Photograph]] = {
    "as they are": lambda image, fov: image,
    "blur": lambda image, fov: ndimage.gaussian_filter(image, (1.5, 1.5, 0)),
    "noise": _noisy,
    "gamma 0.6": lambda image, fov: image**0.6,
    "gamma 1.6": lambda image, fov: image**1.6,
    "half contrast": _flat,
    "tint": lambda image, fov: image * np.array([1.1, 0.8, 0.6], dtype=np.float32),
    "shading": _shaded,
    "weak detail": _without_detail,
}


def _narrowed(image: Photograph, truth: Mask, fov: Mask) -> tuple[NDArray[np.uint8], Mask, Mask]:
    """Return the middle three quarters of the field of view, whose vessels then look wider."""
    rows, columns = np.nonzero(fov)
    y, x = rows.mean(), columns.mean()
    radius = 0.75 * (rows.max() - rows.min()) / 2
    grid_y, grid_x = np.ogrid[: fov.shape[0], : fov.shape[1]]
    inner = ((grid_y - y) ** 2 + (grid_x - x) ** 2 < radius**2) & fov
    box = np.s_[
        int(y - radius) - 1 : int(y + radius) + 2, int(x - radius) - 1 : int(x + radius) + 2
    ]
    return _uint8(image * inner[..., None])[box], truth[box], inner[box]


def _uint8(image: Photograph) -> NDArray[np.uint8]:
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def _score(
    bundle: Callable[..., dict[str, NDArray[np.float32]]],
    cases: list[tuple[NDArray[np.uint8], Mask, Mask]],
) -> tuple[float, float]:
    maps = [(bundle(image)["pred"], truth, fov) for image, truth, fov in cases]
    pooled = pooled_metrics(maps, bundle.threshold)  # type: ignore[attr-defined]
    return pooled["dice"], pooled["auc"]


if __name__ == "__main__":
    main()
