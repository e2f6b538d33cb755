"""What the repair of a predicted 320^3 surface costs, against MONAI's transforms.

    python benchmarks/topology_repair.py [--repeats 3] [--size 320] [--seed 0]

One thread, CPU seconds, medians of a few repeats, both sides in the same run on the same volume:
wavy sheets twenty voxels apart with a rough surface, pinholes and tears where the prediction is
unsure, specks between the sheets and cavities inside them. MONAI's results must be the same, voxel
by voxel. The whole default post-processing is set against one Euclidean distance transform of the
thresholded volume by the `edt` package, which needs half the time for uint8 that it needs for bool.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import edt
import numpy as np
import torch
from monai.transforms import DistanceTransformEDT, FillHoles, RemoveSmallObjects
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.vesuvius.cavities import fill_cavities
from pipeline.vesuvius.components import remove_small_components
from pipeline.vesuvius.topology import PostProcess

Result = TypeVar("Result")
SMALL = 100
BUNDLE = {"smoothing": 1.0}  # what vesuvius_surface sets beside the chain's own defaults
WANTED = {"small components": 5, "cavities": 8, "EDT": 10}


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    probability = predicted(options.size, options.seed)
    mask = probability >= 0.5
    corner = tuple(slice(0, 48) for _ in range(3))
    first, _ = _median(lambda: PostProcess(betti=True)(probability[corner]), 1)
    print(f"{options.size}^3, seed {options.seed}, foreground {mask.mean():.3f}; medians of "
          f"{options.repeats}; first call on 48^3, compiling: {first:.1f} CPU s")  # fmt: skip
    _compare_steps(mask, options.repeats)
    _compare_chain(probability, mask, options.repeats)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def predicted(size: int, seed: int) -> NDArray[np.float32]:
    """Return the probability `(size, size, size)` that a fair network might give wavy sheets."""
    rng = np.random.default_rng(seed)

    def noise(shape: tuple[int, ...], sigma: float) -> NDArray[np.float32]:
        field = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma)
        return field / field.std()

    height = np.arange(size)[:, None] + 8 * noise((size, size), 24)[:, None]
    distance = np.abs(height % 20 - 10).astype(np.float32)  # to the middle of the nearest sheet
    logit = 3 - 2.2 * distance + np.zeros((size,) * 3, np.float32)
    logit += 0.9 * np.minimum(noise((size,) * 3, 6), 1)
    logit += 0.9 * noise((size,) * 3, 1.2)
    logit[noise((size,) * 3, 1.0) > 4.2] = 2  # specks
    cavities = noise((size,) * 3, 0.8) > 4
    logit[cavities & (ndimage.minimum_filter(logit, 3) > 1)] = -2
    return 1 / (1 + np.exp(-logit))


def _compare_steps(mask: NDArray[np.bool_], repeats: int) -> None:
    volume = torch.from_numpy(mask[None].astype(np.uint8))
    small, fill = RemoveSmallObjects(min_size=SMALL, connectivity=3), FillHoles()
    distances = DistanceTransformEDT()
    _compare(
        "small components",
        lambda: remove_small_components(mask, SMALL),
        lambda: np.asarray(small(volume.clone()))[0] != 0,
        repeats,
    )
    _compare("cavities", lambda: fill_cavities(mask),
             lambda: np.asarray(fill(volume.clone()))[0] != 0, repeats)  # fmt: skip
    _compare("EDT", lambda: edt.edt(mask.view(np.uint8), parallel=1),
             lambda: np.asarray(distances(volume.clone()))[0], repeats)  # fmt: skip


def _compare(
    name: str,
    ours: Callable[[], NDArray[np.generic]],
    theirs: Callable[[], NDArray[np.generic]],
    repeats: int,
) -> None:
    own, own_result = _median(ours, repeats)
    peer, peer_result = _median(theirs, repeats)
    np.testing.assert_allclose(own_result.astype(float), peer_result.astype(float), atol=1e-4)
    print(f"{name}: {own:.3f} CPU s, MONAI {peer:.3f}, {peer / own:.1f} times as fast "
          f"(wanted {WANTED[name]}), same result")  # fmt: skip


def _compare_chain(probability: NDArray[np.float32], mask: NDArray[np.bool_], repeats: int) -> None:
    transform, _ = _median(lambda: edt.edt(mask.view(np.uint8), parallel=1), repeats)
    repair = PostProcess(**BUNDLE)
    seconds, (_, record) = _median(lambda: repair(probability), repeats)
    bare, _ = _median(lambda: PostProcess(**BUNDLE, betti=False)(probability), repeats)
    print(f"default post-processing: {seconds:.2f} CPU s, {seconds / transform:.1f} EDTs of "
          f"{transform:.2f} s (wanted at most 20); without Betti numbers {bare:.2f} s")  # fmt: skip
    for entry in PostProcess(**BUNDLE, betti=True)(probability).record:
        betti = entry["betti_after"]["6"] if "betti_after" in entry else ""  # no mask as yet
        print(f"  {entry['step']:24s} {entry['seconds']:6.2f} s  +{entry['voxels_added']} "
              f"-{entry['voxels_removed']}  {betti}")  # fmt: skip
    assert record[-1]["betti_after"]["6"][2] == 0


def _median(call: Callable[[], Result], repeats: int) -> tuple[float, Result]:
    """Return the median CPU time of some calls, and what the last one returned."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), result


if __name__ == "__main__":
    main()
