"""What a training sample costs when its crop is read from the file instead of cut from the volume.

    python benchmarks/crop_first.py [--repeats 5] [--size 160] [--crop 96]

Made volumes (uint8 noise with sheets, label beside it) are written as npy, as TIFF without
compression and as LZW TIFF. MONAI's chain of loading, `ScaleIntensityRangePercentilesd` and
`RandCropByPosNegLabeld` runs behind `Dataset` and `CacheDataset`; `PersistentCache` and MONAI's
`PersistentDataset` keep what comes before the crop on disk; `RandCropFromFiled` reads the crop and
scales it by cached percentiles. All draw half their crops around foreground. They take turns within
each repeat, in one process with one thread, files in the page cache. A figure is the median over
repeats of the mean time of a sample, ratios are medians of the ratios of CPU time, which other work
on the machine does not spoil, within a repeat. Filling the caches is timed apart. Times depend on
the machine; the ratios are the claim.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from monai.data import CacheDataset, Dataset, PersistentDataset
from monai.transforms import (
    Compose,
    LoadImaged,
    RandCropByPosNegLabeld,
    ScaleIntensityRangePercentilesd,
)

from pipeline.data.crops import RandCropFromFiled, ScaleByPercentilesd
from pipeline.data.persistent_cache import PersistentCache
from pipeline.data.volume_statistics import class_index_cache, percentile_cache

KEYS = ["image", "label"]
LOW, HIGH = 0.5, 99.5
FIRST, OURS = "Dataset", "RandCropFromFiled"
FORMATS: dict[str, tuple[str, str | None]] = {
    "npy": (".npy", None),
    "TIFF": (".tif", None),
    "LZW TIFF": (".tif", "lzw"),
}
Case = dict[str, str]


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    # MONAI's PersistentDataset says of its own entries that they hold numpy arrays.
    warnings.simplefilter("ignore")
    print(f"{options.cases} pairs of {options.size}^3 uint8, crop {options.crop}^3, "
          f"{options.repeats} repeats; ms per sample, how many times as fast as {FIRST}, "
          "and once per case to fill the cache")  # fmt: skip
    print(f"{'format':10}{'loader':20}{'wall ms':>10}{'CPU ms':>10}{'ratio':>8}{'fill ms':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for name in FORMATS:
            cases = _write_cases(Path(folder) / name, name, options)
            _check(cases, Path(folder) / name, options)
            _compare(name, cases, Path(folder) / name, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--cases", type=int, default=6)
    return parser.parse_args()


def _write_cases(folder: Path, name: str, options: argparse.Namespace) -> list[Case]:
    folder.mkdir()
    suffix, compression = FORMATS[name]
    cases = []
    for number in range(options.cases):
        image, label = _volume(number, options.size)
        case = {}
        for key, array in (("image", image), ("label", label)):
            path = folder / f"{key}_{number}{suffix}"
            if suffix == ".npy":
                np.save(path, array)
            else:
                tifffile.imwrite(path, array, photometric="minisblack", compression=compression)
            case[key] = str(path)
        cases.append(case)
    return cases


def _volume(seed: int, size: int) -> tuple[Any, Any]:
    """Return an image with wavy sheets, 8 % of it, and where they are."""
    generator = np.random.default_rng(seed)
    z, y, x = np.indices((size,) * 3, dtype=np.float32)
    label = ((z + 8 * np.sin(y / 20 + seed) + 5 * np.cos(x / 15)) % 25 < 2).astype(np.uint8)
    noise = generator.normal(90, 25, label.shape).astype(np.float32)
    return (noise + 60 * label).clip(0, 255).astype(np.uint8), label


def _crop_first(folder: Path, options: argparse.Namespace) -> Compose:
    indices = class_index_cache(folder / "constants", limit=10_000)
    percentiles = percentile_cache(folder / "constants", LOW, HIGH)
    return Compose(
        [
            RandCropFromFiled(KEYS, [options.crop] * 3, positive=0.5, indices=indices),
            ScaleByPercentilesd("image", percentiles),
        ]
    )


def _loaders(
    cases: list[Case], folder: Path, options: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """Return what makes each dataset; the first pass over one fills its cache."""
    whole = [
        LoadImaged(
            KEYS, reader=_reader(cases), ensure_channel_first=True
        ),
        ScaleIntensityRangePercentilesd("image", LOW, HIGH, 0.0, 1.0, clip=True),
        RandCropByPosNegLabeld(KEYS, "label", [options.crop] * 3, num_samples=1),
    ]  # fmt: skip
    return {
        FIRST: lambda: Dataset(cases, Compose(whole)),
        "PersistentDataset": lambda: PersistentDataset(cases, whole, folder / "monai"),
        "PersistentCache": lambda: PersistentCache(cases, whole, folder / "ours"),
        "CacheDataset": lambda: CacheDataset(cases, whole, progress=False, num_workers=1),
        OURS: lambda: Dataset(cases, _crop_first(folder, options)),
    }


def _reader(cases: list[Case]) -> str:
    """Return MONAI's own reader where it has one: stacks of TIFF it cannot read."""
    npy = cases[0]["image"].endswith(".npy")
    return "NumpyReader" if npy else "pipeline.data.readers.ImageFileReader"


def _check(cases: list[Case], folder: Path, options: argparse.Namespace) -> None:
    """Stop unless a crop is the slice of the whole volume, scaled as MONAI scales it."""
    loaded = Compose(
        [
            LoadImaged(KEYS, reader=_reader(cases), ensure_channel_first=True),
            ScaleIntensityRangePercentilesd("image", LOW, HIGH, 0.0, 1.0, clip=True),
        ]
    )(cases[0])
    crop = _crop_first(folder, options)(cases[0])
    z, y, x = (slice(start, start + options.crop) for start in crop["crop_start"].tolist())
    for key in KEYS:
        torch.testing.assert_close(
            crop[key], loaded[key].as_tensor()[:, z, y, x], rtol=0, atol=1e-6
        )


def _compare(name: str, cases: list[Case], folder: Path, options: argparse.Namespace) -> None:
    datasets, fill = {}, {}
    for loader, make in _loaders(cases, folder, options).items():
        start = time.process_time()
        datasets[loader] = make()
        _pass(datasets[loader])
        fill[loader] = 1e3 * (time.process_time() - start) / len(cases)
    times: dict[str, list[tuple[float, float]]] = {loader: [] for loader in datasets}
    for _ in range(options.repeats):
        for loader, dataset in datasets.items():
            times[loader].append(_pass(dataset))
    for loader, found in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
        ratio = statistics.median(a[1] / b[1] for a, b in zip(times[FIRST], found, strict=True))
        once = "" if loader == FIRST else f"{fill[loader]:.0f}"
        print(f"{name:10}{loader:20}{wall:10.1f}{cpu:10.1f}{ratio:7.1f}x{once:>10}")


def _pass(dataset: Any) -> tuple[float, float]:
    """Return the mean milliseconds of a sample over all cases, by the clock and of the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    for index in range(len(dataset)):
        dataset[index]
    each = 1e3 / len(dataset)
    return each * (time.perf_counter() - wall), each * (time.process_time() - cpu)


if __name__ == "__main__":
    main()
