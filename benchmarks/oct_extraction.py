"""Cost of reading boundaries from logits, against the original's argmax and loop over columns.

One thread, logits `(32, 3, 480, 768)` float32 of drawn retinas with noise and islands of the wrong
class. The original takes the class of each pixel by torch's `argmax` over the channels, then looks
in a Python loop over the columns for the first change of class. Ours is all that `extract_layers`
does: ordered rows, refined, with sigma and validity. Least CPU time of some runs in one process,
taken in turn.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.oct.coordinates import extract_layers
from pipeline.oct.pixel_maps import class_mask, confidence_map

SHAPE = (32, 480, 768)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    logits, truth = drawn_logits(SHAPE, options.seed)
    tensor = torch.from_numpy(logits)
    start = time.process_time()
    extract_layers(logits[:1])
    print(f"first call, compiling or loading: {time.process_time() - start:.2f} CPU s")
    flat = np.random.default_rng(options.seed).standard_normal(logits.shape, dtype=np.float32)
    calls: dict[str, Callable[[], object]] = {
        "original: argmax": lambda: tensor.argmax(dim=1),
        "original: loop": lambda: loop_over_columns(mask),
        "map": lambda: extract_layers(tensor),
        "posterior_mean": lambda: extract_layers(tensor, "posterior_mean"),
        "viterbi": lambda: extract_layers(tensor, "viterbi"),
        "transition": lambda: extract_layers(tensor, "transition"),
        "map, logits of noise": lambda: extract_layers(flat),
        "class mask": lambda: class_mask(tensor),
        "confidence map": lambda: confidence_map(tensor),
    }
    mask = tensor.argmax(dim=1).numpy()
    seconds = _least(calls, options.repeats)
    original = seconds["original: argmax"] + seconds["original: loop"]
    print(f"{SHAPE}, seed {options.seed}, least of {options.repeats}, CPU ms per batch")
    for name, least in seconds.items():
        print(f"  {name:22} {1000 * least:8.1f}   {1000 * least / SHAPE[0]:6.2f} per image")
    print(f"  {'original, both':22} {1000 * original:8.1f}")
    print(f"map is {original / seconds['map']:.1f} times as fast as the original's path")
    _compare_errors(tensor, mask, truth)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def drawn_logits(
    shape: tuple[int, int, int], seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return logits of smooth boundaries and these, `(2, B, W)`; every image has some islands."""
    rng = np.random.default_rng(seed)
    batch, height, width = shape
    x = np.arange(width)
    phase, level = rng.uniform(0, 6, (batch, 1)), rng.uniform(0.25, 0.5, (batch, 1)) * height
    ilm = level + 0.04 * height * np.sin(x / 120 + phase)
    bm = ilm + height / 6 + 0.01 * height * np.sin(x / 60 + phase)
    truth = np.round([ilm, bm]).astype(np.int64)
    rows = np.arange(height)[:, None]
    logits = rng.standard_normal((batch, 3, height, width), dtype=np.float32)
    for image in range(batch):
        classes = (rows >= truth[0, image]).astype(int) + (rows >= truth[1, image])
        for _ in range(3):
            row, column = rng.integers(0, height - 12), rng.integers(0, width - 24)
            classes[row : row + 12, column : column + 24] = rng.integers(0, 3)
        logits[image] += 6 * (classes == np.arange(3)[:, None, None])
    return logits, truth


def loop_over_columns(mask: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return ILM and BM `(2, B, W)` by the first 0 to 1 and 1 to 2 of each column."""
    rows = np.full((2, mask.shape[0], mask.shape[2]), np.nan)
    for image in range(mask.shape[0]):
        for x in range(mask.shape[2]):
            column = mask[image, :, x]
            for boundary in range(2):
                steps = np.where((column[:-1] == boundary) & (column[1:] == boundary + 1))[0]
                if len(steps):
                    rows[boundary, image, x] = steps[0] + 1
    return rows


def _least(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    seconds = dict.fromkeys(calls, np.inf)
    for name, call in [*calls.items()] * repeats:
        start = time.process_time()
        call()
        seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def _compare_errors(
    logits: torch.Tensor, mask: NDArray[np.int64], truth: NDArray[np.int64]
) -> None:
    """Print the errors, and stop if the two ways to read the original's rows differ."""
    original = loop_over_columns(mask)
    same = extract_layers(logits, "transition")
    np.testing.assert_array_equal(original, [same.ilm_px, same.bm_px])
    print("mean absolute error in px (drawn rows), ILM and BM; columns without a row or crossing:")
    for method in ("transition", "map", "posterior_mean", "viterbi"):
        layers = extract_layers(logits, method)
        rows = np.array([layers.ilm_px, layers.bm_px])
        error = np.nanmean(np.abs(rows - truth), axis=(1, 2))
        bad = ~(rows[0] <= rows[1])
        print(f"  {method:16} {error[0]:.3f}  {error[1]:.3f}  {int(bad.sum())}")


if __name__ == "__main__":
    main()
