from __future__ import annotations

import csv
import json
import re
import shutil
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
from pipeline.report.intervals import bootstrap_interval
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
    assert "<dt>time</dt><dd>2 min</dd>" in text
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
    interval = bootstrap_interval([0.8, 0.5, 0.9])
    expected = [0.7333, *interval, np.std([0.8, 0.5, 0.9]), 0.5, 0.9, 0.75]
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
    modules = "comparison_page, evaluation, figures, inference, page, preview, training"
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


def test_a_preview_leaves_out_what_cannot_be_read_and_says_so(tmp_path):
    from pipeline.data.samples import Sample

    paths = picture(tmp_path / "image.png"), tmp_path / "broken.png"
    paths[1].write_bytes(b"no picture")
    samples = [Sample(p.stem, p, None, None, None, "a", "train", None, tmp_path) for p in paths]
    problems = []
    assert len(preview_rows(samples, problems=problems)) == 1
    (problem,) = problems
    assert (problem.path, problem.code) == ("broken.png", InputError.exit_code)
    with pytest.raises(InputError, match=r"broken\.png"):
        preview_rows(samples)


@pytest.fixture
def classes(tmp_path):
    """An evaluation of a classifier: 30 images, the 6 hardest of them drawn."""
    rng = np.random.default_rng(0)
    images = []
    for number in range(30):
        truth = "ant" if number % 2 else "bee"
        right = number >= 8
        images.append(
            {
                "image": f"images/{number:02d}.jpg",
                "truth": truth,
                "truth_probability": 0.02 * number + 0.1,
                "predicted": truth if right else ("bee" if truth == "ant" else "ant"),
                "predicted_probability": float(rng.uniform(0.5, 1)),
                "correct": right,
            }
        )
        if number < 6:
            picture(tmp_path / "pictures" / "images" / f"{number:02d}.png")
    pooled = {"accuracy": 22 / 30, "macro_f1": 0.7, "ece": 0.1}
    metrics = {
        "experiment": "pests", "split": "test", "num_test_images": 30, "classes": 2,
        "average_metrics": {"truth_probability": 0.39}, "pooled_metrics": pooled,
        "strata": {"field": {"images": 10, "accuracy": 0.5}, "trap": {"images": 20}},
        "picture_legend": "As the network saw them.",
    }  # fmt: skip
    (tmp_path / "test_metrics.yaml").write_text(yaml.safe_dump(metrics))
    (tmp_path / "per_image_metrics.yaml").write_text(yaml.safe_dump(images))
    (tmp_path / "confusion_matrix.csv").write_text("truth/predicted,ant,bee\nant,11,4\nbee,3,12\n")
    (tmp_path / "per_class_metrics.csv").write_text("class,support,f1\nant,15,0.75\nbee,15,nan\n")
    picture(tmp_path / "confusion_matrix.png")
    return tmp_path


def test_a_classifiers_page_has_matrix_confusions_classes_and_calibration(classes):
    text = evaluation_report(classes, "truth_probability").read_text()
    assert 'alt="Confusion matrix: truth along the rows"' in text
    cells = re.findall(r'<td[^>]*data-v="(ant|bee)">', text.split("Most frequent")[1])
    assert cells[:4] == ["ant", "bee", "bee", "ant"]  # 4 of one kind, 3 of the other
    assert ">0.2667<" in text
    assert "Expected calibration error" in text
    assert "As the network saw them." in text
    assert "field" in text.split("Strata")[1]


def test_the_accuracy_of_a_classifier_has_an_interval(classes):
    text = evaluation_report(classes, "truth_probability").read_text()
    low, high = bootstrap_interval([0.0] * 8 + [1.0] * 22)
    assert f"<small>{low:.3g} to {high:.3g}</small>" in text
    row = re.search(r'data-v="macro_f1">macro_f1</td>(.*?)</tr>', text).group(1)
    assert len(re.findall(r">0\.\d{4}</td>", row)) == 3  # from, to, pooled


def test_where_only_hard_images_were_drawn_they_are_called_so(classes):
    text = evaluation_report(classes, "truth_probability").read_text()
    assert "<h3>Hardest</h3>" in text
    assert "<h3>Best" not in text
    assert 'alt="images/00: truth_probability 0.1; bee, predicted ant"' in text
    assert "6 of 30 images have a picture" in text


def test_a_name_leads_to_its_picture_whatever_its_suffix(evaluation):
    rows = [{"image": "eyes/a.ppm.gz", "dice": 0.5}, {"image": "/elsewhere/b.tif", "dice": 0.6}]
    (evaluation / "per_image_metrics.yaml").write_text(yaml.safe_dump(rows))
    text = evaluation_report(evaluation).read_text()
    target = re.search(r'<a href="#(p\d+)">eyes/a.ppm.gz</a>', text).group(1)
    assert f'<figure id="{target}"' in text
    assert ">/elsewhere/b.tif</td>" in text


def test_an_error_puts_the_highest_first_without_being_told(evaluation):
    rows = [{"image": "a.png", "mae_px": 0.5}, {"image": "b.png", "mae_px": 2.0}]
    (evaluation / "per_image_metrics.yaml").write_text(yaml.safe_dump(rows))
    assert "Highest mae_px first" in evaluation_report(evaluation).read_text()


def test_figures_over_all_columns_of_an_eye_are_pooled(evaluation):
    metrics = {"average_metrics": {"mae_px": 1.0}, "overall": {"mae_px": 2.5, "worst": "a.png"}}
    (evaluation / "test_metrics.yaml").write_text(yaml.safe_dump(metrics))
    text = evaluation_report(evaluation).read_text()
    assert ">2.5000<" in text
    assert 'data-v="worst"' not in text


@pytest.mark.parametrize(
    "left_out",
    [["pictures"], ["per_image_metrics.yaml"], ["test_metrics.yaml"],
     ["pictures", "test_metrics.yaml"]],
    ids=["no pictures", "no rows", "no summary", "rows alone"],
)  # fmt: skip
def test_half_an_evaluation_still_gives_a_page(classes, left_out):
    for name in left_out:
        path = classes / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = evaluation_report(classes).read_text()
    assert "<h2" in text
    assert ("did not end" in text) == ("test_metrics.yaml" in left_out)


def test_empty_tables_still_give_a_page(classes, inference):
    for name in ("confusion_matrix.csv", "per_class_metrics.csv", "failures.csv", "per_image.csv"):
        (classes / name).write_text("")
    (classes / "per_image_metrics.yaml").write_text("[]")
    assert "No image was evaluated" in evaluation_report(classes).read_text()
    assert "No image was processed" in inference_report(inference).read_text()


def test_failures_of_an_evaluation_have_a_section_of_their_own(evaluation):
    (evaluation / "failures.csv").write_text('path,stage,code,message\nx.png,read,3,"a\nb"\n')
    text = evaluation_report(evaluation).read_text()
    assert "Rejected inputs" in text
    assert "1 input was not processed" in text


def test_predictions_are_counted_by_class(inference):
    table = "image,class,index,probability\na.png,007,0,0.9\nb.png,007,0,0.7\nc.png,bee,1,0.5\n"
    (inference / "predictions.csv").write_text(table)
    text = inference_report(inference).read_text()
    row = re.search(r'data-v="007">007</td>(.*?)</tr>', text).group(1)
    assert re.findall(r">([\d.]+)</td>", row) == ["2", "0.8000", "0.7000"]


def test_predictions_without_a_summary_still_give_a_page(inference):
    (inference / "summary.json").unlink()
    assert "the run did not end" in inference_report(inference).read_text()


def test_a_run_before_its_first_epoch_has_a_page(training):
    (training / "metrics_history.yaml").unlink()
    text = training_report(training).read_text()
    assert "No epoch has ended yet" in text
    assert "<svg" not in text


def test_a_plan_is_shown_with_its_reasons_and_an_old_run_has_none(training):
    assert "<h2 id" in training_report(training).read_text()
    assert ">Plan<" not in training_report(training).read_text()
    plan = {
        "device": "cpu",
        "batch_size": 4,
        "effective_batch_size": 4,
        "reasons": {"device": "no GPU"},
    }
    environment = {"device": "cpu", "plan": plan}
    (training / "environment.json").write_text(json.dumps(environment))
    text = training_report(training).read_text()
    assert "no GPU" in text
    assert "4, in one step" in text


def test_image_sizes_share_a_chart(training):
    history = [
        {"epoch": e, "val": {"val_loss": 1 / e, "val_loss_96": 2 / e, "val_loss_48": 3 / e}}
        for e in (1, 2)
    ]
    (training / "metrics_history.yaml").write_text(yaml.safe_dump(history))
    text = training_report(training).read_text()
    assert text.count("<svg") == 1
    assert ">96 px</text>" in text


def test_only_the_ends_of_a_long_log_are_kept(training):
    (training / "run.log").write_text("\n".join(f"line {n}" for n in range(1000)))
    text = training_report(training).read_text()
    assert "line 0\n" in text
    assert "line 999" in text
    assert "line 500\n" not in text
    assert "800 lines are left out" in text


def test_a_training_page_leads_to_the_evaluations_below_it(training):
    folder = training / "evaluation" / "test"
    folder.mkdir(parents=True)
    (folder / "test_metrics.yaml").write_text("pooled_metrics: {dice: 0.5}\n")
    assert 'data-v="test">test</td>' in training_report(training).read_text()
    evaluation_report(folder)
    text = training_report(training).read_text()
    assert '<a href="evaluation/test/report.html">test</a>' in text


def test_a_run_without_a_validated_epoch_says_so(training):
    (training / "metrics_history.yaml").write_text("- {epoch: 1, train: {loss: 1.0}}\n")
    assert "No epoch was validated" in training_report(training).read_text()
