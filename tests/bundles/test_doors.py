"""The doors of every bundle: one command each on what a person has, and what it would do."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline import cli
from pipeline.bundles import read_config
from pipeline.data.writers import write_png, write_tiff
from pipeline.training.checkpoints import read_checkpoint

HERE = ("--device", "cpu", "--tune_allocator", "false")


def photograph(folder: Path) -> Path:
    from pipeline.fundus.phantom import fundus_phantom

    write_png(folder / "eye.png", fundus_phantom(3, (160, 192)).image)
    return folder / "eye.png"


def vol_file(folder: Path) -> Path:
    from pipeline.oct.heyex_vol import write_vol
    from pipeline.oct.phantom import oct_phantom

    image = oct_phantom(3, size_px=(248, 384)).image
    return write_vol(folder / "eye.vol", image[None] / np.float32(255))


def tiff_volume(folder: Path) -> Path:
    from pipeline.vesuvius.phantom import scroll_phantom

    write_tiff(folder / "scroll.tif", scroll_phantom(3, (40, 48, 48)).image)
    return folder / "scroll.tif"


def pictures(folder: Path) -> Path:
    from pipeline.classification.phantom import insect_phantom

    for n in range(2):
        write_png(folder / f"insect_{n}.png", insect_phantom(n, label=n, size_px=96).image)
    return folder


INPUTS = {  # what it is drawn by, how many inputs it is, and a result
    "fundus_vessels": (photograph, 1, "eye_vessels.png"),
    "oct_layers": (vol_file, 1, "eye.csv"),
    "vesuvius_surface": (tiff_volume, 1, "scroll.tif"),
    "insect_pests": (pictures, 2, "insect_1.json"),
    "multiscale_classifier": (pictures, 2, "insect_1.json"),
}


@pytest.fixture
def weights(bundle) -> Path:
    path = bundle.root / "models" / "model.pt"
    if not path.is_file():
        pytest.skip(f"{bundle.name} ships no weights yet: models/model.pt is missing")
    return path


@pytest.fixture
def source(bundle, tmp_path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    return INPUTS[bundle.name][0](folder)


def asked(*words: str) -> str:
    """Return what a command writes to stdout.

    Not by `capsys`: it changes stderr too, and absl, once imported, closes the one that was there
    when a bundle configures logging.
    """
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(words) == 0
    return said.getvalue()


def test_predict_serves_a_person_with_images_by_one_command(bundle, weights, source, tmp_path):
    _, count, result = INPUTS[bundle.name]
    out = tmp_path / "results"
    words = ["predict", str(bundle.root), "-i", str(source), "-o", str(out), *HERE]
    found = json.loads(asked(*words, "--dry-run", "--json"))
    assert [len(found[key]) for key in ("inputs", "pending", "done_before")] == [count, count, 0]
    assert any("parameters" in line for line in found["lines"])
    assert not out.exists()
    summary = json.loads(asked(*words, "--json"))
    assert [summary[key] for key in ("inputs", "done", "rejected")] == [count, count, 0]
    assert (out / result).is_file()
    page = Path(summary["report"])
    assert page == out / "report.html"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert f"inputs: {count} found, 0 to do, {count} done before" in asked(*words, "--dry-run")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    page.unlink()
    assert asked("report", str(out)) == f"report: {page}\n"
    assert page.is_file()


def test_a_dry_run_tells_what_training_would_do_and_writes_nothing(bundle, dataset, tmp_path):
    small = [f"--{key}={json.dumps(value)}" for key, value in bundle.case.training.items()]
    small += [f"--{key}={json.dumps(value)}" for key, value in bundle.case.frame.items()]
    words = ["train", str(bundle.root), "--dataset_dir", str(dataset), *small, *HERE]
    found = json.loads(asked(*words, "--output_dir", "runs/mine", "--dry-run", "--json"))
    assert found["files"] == [str(bundle.root / "configs" / "train.yaml")]
    assert found["output_dir"] == "runs/mine"
    assert found["cases"]["train"] > 0
    assert found["plan"]["batch_size"] == 2
    text = "\n".join(found["lines"])
    assert all(word in text for word in ("parameters", "plan: batch", "memory:", str(dataset)))
    assert not any(tmp_path.iterdir())


def test_a_dry_run_of_an_evaluation_names_checkpoint_and_cases(bundle, weights, dataset, tmp_path):
    if "class_names" in read_checkpoint(weights):
        pytest.skip("the shipped weights know other classes than the drawn data set")
    words = ["evaluate", str(bundle.root), "--dataset_dir", str(dataset), *HERE]
    words += ["--ckpt_path", str(weights), "--output_dir", "runs/mine"]
    manifest = bundle.case.training.get("manifest")
    words += ["--manifest", manifest] if manifest else []
    found = json.loads(asked(*words, "--dry-run", "--json"))
    assert found["scored"] > 0
    assert any(str(weights) in line for line in found["lines"])
    assert not any(tmp_path.iterdir())


def test_the_demonstration_has_an_overlay_and_an_input(bundle, tmp_path):
    from pipeline.arguments import EXAMPLES
    from pipeline.data.cases import inputs_below
    from pipeline.examples import EXAMPLE_OF, write_example

    assert (bundle.root / "configs" / "quick.yaml").is_file()
    assert EXAMPLE_OF[bundle.name] in EXAMPLES
    path = write_example(EXAMPLE_OF[bundle.name], tmp_path / "input")
    manifest = read_config(bundle.root / "configs" / "inference.yaml")["manifest"]
    assert inputs_below(str(path), manifest, str(tmp_path / "out"))
