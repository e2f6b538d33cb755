"""Faults of a training run: killed, disturbed, out of memory, or with a damaged checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training.checkpoints import read_checkpoint

row = pytest.mark.row
COMPARED = ("last", "best", "swa")


def content(run: Path, name: str) -> dict[str, Any]:
    found = read_checkpoint(run / "checkpoints" / f"{name}.pt")
    del found["plan"]  # of the memory that was free at the time
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_same_run(run: Path, other: Path) -> None:
    """Assert equal weights, states and scores: what a run is, but for the time it took."""
    for name in COMPARED:
        assert same(content(run, name), content(other, name)), name


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@row(
    1,
    "kill -9 in training",
    "the same command goes on from the last save; weights, states, scores and data order end bit "
    "for bit as undisturbed (on a CPU; `benchmarks/soak_resume.py` kills at 20 random moments)",
    code="0 of the second run",
)
def test_row_01_a_killed_run_ends_as_the_undisturbed_one(
    door, shared_data, trained, tmp_path, assert_whole
):
    for workers in (0, 2):
        run = tmp_path / f"run_{workers}"
        words = (shared_data, run, "checkpoint_every=2", f"num_workers={workers}")
        assert door.train(*words, killed_at_step=[6]).code == -signal.SIGKILL
        assert content(run, "last")["iteration"] == 5
        door.train(*words).went_well()
        assert_same_run(run, trained)
        assert_whole(run)


@row(
    2,
    "kill while a checkpoint is written",
    "the one before stands whole under its name; the next run sweeps the rest and goes on",
    code="0 of the second run",
)
def test_row_02_a_kill_inside_a_write_leaves_the_checkpoint_before(
    door, shared_data, trained, tmp_path, assert_whole
):
    words = (shared_data, tmp_path / "run", "checkpoint_every=2")
    assert door.train(*words, killed_in_write=[".last.", 3]).code == -signal.SIGKILL
    assert content(tmp_path / "run", "last")["iteration"] == 2
    assert list((tmp_path / "run" / "checkpoints").glob(".last.*.tmp*"))
    door.train(*words).went_well()
    assert_whole(tmp_path / "run")
    assert_same_run(tmp_path / "run", trained)


@row(
    3,
    "disk full at a checkpoint",
    "asked before training and before each save; the checkpoint before stays whole",
    code=5,
)
def test_row_03_a_full_disk_keeps_the_checkpoint_before(door, shared_data, tmp_path, assert_whole):
    run = tmp_path / "run"
    ended = door.train(shared_data, run, disk_full_in_write=[".last.", 3])
    ended.complained(5, run / "checkpoints" / "last.pt", "No space left", "free space")
    assert content(run, "last")["epoch"] == 1
    assert_whole(run)
    ended = door.train(shared_data, tmp_path / "another", free_bytes=[1000])
    ended.complained(5, tmp_path / "another" / "checkpoints", "0 MB free", "MB needed")
    assert not (tmp_path / "another" / "checkpoints" / "last.pt").exists()


@row(
    4,
    "truncated checkpoint",
    "a run goes on from `previous.pt` with a warning that names the damaged one; where there is "
    "none, and in inference, refused by name",
    code="0; 4 without another",
)
def test_row_04_a_truncated_checkpoint_is_named_and_the_one_before_serves(
    door, shared_data, trained, photographs, tmp_path, assert_whole
):
    run = copy_of(trained, tmp_path)
    last, previous, best = (run / "checkpoints" / f"{n}.pt" for n in ("last", "previous", "best"))
    for path in (last, best):
        cut(path)
    ended = door.predict(photographs, tmp_path / "results", f"ckpt_path={best}")
    ended.complained(4, best, "damaged")
    assert_whole(tmp_path / "results")
    ended = door.train(shared_data, run)
    ended.went_well()
    assert f"{last}: damaged" in ended.out
    assert f"going on from {previous} instead" in ended.out
    for path in (last, previous):
        cut(path)
    door.train(shared_data, run, "max_epochs=3").complained(4, previous, "damaged")


@row(
    5,
    "bit-flipped checkpoint",
    "found by the sha256 beside the file, and without that by the CRCs inside; as row 4",
    code=4,
)
def test_row_05_a_flipped_bit_in_a_checkpoint_is_found(
    door, trained, photographs, tmp_path, assert_whole
):
    best = copy_of(trained, tmp_path) / "checkpoints" / "best.pt"
    data = bytearray(best.read_bytes())
    with zipfile.ZipFile(best) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        data[data.index(archive.read(largest)) + 1000] ^= 1
    best.write_bytes(data)
    for problem in ("its sha256 differs", "checksum of"):
        ended = door.predict(photographs, tmp_path / "results", f"ckpt_path={best}")
        ended.complained(4, best, problem)
        best.with_name("best.pt.sha256").unlink(missing_ok=True)
    assert_whole(tmp_path / "results")


@row(
    6,
    "checkpoint of another architecture",
    "refused before the weights are looked at, naming file, both architectures and the overlay",
    code=4,
)
def test_row_06_another_architecture_is_refused_by_name(
    door, shared_data, trained, photographs, tmp_path, repository, assert_whole
):
    run = copy_of(trained, tmp_path)
    ended = door.train(shared_data, run, "roinet", "max_epochs=3", "depths=[4,4,4,4,4,4]")
    ended.complained(4, run / "checkpoints" / "last.pt", "'default'", "'roinet'", "resume")
    assert same(content(run, "last"), content(trained, "last"))
    foreign = repository / "bundles" / "vesuvius_surface" / "models" / "model.pt"
    ended = door.predict(photographs, tmp_path / "results", f"ckpt_path={foreign}")
    ended.complained(4, foreign, "vesuvius_surface", "fundus_vessels")
    assert_whole(tmp_path / "results")


class Malice:
    """What runs a command where a pickle is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@row(
    7,
    "checkpoint that holds code",
    "not loaded, and no advice to load it in another way",
    code=4,
)
def test_row_07_code_in_a_checkpoint_is_not_run(door, photographs, tmp_path, assert_whole):
    path, sign = tmp_path / "gift.pt", tmp_path / "sign"
    torch.save({"model": Malice(sign)}, path)
    ended = door.predict(photographs, tmp_path / "results", f"ckpt_path={path}")
    ended.complained(4, path, "more than tensors and plain data", "not loaded")
    assert "weights_only" not in ended.err
    assert not sign.exists()
    assert_whole(tmp_path / "results")


@row(
    8,
    "loss that is NaN",
    "stops and names the files of the batch; neither best nor last checkpoint is touched",
    code=6,
)
def test_row_08_a_loss_of_nan_stops_the_run_and_spoils_nothing(
    door, shared_data, tmp_path, assert_whole
):
    run = tmp_path / "run"
    ended = door.train(shared_data, run, loss_is_nan_at_step=[5])
    ended.complained(6, "iteration 5", "the loss is nan", "train/image/phantom_", "skip_not_finite")
    assert content(run, "last")["epoch"] == 1
    for name in ("last", "best"):
        assert all(torch.isfinite(tensor).all() for tensor in content(run, name)["model"].values())
    assert_whole(run)


@row(
    9,
    "out of memory",
    "training computes the same update in smaller pieces, inference fewer windows at once; refused "
    "with advice where one alone does not fit",
    code="0; 5",
)
def test_row_09_less_memory_gives_smaller_pieces_or_advice(
    door, shared_data, trained, photographs, tmp_path, assert_whole
):
    ended = door.train(shared_data, tmp_path / "run", memory_for=[1])
    ended.went_well()
    assert "out of memory" in ended.out
    assert content(tmp_path / "run", "last")["iteration"] == 6
    door.train(shared_data, tmp_path / "none", memory_for=[0]).complained(5, "out of memory")
    windows = ("roi_size=[64,64]", "sw_batch_size=4")
    checkpoint = f"ckpt_path={trained / 'checkpoints' / 'best.pt'}"
    for name, memory in (("plenty", 4), ("little", 1)):
        ended = door.predict(
            photographs, tmp_path / name, checkpoint, *windows, memory_for=[memory]
        )
        ended.went_well()
        assert ("out of memory: 2 windows per pass" in ended.out) == (name == "little")
    for name in ("a_vessels.png", "b_vessels.png"):
        results = [(tmp_path / folder / name).read_bytes() for folder in ("plenty", "little")]
        assert results[0] == results[1]
    ended = door.predict(photographs, tmp_path / "no", checkpoint, *windows, memory_for=[0])
    ended.complained(5, "out of memory with one window of [64, 64]", "smaller roi_size")
    assert_whole(tmp_path)


@row(
    30,
    "loader worker killed",
    "a hint about memory and shared memory; the same command goes on from the last save",
    code="5; 0 of the second run",
)
def test_row_30_a_killed_worker_leaves_a_hint_and_a_run_that_goes_on(
    door, shared_data, trained, tmp_path, assert_whole
):
    words = (shared_data, tmp_path / "run", "num_workers=1", "checkpoint_every=2")
    ended = door.train(*words, worker_killed_at_item=[9])
    ended.complained(5, "a loader worker was lost", "num_workers", "shared memory", "resume")
    assert_whole(tmp_path / "run")
    door.train(*words).went_well()
    assert_same_run(tmp_path / "run", trained)


@row(
    35,
    "two runs in one folder",
    "the second is refused and told process and host of the first, which goes on",
    code=2,
)
def test_row_35_the_second_run_in_a_folder_is_refused(door, shared_data, tmp_path):
    run = tmp_path / "run"
    first = door.start_training(shared_data, run, "max_epochs=500")
    while not (run / "checkpoints" / "last.pt").exists():
        first.assert_running()
    second = door.train(shared_data, run)
    second.complained(2, run, "another run", f"process {first.pid}", os.uname().nodename)
    first.send(signal.SIGTERM)
    assert first.end().code == 75


@row(
    36,
    "SIGTERM or Ctrl-C",
    "saves at the end of the step; the same command goes on and ends as undisturbed",
    code="75, 130",
)
def test_row_36_a_signal_saves_and_nothing_is_lost(
    door, shared_data, trained, tmp_path, assert_whole
):
    for signum, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        run = tmp_path / signum.name
        words = (shared_data, run, "checkpoint_every=1")
        command = door.start_training(*words, signal_at_step=[5, signum])
        ended = command.end()
        iteration = content(run, "last")["iteration"]
        assert iteration == 5
        ended.complained(code, signum.name, f"iteration {iteration}", "last.pt", "resume: auto")
        door.train(*words).went_well()
        assert_same_run(run, trained)
        assert_whole(run)
