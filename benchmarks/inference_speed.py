"""One network over one volume: MONAI's sliding window beside this project's engine and backends.

    python benchmarks/inference_speed.py [--repeats 3] [--size 192] [--patch 96]

The same network, windows and weights on every side; each side in a process of its own with a clean
allocator environment and one thread, in turn; CPU seconds (user and system) of a whole volume after
one window of warm-up, medians. Both baselines are MONAI's SlidingWindowInferer in eager torch: as
it is, and with the allocator tuned. Agreement is that of the outputs with the first baseline's.

What bfloat16 changes is measured on a trained network, the shipped weights of fundus_vessels, on
drawn photographs (the phantom) that it has not seen: sign flips of the logit, and Dice beside the
truth. Times depend on the machine; the ratios are the claim.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import BasicUNet

from pipeline.bundles import load_bundle
from pipeline.fundus.metrics import vessel_metrics
from pipeline.fundus.phantom import fundus_phantom
from pipeline.hardware.allocator import tune_allocator
from pipeline.inference.backends import Backend
from pipeline.inference.sliding_window import SlidingWindow

OVERLAP = 0.25
SIDES = {
    "monai": "MONAI, eager",
    "monai_tuned": "MONAI, eager, allocator tuned",
    "default": "this engine, default settings",
    "openvino": "this engine, OpenVINO f32",
    "openvino_bf16": "this engine, OpenVINO bf16",
}
TARGETS = {"default": 1.8, "openvino": 3.0, "openvino_bf16": 5.0}  # times as fast as `monai`
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "LD_PRELOAD")


def main() -> None:
    options = _options()
    if options.side:
        print(json.dumps(_run_side(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for repeat in range(options.repeats):
            for side in SIDES:
                times[side].append(_in_own_process(side, Path(folder), options))
                print(f"  repeat {repeat + 1}: {SIDES[side]}: {times[side][-1]:.2f} s", flush=True)
        _print_table(times, Path(folder), options)
    _print_precision()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_own_process(side: str, folder: Path, options: argparse.Namespace) -> float:
    environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    command += ["--size", str(options.size), "--patch", str(options.patch)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(run.stdout.splitlines()[-1])["seconds"])


def _run_side(options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = BasicUNet(3, 1, 1, features=(16, 16, 32, 32, 32, 16)).eval()
    volume = torch.randn((1, 1, *[options.size] * 3))
    inferer = _inferer(options.side, (options.patch,) * 3, options.folder)
    corner = volume[:, :, : options.patch, : options.patch, : options.patch]
    with torch.inference_mode():
        inferer(corner, network)
        before = _cpu_seconds()
        output = inferer(volume, network)
        seconds = _cpu_seconds() - before
    np.save(options.folder / f"{options.side}.npy", output.numpy())
    return {"seconds": seconds}


def _inferer(side: str, roi: tuple[int, ...], folder: Path) -> Any:
    if side.startswith("monai"):
        if side == "monai_tuned":
            tune_allocator()
        return SlidingWindowInferer(roi, 1, OVERLAP, mode="gaussian")
    if side == "default":
        return SlidingWindow(roi, OVERLAP)
    precision = "bfloat16" if side.endswith("bf16") else "float32"
    return SlidingWindow(
        roi, OVERLAP, backend=Backend("openvino", precision, cache_dir=str(folder))
    )


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _print_table(times: dict[str, list[float]], folder: Path, options: argparse.Namespace) -> None:
    medians = {side: statistics.median(found) for side, found in times.items()}
    expected = np.load(folder / "monai.npy")
    print(f"\n{options.size}^3, windows of {options.patch}^3, overlap {OVERLAP}, one thread, "
          f"CPU seconds, median of {options.repeats}")  # fmt: skip
    print(f"{'side':<34}{'s':>8}{'x MONAI':>9}{'x tuned':>9}{'max diff':>10}{'flips':>10}  target")
    for side, name in SIDES.items():
        found = np.load(folder / f"{side}.npy")
        speed = medians["monai"] / medians[side]
        target = TARGETS.get(side)
        verdict = "" if target is None else f"{target} {'met' if speed >= target else 'MISSED'}"
        print(f"{name:<34}{medians[side]:>8.2f}{speed:>9.2f}"
              f"{medians['monai_tuned'] / medians[side]:>9.2f}"
              f"{np.abs(found - expected).max():>10.1e}"
              f"{((found > 0) != (expected > 0)).mean():>10.2e}  {verdict}")  # fmt: skip


def _print_precision(photographs: int = 6) -> None:
    found = {
        name: load_bundle("fundus_vessels", backend=backend, precision=precision)
        for name, backend, precision in (
            ("torch f32", "torch", "float32"),
            ("OpenVINO f32", "openvino", "float32"),
            ("OpenVINO bf16", "openvino", "bfloat16"),
        )
    }
    print(f"\ntrained network (fundus_vessels, shipped weights) on {photographs} drawn photographs")
    print(f"{'backend':<16}{'Dice':>8}{'change':>10}{'sign flips in the FOV':>24}")
    reference: list[Any] = []
    base = 0.0
    for name, bundle in found.items():
        scores, flips = [], []
        for number in range(photographs):
            drawn = fundus_phantom(seed=1000 + number)
            result = bundle(drawn.image)
            fov = drawn.fov.astype(bool)
            scores.append(vessel_metrics(result["pred"], drawn.label, fov)["dice"])
            if len(reference) == number:
                reference.append(result["pred"] >= 0.5)
            flips.append(((result["pred"] >= 0.5) != reference[number])[fov].mean())
        dice = statistics.mean(scores)
        base = base or dice
        print(f"{name:<16}{dice:>8.4f}{dice - base:>+10.5f}{statistics.mean(flips):>24.2e}")


if __name__ == "__main__":
    main()
