"""Training, evaluation and inference of each bundle on its phantom, in this process."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.data.checksums import file_sha256
from pipeline.errors import CheckpointError, InputErrors, lamina_cause
from pipeline.training.checkpoints import read_checkpoint, write_checkpoint


def files(folder: Path) -> set[str]:
    """Return the files below a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def loaded(path: Path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_properties_of_training_are_whole(bundle, dataset, tmp_path):
    workflow = bundle.workflow("train", dataset_dir=dataset, output_dir=tmp_path / "run")
    workflow.initialize()
    assert workflow.check_properties() == []


def test_the_properties_of_inference_are_whole(bundle, inputs, trained, tmp_path):
    workflow = bundle.workflow(
        "inference", dataset_dir=inputs[0], output_dir=tmp_path, ckpt_path=trained.best
    )
    workflow.initialize()
    assert workflow.check_properties() == []


def test_training_leaves_the_files_of_a_run(bundle, trained):
    found = files(trained.folder)
    expected = {"config.yaml", "environment.json", "run.log", "metrics_history.yaml", "report.html"}
    expected |= {f"checkpoints/{name}.pt" for name in ("best", "last", "previous", "swa")}
    assert expected <= found
    assert any(name.startswith("tensorboard/") for name in found)
    assert not bundle.case.pictures or any(name.startswith("pictures/") for name in found)
    assert not any(".tmp" in name for name in found)


def test_training_touches_nothing_that_is_shipped(trained):
    assert trained.after == trained.before


def test_the_history_has_an_entry_per_epoch_with_the_figures_of_the_bundle(bundle, trained):
    history = loaded(trained.folder / "metrics_history.yaml")
    assert [entry["epoch"] for entry in history] == [1, 2]
    for entry in history:
        assert {"loss"} < entry["train"].keys()
        assert {"val_loss", *(f"val_{name}" for name in bundle.case.figures)} <= entry["val"].keys()
        assert entry["learning_rate"] > 0
        assert entry["seconds"] > 0
    assert any(entry["new_best"] for entry in history)


def test_the_log_begins_with_what_was_found(trained, dataset):
    first, *rest = (trained.folder / "run.log").read_text(encoding="utf-8").splitlines()
    assert str(dataset) in first
    assert "train / val / test" in first
    assert any("parameters" in line for line in rest[:4])


def test_the_configuration_of_a_run_is_resolved(bundle, trained, dataset):
    config = loaded(trained.folder / "config.yaml")
    assert config["dataset_dir"] == str(dataset)
    assert config["ckpt_path"] == str(trained.best)
    assert "@" not in json.dumps([config["network_def"], config["deterministic_transforms"]])
    assert bundle.case.training.items() <= config.items()


@pytest.mark.parametrize("name", ["best", "last", "previous", "swa"])
def test_a_checkpoint_carries_how_it_is_used(bundle, trained, name):
    content = read_checkpoint(trained.folder / "checkpoints" / f"{name}.pt")
    assert content["bundle"] == bundle.name
    assert content["architecture"] == "default"
    assert content["network_def"]["_target_"].startswith("pipeline.")
    assert content["preprocessing"]
    assert content["threshold"] > 0


def test_evaluation_writes_no_checkpoint(evaluated):
    assert evaluated.after == evaluated.before


def test_evaluation_leaves_tables_and_pictures(bundle, evaluated, trained):
    totals = loaded(evaluated.folder / "test_metrics.yaml")
    rows = loaded(evaluated.folder / "per_image_metrics.yaml")
    expected = {"experiment", "checkpoint", "num_test_images", bundle.case.chosen, "split"}
    assert expected <= totals.keys()
    assert totals["num_test_images"] == len(rows) == 2
    figures = set(bundle.case.figures)
    assert figures <= totals["average_metrics"].keys()
    assert not bundle.case.pooled or figures <= totals["pooled_metrics"].keys()
    assert all({"image", *figures} <= row.keys() for row in rows)
    found = files(evaluated.folder)
    assert {"config.yaml", "environment.json", "run.log", "report.html"} <= found
    for row in rows:
        stem = Path(row["image"]).with_suffix("").as_posix()
        assert f"pictures/{stem}.png" in found
        assert bundle.case.mask is None or f"predictions/{stem}{bundle.case.mask}" in found
    assert (trained.folder / "tensorboard" / "test").is_dir()


def test_evaluation_uses_what_validation_chose(bundle, evaluated, trained):
    totals = loaded(evaluated.folder / "test_metrics.yaml")
    chosen = read_checkpoint(trained.best)["metrics"][bundle.case.chosen]
    assert totals[bundle.case.chosen] == pytest.approx(chosen)


def test_inference_leaves_a_result_and_a_sidecar_per_input(bundle, inferred, inputs):
    folder, names = inputs
    found = files(inferred)
    for name in names:
        stem = Path(name).with_suffix("").as_posix()
        assert f"{stem}.json" in found
        assert not bundle.case.results_have_pictures or f"pictures/{stem}.png" in found
        for suffix in bundle.case.results:
            bundle.case.check_result(inferred / f"{stem}{suffix}", folder / name)


def test_inference_accounts_for_every_input(bundle, inferred, inputs):
    summary = json.loads((inferred / "summary.json").read_text(encoding="utf-8"))
    assert summary["bundle"] == bundle.name
    assert [summary[key] for key in ("inputs", "done", "rejected", "exit_code")] == [2, 2, 0, 0]
    with (inferred / "per_image.csv").open(encoding="utf-8") as table:
        assert [row["image"] for row in csv.DictReader(table)] == inputs[1]
    assert (inferred / "failures.csv").read_text(encoding="utf-8").splitlines() == [
        "path,stage,code,message"
    ]
    assert (inferred / "report.html").is_file()


def test_inference_skips_what_is_done(bundle, inferred, inputs, trained, tmp_path):
    results = shutil.copytree(inferred, tmp_path / "results")
    bundle.run("inference", dataset_dir=inputs[0], output_dir=results, ckpt_path=trained.best)
    summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    assert [summary[key] for key in ("done", "skipped")] == [0, 2]


def test_a_sidecar_says_what_its_result_is_made_from(inferred, inputs, trained):
    folder, names = inputs
    for name in names:
        sidecar = json.loads((inferred / name).with_suffix(".json").read_text(encoding="utf-8"))
        assert sidecar["input_sha256"] == file_sha256(folder / name)
        assert sidecar["model_sha256"] == file_sha256(trained.best)
        assert sidecar["settings"]["ensemble"]["sources"] == [file_sha256(trained.best)]
        assert {"lamina", "torch", "monai"} <= sidecar["versions"].keys()
        assert sidecar["used"]
        assert all((inferred / result).exists() for result in sidecar["results"])


@pytest.mark.parametrize("workers", [0, 2])
def test_inference_goes_past_a_bad_file_and_says_so(
    bundle, inferred, inputs, trained, tmp_path, workers
):
    folder = shutil.copytree(inputs[0], tmp_path / "inputs")
    bad, good = inputs[1]
    bundle.case.spoil_input(folder / bad)
    results = tmp_path / "results"
    run = {"dataset_dir": folder, "output_dir": results, "ckpt_path": trained.best}
    with pytest.raises(InputErrors, match=bad) as caught:
        bundle.run("inference", num_workers=workers, **run)
    assert caught.value.exit_code == 3
    with (results / "failures.csv").open(encoding="utf-8") as table:
        assert [(row["path"], row["code"]) for row in csv.DictReader(table)] == [(bad, "3")]
    summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    assert [summary[key] for key in ("done", "rejected", "exit_code")] == [1, 1, 3]
    stem = Path(good).with_suffix("").as_posix()
    for suffix in bundle.case.results:
        again, before = (run / f"{stem}{suffix}" for run in (results, inferred))
        assert bundle.case.content(again) == bundle.case.content(before)
    assert (results / "report.html").is_file()


def test_training_lists_every_bad_file_before_it_starts(bundle, dataset, tmp_path):
    folder = shutil.copytree(dataset, tmp_path / "data")
    images = sorted(folder.glob(bundle.case.training_inputs))[:2]
    for path in images:
        bundle.case.spoil_input(path)
    with pytest.raises(InputErrors) as caught:
        bundle.run("train", dataset_dir=folder, output_dir=tmp_path / "run")
    assert caught.value.exit_code == 3
    assert all(path.name in str(caught.value) for path in images)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_running_again_with_more_epochs_goes_on(bundle, dataset, trained, tmp_path):
    run = shutil.copytree(trained.folder, tmp_path / "run")
    before = loaded(run / "metrics_history.yaml")
    bundle.run("train", dataset_dir=dataset, output_dir=run, max_epochs=3)
    after = loaded(run / "metrics_history.yaml")
    assert after[:2] == before
    assert [entry["epoch"] for entry in after] == [1, 2, 3]
    assert read_checkpoint(run / "checkpoints" / "last.pt")["epoch"] == 3


def test_a_worse_continuation_leaves_the_best_checkpoint(bundle, dataset, trained, tmp_path):
    run = shutil.copytree(trained.folder, tmp_path / "run")
    last = run / "checkpoints" / "last.pt"
    content = read_checkpoint(last)
    content["training_state"]["monitor"]["best"] = bundle.case.unbeatable
    write_checkpoint(last, content)
    before = (run / "checkpoints" / "best.pt").read_bytes()
    bundle.run("train", dataset_dir=dataset, output_dir=run, max_epochs=3)
    assert not loaded(run / "metrics_history.yaml")[-1]["new_best"]
    assert (run / "checkpoints" / "best.pt").read_bytes() == before


@pytest.fixture(scope="module")
def foreign(bundle, dataset, tmp_path_factory) -> Path:
    """The best checkpoint of an overlay's architecture, made small."""
    overlay, settings = bundle.case.overlay
    run = tmp_path_factory.mktemp(f"{bundle.name}_{overlay}")
    bundle.run("train", (overlay,), dataset_dir=dataset, output_dir=run, max_epochs=1, **settings)
    return run / "checkpoints" / "best.pt"


def test_a_checkpoint_of_an_overlay_runs_by_its_path_alone(
    bundle, dataset, foreign, inputs, tmp_path
):
    out = {"output_dir": tmp_path, "ckpt_path": foreign}
    bundle.run("evaluate", dataset_dir=dataset, **out)
    assert loaded(tmp_path / "evaluation" / "test" / "test_metrics.yaml")["num_test_images"] == 2
    bundle.run("inference", dataset_dir=inputs[0], **out)
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["done"] == 2


@pytest.mark.parametrize("workflow", ["evaluate", "inference"])
def test_a_plain_run_with_another_architecture_names_the_overlay(
    bundle, dataset, foreign, inputs, tmp_path, workflow
):
    data = inputs[0] if workflow == "inference" else dataset
    run = bundle.workflow(workflow, dataset_dir=data, output_dir=tmp_path, ckpt_path=foreign)
    with pytest.raises(RuntimeError, match="check_definition") as caught:
        run.initialize()
    error = lamina_cause(caught.value)
    assert isinstance(error, CheckpointError)
    assert f"configs/{bundle.case.overlay[0]}.yaml" in str(error)


def test_a_plain_run_with_the_overlay_takes_its_checkpoint(bundle, dataset, foreign, tmp_path):
    overlay, settings = bundle.case.overlay
    paths = {"dataset_dir": dataset, "output_dir": tmp_path, "ckpt_path": foreign}
    bundle.workflow("evaluate", (overlay,), **paths, **settings).initialize()
