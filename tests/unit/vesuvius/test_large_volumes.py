from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import Dataset
from numpy.typing import NDArray
from torch import nn

from pipeline.data.ome_zarr import create_ome_zarr
from pipeline.data.volumes import open_volume
from pipeline.errors import InputErrors
from pipeline.inference.accepted import AcceptedLoader
from pipeline.inference.batch import BatchRun
from pipeline.inference.finishing import Finish
from pipeline.inference.sliding_window import SlidingWindow
from pipeline.vesuvius.large_volumes import StreamedOnTheWay
from pipeline.vesuvius.reading import ReadVolume
from pipeline.vesuvius.transforms import LoadVolumed, ScalePercentilesd

SHAPE = (40, 24, 28)
TRANSFORMS = [LoadVolumed(), ScalePercentilesd("image", low=2.0, high=97.0)]


def network() -> nn.Module:
    """A filter that finds about half of any volume."""
    torch.manual_seed(0)
    layer = nn.Conv3d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight -= layer.weight.mean()
    return nn.Sequential(layer, nn.InstanceNorm3d(1)).eval()


def inferer() -> SlidingWindow:
    return SlidingWindow((16, 16, 16), overlap=0.5, tune_allocator=False)


def grey(dtype: str, seed: int = 0) -> NDArray[Any]:
    values = np.random.default_rng(seed).normal(100, 30, SHAPE)
    return values.clip(0, 255).astype(dtype) if dtype != "bool" else values > 100


def run(
    folder: Path,
    volumes: Sequence[Path],
    stream: Any = True,
    threshold: float = 0.5,
    **settings: Any,
) -> tuple[BatchRun, list[Any]]:
    """Run as the bundle does, and return what the engine would have got besides."""
    cases = [{"name": path.name, "image": str(path), "label": None} for path in volumes]
    shared = {"threshold": threshold, **settings}
    batch = BatchRun(
        cases, str(folder / "out"), shared, None, "vesuvius_surface",
        overwrite=settings.get("overwrite", False),
    )  # fmt: skip
    reading = ReadVolume(TRANSFORMS, ["read", "scale"], stream)
    loader = AcceptedLoader(batch, Dataset(batch.pending, reading))
    given: list[Any] = []
    streamed = StreamedOnTheWay(
        loader, batch, network(), inferer(), [2.0, 97.0],
        checkpoint={"epoch": 3, "metrics": {"val_surface": 0.5}}, **shared,
    )  # fmt: skip
    batch.run(lambda: given.extend(streamed))
    return batch, given


def in_memory(path: Path, finish: Finish) -> NDArray[Any]:
    """Return what the engine's path gives, before repair."""
    case: Any = {"image": str(path)}
    for transform in TRANSFORMS:
        case = transform(case)
    with torch.no_grad():
        return finish(torch.as_tensor(inferer()(case["image"][None], network()))[0])[0]


def stored(folder: Path, name: str, array: NDArray[Any]) -> Path:
    path = folder / name
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        size = {"spacing": (7.9, 7.9, 7.9), "unit": "micrometer"}
        create_ome_zarr(path, array.shape, array.dtype, (16, 16, 16), **size)[:] = array
    return path


def sidecar(folder: Path, stem: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / f"{stem}.json").read_text())
    return found


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float16", "float32", "bool"])
def test_a_streamed_mask_is_that_of_memory_to_the_voxel(tmp_path: Path, dtype: str) -> None:
    path = stored(tmp_path, "scroll.npy", grey(dtype))
    _, given = run(tmp_path, [path])
    assert given == []
    expected = in_memory(path, Finish("sigmoid", threshold=0.5))
    assert 0.05 < expected.mean() < 0.95
    with open_volume(tmp_path / "out" / "scroll_surface.zarr") as found:
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found[:, :, :], expected)
    assert sidecar(tmp_path, "scroll")["foreground"] == expected.sum()


def test_a_probability_is_written_instead_where_it_is_saved(tmp_path: Path) -> None:
    path = stored(tmp_path, "scroll.zarr", grey("uint16"))
    run(tmp_path, [path], save_probability=True)
    expected = in_memory(path, Finish("sigmoid", dtype="uint8"))
    with open_volume(tmp_path / "out" / "scroll_probability.zarr") as found:
        np.testing.assert_array_equal(found[:, :, :], expected)
    assert not (tmp_path / "out" / "scroll_surface.zarr").exists()
    assert sidecar(tmp_path, "scroll")["streamed"]["content"] == "probability"


def test_log_and_sidecar_say_that_nothing_was_repaired(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run(tmp_path, [stored(tmp_path, "scroll.zarr", grey("uint8"))])
    said = [record.getMessage() for record in caplog.records]
    assert any(
        "scroll.zarr: (40, 24, 28) of uint8 is streamed, and not repaired" in s for s in said
    )
    found = sidecar(tmp_path, "scroll")
    assert found["streamed"]["repaired"] is False
    assert (found["shape"], found["spacing"]) == (list(SHAPE), [7.9] * 3)
    assert found["unit"] == "micrometer"
    assert found["checkpoint"]["epoch"] == 3
    assert found["foreground"] + found["background"] == np.prod(SHAPE)
    assert list(found["seconds"]) == ["scale", "network", "write"]
    assert (tmp_path / "out" / "pictures" / "scroll.png").is_file()
    with open_volume(tmp_path / "out" / "scroll_surface.zarr") as result:
        assert (result.spacing, result.unit) == ((7.9, 7.9, 7.9), "micrometer")


def test_what_fits_into_memory_goes_to_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = stored(tmp_path, "a.npy", grey("uint8"))
    large = stored(tmp_path, "b.npy", np.concatenate([grey("uint8")] * 5))
    other = stored(tmp_path, "c.npy", grey("uint8", 1))
    monkeypatch.setenv("LAMINA_MAX_DECODED_BYTES", str(4 * 40 * 24 * 28))
    batch, given = run(tmp_path, [small, large, other], stream="auto")
    assert [items["name"] for items in given] == [["a.npy"], ["c.npy"]]
    assert [row["image"] for row in batch.rows] == ["b.npy"]


def test_one_bad_volume_does_not_stop_the_others(tmp_path: Path) -> None:
    spoiled = grey("float32")
    spoiled[5, 6, 7] = np.nan
    paths = [
        stored(tmp_path, "a.npy", spoiled),
        stored(tmp_path, "b.npy", np.full(SHAPE, 7, np.uint8)),
        stored(tmp_path, "c.npy", np.stack([grey("uint8")] * 2)),
        stored(tmp_path, "d.npy", grey("uint8")),
    ]
    batch, _ = run(tmp_path, paths)
    assert [row["image"] for row in batch.rows] == ["d.npy"]
    with (tmp_path / "out" / "failures.csv").open() as table:
        failures = {row["path"]: row["message"] for row in csv.DictReader(table)}
    for name, part in (("a.npy", "not finite"), ("b.npy", "constant"), ("c.npy", "2 channels")):
        assert part in failures[name]
    with pytest.raises(InputErrors):
        batch.finish()


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    path = stored(tmp_path, "scroll.npy", grey("uint8"))
    run(tmp_path, [path])
    result = tmp_path / "out" / "scroll_surface.zarr"
    before = result.stat().st_mtime_ns
    batch, _ = run(tmp_path, [path])
    assert (batch.skipped, result.stat().st_mtime_ns) == (1, before)


@pytest.mark.parametrize("change", ["threshold", "content"])
def test_a_result_of_something_else_is_overwritten_only_where_asked_for(
    tmp_path: Path, change: str
) -> None:
    path = stored(tmp_path, "scroll.npy", grey("uint8"))
    run(tmp_path, [path])
    threshold = 0.6 if change == "threshold" else 0.5
    if change == "content":
        stored(tmp_path, "scroll.npy", grey("uint8", seed=1))
    batch, _ = run(tmp_path, [path], threshold=threshold)
    assert "set overwrite" in batch.problems[0].message
    batch, _ = run(tmp_path, [path], threshold=threshold, overwrite=True)
    assert not batch.problems
    with open_volume(tmp_path / "out" / "scroll_surface.zarr") as found:
        expected = in_memory(path, Finish("sigmoid", threshold=threshold))
        np.testing.assert_array_equal(found[:, :, :], expected)
