"""A volume of 61 B-scans of 496 x 768, from a HEYEX `.vol` file to HDF5, and where the time goes.

    python benchmarks/oct_volume.py [--bscans 61] [--backend torch]

The volume is drawn (a phantom), the weights are the shipped ones, and the run is what
`python -m pipeline predict oct_layers` does, in a process of its own with two threads, pictures and
tables included. OCTolyzer states about 85 s for a volume of this size on its authors' machine, for
more boundaries and a thickness report: another task on another machine, quoted and not measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.oct.heyex_vol import write_vol
from pipeline.oct.phantom import oct_phantom

OCTOLYZER_S = 85  # published by its README


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = _volume(root / "eye.vol", options.bscans)
        wall_s, cpu_s = _predict(source, root / "layers", options.backend)
        sidecar = json.loads((root / "layers" / "eye.json").read_text("utf-8"))
        size_mb = (root / "layers" / "eye.h5").stat().st_size / 1e6
    seconds = sidecar["seconds"]
    total = sum(seconds.values())
    print(f"{options.bscans} x 496 x 768, backend {options.backend}, HDF5 of {size_mb:.0f} MB")
    print(f"whole command: {wall_s:.1f} s, {cpu_s:.1f} CPU s; of that on the file {total:.1f} s")
    for stage, spent_s in seconds.items():
        print(f"  {stage:8s} {spent_s:6.1f} s  {100 * spent_s / total:4.0f} %")
    print(f"OCTolyzer, published: about {OCTOLYZER_S} s on another machine")


def _volume(path: Path, bscans: int) -> Path:
    """Draw four B-scans and write them in turn: drawing takes longer than finding their rows."""
    drawn = [oct_phantom(seed, (496, 768)).image / np.float32(255) for seed in range(4)]
    stack = np.stack([drawn[index % len(drawn)] for index in range(bscans)])
    scales = {"scale_x_um": 11.6, "scale_y_um": 3.87, "spacing_um": 120.0}
    return write_vol(path, stack, laterality="OD", scan_pattern="volume", **scales)


def _predict(source: Path, target: Path, backend: str) -> tuple[float, float]:
    command = [sys.executable, "-m", "pipeline", "predict", "oct_layers"]
    command += ["-i", str(source), "-o", str(target), "--backend", backend]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall_s = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bscans", type=int, default=61)
    parser.add_argument("--backend", default="torch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
