"""What the score of a 320^3 volume costs, against the packages its parts are known from.

    python benchmarks/vesuvius_metrics.py [--repeats 3] [--size 320] [--seed 0]

One thread, CPU seconds, the least of a few repeats, both sides in the same run on the same pair:
curved sheets, ten voxels apart, truth and prediction as thresholds of the same noisy field, the
prediction with noise of its own (and thousands of tunnels, more than a fair one has). SurfaceDice
and VOI run against the `surface-distance` package (no dependency: `pip install surface-distance`)
and scikit-image on cc3d's labels, and must give the same values. The matched counts are set against
one Euclidean distance transform of the prediction's foreground by the `edt` package, on one thread.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cc3d
import edt
import numpy as np
import psutil
from numpy.typing import NDArray
from scipy import ndimage
from skimage.metrics import variation_of_information as skimage_voi

from pipeline.vesuvius.metrics import surface_dice, topology_score, variation_of_information

Mask = NDArray[np.bool_]
Result = TypeVar("Result")


def main() -> None:
    options = _options()
    prediction, truth = _pair(options.size, options.seed)
    print(
        f"{options.size}^3, seed {options.seed}, foreground {prediction.mean():.3f} predicted, "
        f"{truth.mean():.3f} true; least of {options.repeats} runs"
    )
    corner = tuple(slice(0, 40) for _ in range(3))
    seconds, _ = _least(lambda: _ours(prediction[corner], truth[corner]), 1)
    more, _ = _least(lambda: topology_score(prediction[corner], truth[corner]), 1)
    print(f"first call on 40^3, compiling or loading what an earlier run compiled: "
          f"{seconds + more:.2f} CPU s")  # fmt: skip
    # First, while no freed memory is kept that could be used again unseen.
    peak_mb = _peak_mb(lambda: topology_score(prediction, truth))
    _compare_surfaces(prediction, truth, options)
    _compare_topology(prediction, truth, peak_mb, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _pair(size: int, seed: int) -> tuple[Mask, Mask]:
    """Return prediction and truth: wavy sheets as a rough network might see them."""
    rng = np.random.default_rng(seed)

    def noise(shape: tuple[int, ...], sigma: float) -> NDArray[np.float32]:
        field = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma)
        return field / field.std()

    height = np.arange(size)[:, None] + 8 * noise((size, size), 24)[:, None]
    distance = np.abs(height % 10 - 5).astype(np.float32)  # to the middle of the nearest sheet
    seen = distance + 0.35 * noise((size,) * 3, 1.5)
    truth = seen < 1.3
    seen += 0.35 * noise((size,) * 3, 1.0)
    return seen < 1.4, truth


def _compare_surfaces(prediction: Mask, truth: Mask, options: argparse.Namespace) -> None:
    ours, own_values = _least(lambda: _ours(prediction, truth), options.repeats)
    dice, _ = _least(lambda: surface_dice(prediction, truth), options.repeats)
    theirs, peer_values = _least(lambda: _peers(prediction, truth), min(options.repeats, 2))
    np.testing.assert_allclose(own_values, peer_values, rtol=0, atol=1e-9)
    print(f"SurfaceDice {own_values[0]:.6f}, VOI split {own_values[1]:.6f}, "
          f"merge {own_values[2]:.6f}: the same by both to 1e-9")  # fmt: skip
    print(f"SurfaceDice + VOI: {ours:.2f} CPU s ({dice:.2f} + {ours - dice:.2f}); surface-distance "
          f"and skimage {theirs:.2f}; {theirs / ours:.1f} times as fast")  # fmt: skip


def _compare_topology(
    prediction: Mask, truth: Mask, peak_mb: float, options: argparse.Namespace
) -> None:
    transform, _ = _least(lambda: edt.edt(prediction, parallel=1), options.repeats)
    seconds, topology = _least(lambda: topology_score(prediction, truth), options.repeats)
    bound, _ = _least(lambda: topology_score(prediction, truth, matching=False), options.repeats)
    print(f"counts (matched, predicted, truth): {topology['counts']}, "
          f"score {topology['score']:.4f}, upper bound {topology['upper_bound']:.4f}")  # fmt: skip
    print(f"matched counts: {seconds:.2f} CPU s, {peak_mb:.0f} MB; one EDT {transform:.2f} CPU s; "
          f"{seconds / transform:.1f} EDTs; the bound alone {bound:.2f} CPU s")  # fmt: skip


def _ours(prediction: Mask, truth: Mask) -> tuple[float, float, float]:
    voi = variation_of_information(prediction, truth)
    return surface_dice(prediction, truth), voi["voi_split"], voi["voi_merge"]


def _peers(prediction: Mask, truth: Mask) -> tuple[float, float, float]:
    try:
        import surface_distance as peer
    except ImportError as error:
        raise SystemExit("the comparison needs `pip install surface-distance`") from error
    distances = peer.compute_surface_distances(truth, prediction, (1, 1, 1))
    dice = peer.compute_surface_dice_at_tolerance(distances, 2.0)
    either = prediction | truth
    labels = [cc3d.connected_components(mask, connectivity=26) for mask in (truth, prediction)]
    split, merge = skimage_voi(*[label[either].astype(np.int64) for label in labels])
    return float(dice), float(split), float(merge)


def _least(call: Callable[[], Result], repeats: int) -> tuple[float, Result]:
    """Return the least CPU time of some calls, and what the last one returned."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        seconds.append(time.process_time() - start)
    return min(seconds), result


def _peak_mb(call: Callable[[], Any]) -> float:
    """Return by how much the memory of this process grows while `call` runs, at the most."""
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    peaks = [before]

    def watch() -> None:
        while not done.wait(0.002):
            peaks[0] = max(peaks[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return (peaks[0] - before) / 1e6


if __name__ == "__main__":
    main()
