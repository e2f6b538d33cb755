from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.errors import ConfigurationError, InputError
from pipeline.report.evaluation import evaluation_report
from pipeline.report.inference import inference_report
from pipeline.report.preview import preview_rows
from pipeline.report.training import training_report


def picture(path: Path, value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)
    return path


@pytest.fixture
def training(tmp_path):
    history = [
        {
            "epoch": epoch,
            "train": {"loss": 1 / epoch, "dice": epoch / 10},
            "learning_rate": 0.01 / epoch,
            "seconds": 30.0,
            "new_best": epoch == 2,
            **({"val": {"val_loss": 0.5, "val_dice": 0.7 + epoch / 100}} if epoch % 2 == 0 else {}),
        }
        for epoch in range(1, 5)
    ]
    (tmp_path / "metrics_history.yaml").write_text(yaml.safe_dump(history))
    (tmp_path / "config.yaml").write_text("seed: 7\nnetwork: $@network_def\nname: <b>bold</b>\n")
    (tmp_path / "environment.json").write_text(json.dumps({"device": "cpu", "command": "train x"}))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.pt").write_bytes(b"1")
    picture(tmp_path / "pictures" / "best_2.png")
    return tmp_path


@pytest.fixture
def evaluation(tmp_path):
    dices = [0.8, 0.5, None, 0.9]
    images = [
        {"image": f"eyes/{name}.tif", "dice": dice, "fov": "given"}
        for name, dice in zip("abcd", dices, strict=True)
    ]
    metrics = {
        "experiment": "first",
        "checkpoint": "best.pt",
        "num_test_images": 4,
        "average_metrics": {"dice": 0.7333},
        "pooled_metrics": {"dice": 0.75, "auc": None},
        "threshold": 0.4,
    }
    (tmp_path / "test_metrics.yaml").write_text(yaml.safe_dump(metrics))
    (tmp_path / "per_image_metrics.yaml").write_text(yaml.safe_dump(images))
    for name in "abcd":
        picture(tmp_path / "pictures" / "eyes" / f"{name}.png")
    return tmp_path


@pytest.fixture
def inference(tmp_path):
    summary = {"bundle": "fundus_vessels", "done": 1, "rejected": 1, "exit_code": 3}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "per_image.csv").write_text("image,vessel_density\na.png,0.125\n")
    with (tmp_path / "failures.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "stage", "code", "message"])
        writer.writerow(["b.png", "read", 3, "truncated, 12 bytes"])
    picture(tmp_path / "pictures" / "a.png")
    return tmp_path


def test_a_training_page_shows_curves_best_epoch_pictures_and_settings(training):
    text = training_report(training).read_text()
    assert text.count("<svg") == 3
    assert "<dt>best epoch</dt><dd>2</dd>" in text
    assert "<dt>minutes</dt><dd>2</dd>" in text
    assert 'alt="best_2"' in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text
    assert "<b>bold" not in text
    assert "checkpoints/best.pt" in text


def test_a_training_page_needs_the_history_alone(training):
    for path in ("config.yaml", "environment.json", "checkpoints/best.pt", "pictures/best_2.png"):
        (training / path).unlink()
    assert "<svg" in training_report(training).read_text()


def test_a_page_made_again_is_the_same(training, tmp_path):
    first = training_report(training).read_bytes()
    assert training_report(str(training)).read_bytes() == first


def test_an_evaluation_page_puts_the_lowest_score_first_and_the_unknown_last(evaluation):
    text = evaluation_report(evaluation).read_text()
    order = re.findall(r'alt="eyes/(\w): dice ([\d.-]+)"', text)
    assert order == [("b", "0.5"), ("a", "0.8"), ("d", "0.9"), ("c", "-")]
    assert "<dt>threshold</dt><dd>0.4</dd>" in text


def test_where_less_is_better_the_highest_comes_first_and_the_unknown_last(evaluation):
    text = evaluation_report(evaluation, "dice", lower_is_better=True).read_text()
    order = re.findall(r'alt="eyes/(\w): dice ([\d.-]+)"', text)
    assert order == [("d", "0.9"), ("a", "0.8"), ("b", "0.5"), ("c", "-")]
    assert "Highest dice first" in text


def test_the_range_over_the_images_stands_beside_the_mean(evaluation):
    text = evaluation_report(evaluation).read_text()
    row = re.search(r'data-v="dice">dice</td>(.*?)</tr>', text).group(1)
    cells = re.findall(r">([\d.-]+)</td>", row)
    expected = [0.7333, 0.75, np.std([0.8, 0.5, 0.9]), 0.5, 0.9]
    np.testing.assert_allclose([float(cell) for cell in cells], expected, atol=1e-4)


def test_of_many_pictures_the_extremes_and_the_middle_are_shown(evaluation):
    images = [{"image": f"{index:02d}.png", "dice": index / 100} for index in range(40)]
    (evaluation / "per_image_metrics.yaml").write_text(yaml.safe_dump(images))
    for path in evaluation.rglob("pictures/eyes/*.png"):
        path.unlink()
    for image in images:
        picture(evaluation / "pictures" / image["image"])
    text = evaluation_report(evaluation).read_text()
    shown = [int(index) for index in re.findall(r'alt="(\d+): dice', text)]
    assert shown == [0, 1, 2, 3, 18, 19, 20, 21, 36, 37, 38, 39]
    assert "of 40" in text


def test_an_inference_page_lists_rejected_inputs_first(inference):
    text = inference_report(inference).read_text()
    assert text.index("truncated, 12 bytes") < text.index("<img")
    assert 'data-v="0.125">0.1250' in text


@pytest.mark.parametrize("report", [training_report, evaluation_report, inference_report])
def test_a_folder_of_something_else_is_refused(tmp_path, report):
    with pytest.raises(InputError, match=str(tmp_path)):
        report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_malformed_file_is_named(training, inference):
    (training / "metrics_history.yaml").write_text("[1")
    with pytest.raises(ConfigurationError, match=r"metrics_history\.yaml"):
        training_report(training)
    (inference / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json"):
        inference_report(inference)


def test_the_report_room_needs_no_torch():
    modules = "evaluation, figures, inference, page, preview, run_files, training"
    code = f"import sys\nfrom pipeline.report import {modules}\nsys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_preview_rows_show_the_label_and_fresh_variants(tmp_path):
    from pipeline.data.samples import Sample

    image, label = picture(tmp_path / "image.png"), tmp_path / "label.png"
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(label)
    sample = Sample("a", image, label, None, None, "a", "train", None, tmp_path)
    calls = []

    def transform(case):
        calls.append(case)
        return {"image": np.full((3, 4, 4), len(calls)), "label": np.ones((1, 4, 4), np.uint8)}

    (row,) = preview_rows([sample], transform, variants=2)
    assert list(row) == ["image", "label", "variant 1", "variant 2"]
    assert calls == [{"image": str(image), "label": str(label), "name": "image.png"}] * 2
    changed = (row["label"] != row["image"]).any(axis=-1)
    np.testing.assert_array_equal(changed, np.eye(8, dtype=bool))
    assert row["variant 1"].shape == (256, 256, 3)
    (plain,) = preview_rows([sample])
    assert list(plain) == ["image", "label"]
