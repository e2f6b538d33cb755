"""Faults of commands, devices and output folders, and what a run over files does about bad ones."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys

import pytest

from pipeline.data.images import read_image

row = pytest.mark.row


@row(29, "GPU asked for, none there", "refused with the reason and the way on", code=2)
def test_row_29_a_device_that_is_not_there_is_refused(door, photographs, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has what must be absent")
    ended = door.predict(photographs, tmp_path / "results", "device=cuda")
    ended.complained(2, "device cuda", "CUDA", "--device cpu")
    assert not list((tmp_path / "results").rglob("*.png"))
    door.predict(photographs, tmp_path / "results", "device=auto").went_well()


@row(
    31,
    "one bad file among many",
    "left out, the rest done; listed in `failures.csv` with the reason",
    code=3,
)
def test_row_31_one_bad_file_stops_no_other(door, photographs, tmp_path, assert_whole):
    (photographs / "aa.png").write_bytes((photographs / "a.png").read_bytes()[:700])
    for workers in (0, 2):
        results = tmp_path / f"results_{workers}"
        ended = door.predict(photographs, results, f"num_workers={workers}")
        ended.complained(3, "1 of 3 inputs rejected, the rest is done", "aa.png", "cut short")
        lines = (results / "failures.csv").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 2
        assert lines[1].startswith("aa.png,read,3,")
        assert {path.name for path in results.glob("*_vessels.png")} == {
            "a_vessels.png", "b_vessels.png"
        }  # fmt: skip
        assert_whole(results)


@row(
    32,
    "inference that was killed",
    "the same command does only what has no result from this input, model and setting",
    code="0 of the second run",
)
def test_row_32_a_killed_inference_goes_on(door, photographs, tmp_path, assert_whole):
    results = tmp_path / "results"
    ended = door.predict(photographs, results, killed_in_write=[".b_vessels", 1])
    assert ended.code == -signal.SIGKILL
    assert not (results / "b_vessels.png").exists()
    first = (results / "a_vessels.png").stat().st_mtime_ns
    ended = door.predict(photographs, results)
    ended.went_well()
    assert "2 inputs: 1 to do, 1 done before" in ended.out
    assert (results / "a_vessels.png").stat().st_mtime_ns == first
    assert read_image(results / "b_vessels.png").shape == (96, 96)
    assert_whole(results)


@row(33, "disk full at a result", "no file under its final name; what is done stays done", code=5)
def test_row_33_a_full_disk_leaves_no_partial_result(door, photographs, tmp_path, assert_whole):
    results = tmp_path / "results"
    ended = door.predict(photographs, results, disk_full_in_write=[".b_vessels", 1])
    ended.complained(5, results / "b_vessels.png", "No space left", "free space")
    assert not (results / "b_vessels.png").exists()
    assert not (results / "b.json").exists()
    assert_whole(results)
    ended = door.predict(photographs, results)
    ended.went_well()
    assert "1 to do, 1 done before" in ended.out


@row(
    34,
    "output folder that cannot be written",
    "refused before a checkpoint is read or a file opened",
    code=5,
)
def test_row_34_a_read_only_folder_is_refused_first(door, photographs, shared_data, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    ended = door.train(shared_data, locked / "run", no_privileges=[])
    ended.complained(5, locked / "run", "cannot be written", "choose another output folder")
    ended = door.predict(photographs, locked / "results", no_privileges=[])
    ended.complained(5, locked, "cannot be written", "choose another output folder")
    assert not list(locked.iterdir())
    absent = f"ckpt_path={tmp_path / 'absent.pt'}"
    ended = door.predict(photographs, locked / "results", absent, no_privileges=[])
    ended.complained(5, locked, "cannot be written")


@row(
    37,
    "setting that is misspelt",
    "refused with the closest name, before torch is imported",
    code=2,
)
def test_row_37_a_misspelt_setting_is_refused_with_the_closest(door, photographs, tmp_path):
    ended = door("train", "fundus_vessels", "--max_epocs", "3")
    ended.complained(2, "--max_epocs", "did you mean max_epochs?")
    ended = door.predict(photographs, tmp_path / "results", "overwrit=true")
    ended.complained(2, "--overwrit", "did you mean overwrite?")
    door("train", "fundus_vesels").complained(2, "fundus_vesels", "did you mean fundus_vessels?")
    assert not (tmp_path / "results").exists()


@row(39, "help", "an example for each command, in under half a second of CPU", code=0)
def test_row_39_help_comes_at_once():
    for words in ([], ["train"], ["predict"], ["data", "check"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "pipeline", *words, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        assert done.stderr == ""
        assert "example: python -m pipeline" in done.stdout
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert seconds < 0.5, (words, seconds)
