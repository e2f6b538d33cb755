"""The page for a person with a scroll: its scripts run, and its tables are what is printed."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from pipeline.data.volumes import open_volume
from pipeline.inference import cluster
from pipeline.inference.stream_plan import growth_table, plan_stream
from pipeline.inference.streaming import VolumeStream

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def blocks(repository: Path) -> list[tuple[str, str]]:
    return BLOCK.findall((repository / "docs" / "large_volumes.md").read_text("utf-8"))


@pytest.fixture
def scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: list[tuple[str, str]]
) -> Iterator[Path]:
    """A folder with the page's scripts, weights and a small volume, windows as small."""
    for language, text in blocks:
        found = re.match(r"# (\w+\.py)\n", text)
        if language == "python" and found:
            (tmp_path / found[1]).write_text(small(text))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    namespace = runpy.run_path("network.py")
    torch.manual_seed(0)
    torch.save(namespace["BasicUNet"](3, 1, 1, features=(16, 16, 32, 32, 32, 16)).state_dict(),
               "weights.pt")  # fmt: skip
    values = np.random.default_rng(0).integers(0, 255, (60, 32, 32), dtype=np.uint8)
    zarr.create_array("scroll.zarr", shape=values.shape, dtype="uint8", chunks=(32, 32, 32))[:] = (
        values
    )
    yield tmp_path
    sys.modules.pop("network", None)


def small(text: str) -> str:
    """Return a script with windows that take no time."""
    return text.replace("(128, 128, 128), overlap", "(32, 32, 32), overlap")


def run(text: str, namespace: dict[str, Any]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, "large_volumes.md", "exec"), namespace)
    return printed.getvalue()


def test_what_stands_in_one_script_runs_and_prints_what_the_page_says(
    scripts: Path, blocks: list[tuple[str, str]]
) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    plain = [text for language, text in blocks if language == "python" and text[0] != "#"]
    first, table, scroll, record = plain
    run(small(first), namespace)
    assert namespace["result"].complete
    assert open_volume("surface.zarr").dtype == np.uint8
    assert "26,000 x 20,000 x 20,000" in run(table, namespace)
    printed = [text for language, text in blocks if language == "text"]
    assert run(scroll, namespace) == printed[0]
    inferer, shape = namespace["SlidingWindow"]((128, 128, 128), 0.25), (2000, 1500, 1500)
    plan = plan_stream(shape, inferer.grid(shape), (96, 128, 128), out_bytes=1)
    assert growth_table(plan.growth(inferer.grid)) + "\n" == printed[1]
    assert "made_with" in run(record, namespace)


def test_the_jobs_of_an_array_give_what_one_run_gives(
    scripts: Path, monkeypatch: pytest.MonkeyPatch, blocks: list[tuple[str, str]]
) -> None:
    for index in (1, 0):
        arguments = ["stream_block.py", "scroll.zarr", "surface.zarr", str(index), "2"]
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path("stream_block.py", run_name="__main__")
    namespace: dict[str, Any] = {"__name__": "page"}
    run(small(blocks[1][1]).replace("surface.zarr", "one.zarr"), namespace)
    np.testing.assert_array_equal(open_volume("surface.zarr")[:], open_volume("one.zarr")[:])
    monkeypatch.setattr(sys, "argv", ["stream_block.py", "absent.zarr", "r.zarr", "0", "2"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path("stream_block.py", run_name="__main__")
    assert stopped.value.code == 3


def test_the_script_for_dask_runs(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")

    @contextlib.contextmanager
    def in_this_process(*_: Any) -> Iterator[Any]:
        with (
            distributed.LocalCluster(
                n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0"
            ) as made,
            distributed.Client(made) as client,
        ):
            yield client

    monkeypatch.setattr(cluster, "local_or_running", in_this_process)
    found = runpy.run_path("stream_dask.py", run_name="__main__")
    assert found["result"].complete


def test_the_job_script_is_bash(tmp_path: Path, blocks: list[tuple[str, str]]) -> None:
    (script,) = [text for language, text in blocks if language == "bash"]
    (tmp_path / "surface.sh").write_text(script)
    subprocess.run(["bash", "-n", tmp_path / "surface.sh"], check=True)
    assert script.startswith("#!/bin/bash\n#SBATCH")


def test_the_page_names_settings_that_exist(repository: Path) -> None:
    text = (repository / "docs" / "large_volumes.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named <= set(inspect.signature(VolumeStream).parameters)
