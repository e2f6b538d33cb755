"""What cutting and blending windows costs by itself, beside MONAI, nnU-Net and TorchIO.

    python benchmarks/stitching.py [--repeats 7] [--size 256] [--patch 96]

The network is null, a copy of its input, so that nothing but stitching is left. Each side runs in a
process of its own with a clean allocator environment, left as it is on every side, and one thread,
in turn; CPU seconds of the whole call and the extra memory at its peak, medians, and the largest
difference between output and input (of values with a deviation of 1). nnU-Net and TorchIO are in
the table where they are installed. With a real network stitching is about one per cent of the time
on a CPU: this is no claim about speed there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer

from pipeline.inference.sliding_window import SlidingWindow

OVERLAP = 0.5
SIDES = {
    "monai": "MONAI gaussian",
    "gaussian": "this engine, gaussian",
    "separable": "this engine, separable",
    "nnunet": "nnU-Net",
    "torchio": "TorchIO hann",
}
PACKAGES = {"nnunet": "nnunetv2", "torchio": "torchio"}
TARGET = 0.70  # of MONAI's CPU seconds and of its extra memory, by separable weights
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "LD_PRELOAD")


def main() -> None:
    options = _options()
    if options.side:
        print(json.dumps(_run_side(options)))
        return
    sides = [side for side in SIDES if importlib.util.find_spec(PACKAGES.get(side, "monai"))]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(options.repeats):
        for side in sides:
            found[side].append(_in_own_process(side, options))
    medians = {
        side: {
            key: statistics.median(run[key] for run in runs) for key in ("seconds", "mib", "error")
        }
        for side, runs in found.items()
    }
    base = medians["monai"]
    print(f"null network, {options.size}^3, windows of {options.patch}^3, overlap {OVERLAP}, one "
          f"thread, median of {options.repeats}")  # fmt: skip
    print(f"{'side':<26}{'CPU s':>8}{'ratio':>8}{'extra MiB':>11}{'ratio':>8}{'max error':>11}")
    for side, run in medians.items():
        print(f"{SIDES[side]:<26}{run['seconds']:>8.3f}{run['seconds'] / base['seconds']:>8.2f}"
              f"{run['mib']:>11.0f}{run['mib'] / base['mib']:>8.2f}"
              f"{run['error']:>11.1e}")  # fmt: skip
    ours = medians["separable"]
    worst = max(ours[key] / base[key] for key in ("seconds", "mib"))
    print(f"separable, target {TARGET} of both: {'met' if worst <= TARGET else 'MISSED'}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_own_process(side: str, options: argparse.Namespace) -> dict[str, float]:
    environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--side", side]
    command += ["--size", str(options.size), "--patch", str(options.patch)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def _run_side(options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    call = _stitcher(options.side, (options.patch,) * 3)
    volume = torch.randn((1, 1, *[options.size] * 3), generator=torch.Generator().manual_seed(0))
    small = volume[:, :, : options.patch + 8, : options.patch, : options.patch].clone()
    with torch.inference_mode():
        call(small)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        resting = _memory_mib("VmRSS")
        before = _cpu_seconds()
        output = call(volume)
        seconds = _cpu_seconds() - before
    mib = _memory_mib("VmHWM") - resting
    return {"seconds": seconds, "mib": mib, "error": float((output - volume).abs().max())}


def _stitcher(side: str, roi: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    if side == "nnunet":
        return _nnunet(roi)
    if side == "torchio":
        return _torchio(roi)
    inferer: Any = (
        SlidingWindowInferer(roi, 1, OVERLAP, mode="gaussian")
        if side == "monai"
        else SlidingWindow(roi, OVERLAP, side, tune_allocator=False)  # type: ignore[arg-type]
    )
    return lambda volume: inferer(volume, torch.clone)


def _nnunet(roi: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(OVERLAP, True, False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.network = torch.nn.Identity()
    predictor.label_manager = type("Labels", (), {"num_segmentation_heads": 1})()
    predictor.configuration_manager = type("Configuration", (), {"patch_size": roi})()
    return lambda volume: predictor.predict_sliding_window_return_logits(volume[0])[None].float()


def _torchio(roi: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    import torchio

    overlap = tuple(int(length * OVERLAP) for length in roi)

    def stitch(volume: torch.Tensor) -> torch.Tensor:
        subject = torchio.Subject(image=torchio.ScalarImage(tensor=volume[0]))
        sampler = torchio.inference.GridSampler(subject, roi, overlap)
        aggregator = torchio.inference.GridAggregator(sampler, overlap_mode="hann")
        for patch in sampler:
            location = patch[torchio.LOCATION][None]
            aggregator.add_batch(patch["image"][torchio.DATA][None].clone(), location)
        return aggregator.get_output_tensor()[None]

    return stitch


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _memory_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    main()
