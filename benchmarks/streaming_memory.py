"""What streaming a volume holds in memory, beside MONAI's inferer on the whole volume.

    python benchmarks/streaming_memory.py [--repeats 3] [--size 320] [--patch 96]

A uint8 Zarr volume and a null network, which copies its input, so that nothing but the volume, its
sums and its result take memory. Each side runs in a process of its own with a clean allocator
environment, left as it is on every side, and one thread, in turn; the figure is the peak of the
resident memory above what the process held after a warm-up on one window, medians. MONAI reads the
volume, converts it to float32 and keeps the result; streaming also writes it, in chunks as deep as
the stride. The plan's own estimate stands beside it, and its excess over the measured peak is what
a person can trust. Linux only: the peak is reset through /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from monai.inferers import SlidingWindowInferer

from pipeline.inference.sliding_window import SlidingWindow
from pipeline.inference.streaming import VolumeStream

OVERLAP = 0.5
SIDES = {
    "monai": "MONAI gaussian, in memory",
    "separable": "streamed, separable",
    "gaussian": "streamed, gaussian",
}
TARGET, TARGET_GROWTH = 0.55, 0.10  # of MONAI's extra memory; change with twice the depth
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "LD_PRELOAD")


def main() -> None:
    options = _options()
    if options.side:
        print(json.dumps(_run_side(options)))
        return
    runs = [(side, 1) for side in SIDES] + [("separable", 2), ("gaussian", 2)]
    found: dict[tuple[str, int], list[dict[str, float]]] = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        for factor in (1, 2):
            _write_volume(Path(folder) / f"depth_{factor}.zarr", factor * options.size, options)
        for _ in range(options.repeats):
            for side, factor in runs:
                found[side, factor].append(_in_own_process(side, factor, Path(folder), options))
    medians = {
        run: {key: statistics.median(one[key] for one in ones) for key in ones[0]}
        for run, ones in found.items()
    }
    base = medians["monai", 1]["mib"]
    print(f"null network, {options.size}^3 uint8 Zarr, windows of {options.patch}^3, overlap "
          f"{OVERLAP}, one thread, median of {options.repeats}")  # fmt: skip
    print(f"{'side':<28}{'depth':>7}{'extra MiB':>11}{'ratio':>8}{'planned':>9}{'CPU s':>8}")
    for (side, factor), run in medians.items():
        planned = f"{run['planned']:.0f}" if side != "monai" else "-"
        print(f"{SIDES[side]:<28}{factor * options.size:>7}{run['mib']:>11.0f}"
              f"{run['mib'] / base:>8.2f}{planned:>9}{run['seconds']:>8.2f}")  # fmt: skip
    ratio = medians["separable", 1]["mib"] / base
    print(f"separable, target {TARGET} of MONAI: {ratio:.2f}, {_verdict(ratio <= TARGET)}")
    for side in ("separable", "gaussian"):
        change = medians[side, 2]["mib"] / medians[side, 1]["mib"] - 1
        print(f"{side}, twice the depth, target below {TARGET_GROWTH:.0%}: {change:+.1%}, "
              f"{_verdict(change < TARGET_GROWTH)}")  # fmt: skip


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_volume(path: Path, depth: int, options: argparse.Namespace) -> None:
    shape = (depth, options.size, options.size)
    array = zarr.create_array(path, shape=shape, dtype="uint8", chunks=(64, 64, 64))
    generator = np.random.default_rng(0)
    for z in range(0, depth, 64):
        planes = min(64, depth - z)
        array[z : z + planes] = generator.integers(0, 255, (planes, *shape[1:]), np.uint8)


def _in_own_process(
    side: str, factor: int, folder: Path, options: argparse.Namespace
) -> dict[str, float]:
    environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LAMINA_TUNE_ALLOCATOR": "0"}
    command = [sys.executable, __file__, "--side", side, "--patch", str(options.patch)]
    command += ["--source", str(folder / f"depth_{factor}.zarr")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def _run_side(options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    roi = (options.patch,) * 3
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.npy"
        np.save(small, np.zeros((options.patch + 8, options.patch, options.patch), np.uint8))
        _compute(options.side, small, Path(folder) / "small.zarr", roi)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        resting, before = _memory_mib("VmRSS"), time.process_time()
        planned = _compute(options.side, options.source, Path(folder) / "result.zarr", roi)
        seconds = time.process_time() - before
        return {
            "mib": _memory_mib("VmHWM") - resting,
            "planned": planned / 2**20,
            "seconds": seconds,
        }


def _compute(side: str, source: Path, target: Path, roi: tuple[int, ...]) -> int:
    """Run one side and return what was planned, in bytes."""
    if side == "monai":
        array: Any = np.load(source) if source.suffix == ".npy" else zarr.open_array(source)[:]
        volume = torch.from_numpy(array)[None, None].float()
        del array
        SlidingWindowInferer(roi, 1, OVERLAP, mode="gaussian")(volume, torch.clone)
        return 0
    inferer = SlidingWindow(roi, OVERLAP, side)  # type: ignore[arg-type]
    chunks = (roi[0] // 2, 128, 128)
    stream = VolumeStream(
        source, target, torch.clone, inferer=inferer, chunks=chunks, levels=1, channels=1
    )
    stream.run()
    return stream.plan.memory_bytes


def _memory_mib(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
