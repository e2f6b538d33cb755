"""From a file to the repaired surface, and from a volume larger than memory to a mask, by stage.

    python benchmarks/surface_end_to_end.py [--size 320] [--threads 2] [--backend torch]
        [--shape 1472 288 288] [--allowed_mb 480] [--ckpt_path best.pt]

First `pipeline predict vesuvius_surface` on a drawn scroll of `size`^3, a TIFF: per stage what its
sidecar says, wall and CPU seconds, and the peak of the resident memory. Then the same command on a
Zarr volume of `shape` in float32, in a process that may take no more than `allowed_mb` of data
beyond libraries and weights (`RLIMIT_DATA`, as `ulimit -d` sets it), less than the volume has.
`stream` is `auto` and notices; the result is a Zarr mask, without repair. That the volume as a
whole does not fit under the limit is tried first. Windows are smaller here, since those of the
default take more memory than so small a limit leaves.

Each runs in a process of its own. The scroll is a phantom of half the side with its mirror images
around it. The weights are those of the bundle, or of two epochs of `quick` training where it ships
none: times do not depend on them, except for the repair's. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

MB = 10**6
CHUNK = 64
LARGE = ["--patch_size", "[64, 64, 64]", "--overlap", "0.125"]  # of the volume under the limit


def main() -> None:
    options = _options()
    if options.child:
        _run_child(options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = options.ckpt_path or _checkpoint(folder)
        half = _phantom(options.size // 2)
        scroll = folder / "scroll.tif"
        _write_tiff(scroll, np.pad(half, [(0, n) for n in half.shape], mode="symmetric"))
        found = _in_own_process("memory", scroll, folder / "tiff", checkpoint, options)
        _print_stages(f"{options.size}^3 uint8 TIFF, repaired", found, options)
        large = folder / "large.zarr"
        _write_zarr(large, half, options.shape)
        found = _in_own_process("streamed", large, folder / "zarr", checkpoint, options)
        size = " x ".join(map(str, options.shape))
        _print_stages(f"{size} float32 Zarr, streamed", found, options)
        _print_limit(found, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--shape", type=int, nargs=3, default=(1472, 288, 288))
    parser.add_argument("--allowed_mb", type=int, default=480)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--ckpt_path", type=Path)
    parser.add_argument("--child", choices=("memory", "streamed"), help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _checkpoint(folder: Path) -> Path:
    """Return the shipped weights, or some that were trained for seconds."""
    from pipeline.bundles import find_bundle_root, run_bundle

    shipped = Path(find_bundle_root("vesuvius_surface")) / "models" / "model.pt"
    if shipped.exists():
        return shipped
    settings = {"output_dir": str(folder / "run"), "max_epochs": 2, "device": "cpu"}
    run_bundle("vesuvius_surface", "train", ["quick"], **settings)
    return folder / "run" / "checkpoints" / "best.pt"


def _phantom(side: int) -> NDArray[np.uint8]:
    from pipeline.vesuvius.phantom import scroll_phantom

    return scroll_phantom(7, (side, side, side), "medium").image


def _write_tiff(path: Path, volume: NDArray[np.uint8]) -> None:
    from pipeline.data.writers import write_tiff

    write_tiff(path, volume)


def _write_zarr(path: Path, tile: NDArray[np.uint8], shape: Sequence[int]) -> None:
    """Write mirrored tiles, some planes at a time."""
    from pipeline.data.ome_zarr import create_ome_zarr

    array = create_ome_zarr(path, shape, "float32", (CHUNK,) * 3, spacing=(8, 8, 8))
    mirrored = np.concatenate([np.arange(len(tile)), np.arange(len(tile))[::-1]])
    z, y, x = (np.resize(mirrored, length) for length in shape)
    for begin in range(0, shape[0], CHUNK):
        planes = tile[np.ix_(z[begin : begin + CHUNK], y, x)]
        array[begin : begin + CHUNK] = planes.astype(np.float32)


def _in_own_process(
    child: str, source: Path, output: Path, checkpoint: Path, options: argparse.Namespace
) -> dict[str, Any]:
    # One arena: glibc's for every thread would make the peak a matter of chance.
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, __file__, "--child", child, "--source", str(source)]
    command += ["--output", str(output), "--ckpt_path", str(checkpoint)]
    command += ["--backend", options.backend, "--allowed_mb", str(options.allowed_mb)]
    begun = time.perf_counter()
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return {**found, "wall": time.perf_counter() - begun}


def _run_child(options: argparse.Namespace) -> None:
    """Run the command line in this process, and say what each stage took."""
    from pipeline.cli import main as command_line
    from pipeline.inference.stages import StageClock

    peaks: dict[str, float] = {}
    lap = StageClock.lap

    def observed(self: StageClock, stage: str) -> None:
        lap(self, stage)
        peaks[stage] = max(peaks.get(stage, 0), _status_mb("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # the next stage has a peak of its own

    StageClock.lap = observed  # type: ignore[method-assign]
    arguments = ["predict", "vesuvius_surface", "-i", str(options.source), "-o"]
    arguments += [str(options.output), "--ckpt_path", str(options.ckpt_path), "--device", "cpu"]
    arguments += ["--backend", options.backend]
    said: list[str] = []
    if options.child == "streamed":
        _limit_when_reading(options.source, options.allowed_mb * MB, said)
        arguments += LARGE
    code = command_line(arguments)
    sidecar = json.loads(options.output.joinpath(f"{options.source.stem}.json").read_text())
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = {key: sidecar[key] for key in ("seconds", "cpu_seconds", "foreground_percent", "used")}
    found |= {"windows": sidecar.get("streamed", {}).get("windows"), "shape": sidecar["shape"]}
    found |= {
        "results": sidecar["results"],
        "peaks": peaks,
        "code": code,
        "reading": " ".join(said),
    }
    print(json.dumps({**found, "cpu": usage.ru_utime + usage.ru_stime}))


def _limit_when_reading(source: Path, allowed_bytes: int, said: list[str]) -> None:
    """Set the limit when everything is loaded, and note that the volume does not fit under it."""
    from pipeline.data.volumes import open_volume
    from pipeline.vesuvius.reading import ReadVolume

    read = ReadVolume.__call__

    def limited(self: ReadVolume, data: Any) -> Any:
        held = psutil.Process().memory_info().data
        resource.setrlimit(resource.RLIMIT_DATA, (held + allowed_bytes,) * 2)
        with open_volume(source) as volume:
            try:
                np.ones(volume.shape, volume.dtype)
                said.append("possible: the limit is too high to show anything")
            except MemoryError as error:
                said.append(f"MemoryError: {error}")
        return read(self, data)

    ReadVolume.__call__ = limited  # type: ignore[method-assign]


def _status_mb(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) * 1024 / MB


def _print_stages(title: str, found: dict[str, Any], options: argparse.Namespace) -> None:
    backend = found["used"]["name"]
    print(f"{title}; {options.threads} threads, {backend}, {found['foreground_percent']} % surface")
    print(f"{'stage':<12}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}")
    for stage, seconds in found["seconds"].items():
        print(
            f"{stage:<12}{seconds:>9.1f}{found['cpu_seconds'][stage]:>9.1f}"
            f"{found['peaks'][stage]:>9.0f}"
        )
    peak = max(found["peaks"].values())
    print(f"{'command':<12}{found['wall']:>9.1f}{found['cpu']:>9.1f}{peak:>9.0f}\n")


def _print_limit(found: dict[str, Any], options: argparse.Namespace) -> None:
    size = np.prod(found["shape"]) * 4 / MB
    print(f"the volume has {size:.0f} MB, the process may take {options.allowed_mb} MB")
    print(f"reading it whole: {found['reading']}")
    print(f"{found['windows']} windows; written: {', '.join(found['results'])}")
    met = size > options.allowed_mb and found["reading"].startswith("MemoryError")
    print(f"target, a Zarr mask of a volume larger than memory: {'met' if met else 'MISSED'}")


if __name__ == "__main__":
    main()
