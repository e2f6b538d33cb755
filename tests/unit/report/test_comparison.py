from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigurationError, InputError
from pipeline.report.comparison import compare_runs, comparison_text
from pipeline.report.comparison_page import _short_names, comparison_report
from pipeline.report.directions import lower_is_better
from pipeline.report.intervals import bootstrap_interval
from pipeline.report.measures import fold_figures, read_measures

figures = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30)


@given(figures)
def test_an_interval_lies_within_the_values(values):
    low, high = bootstrap_interval(values, resamples=500)
    slack = 1e-12
    assert min(values) - slack <= low <= high <= max(values) + slack


@given(figures, st.randoms(use_true_random=False))
def test_the_order_of_the_images_decides_nothing(values, random):
    shuffled = random.sample(values, len(values))
    assert bootstrap_interval(values, resamples=200) == bootstrap_interval(shuffled, resamples=200)


@given(figures, st.floats(-5, 5))
def test_an_interval_moves_with_its_values(values, shift):
    moved = bootstrap_interval(np.array(values) + shift, resamples=200)
    expected = np.array(bootstrap_interval(values, resamples=200)) + shift
    np.testing.assert_allclose(moved, expected, atol=1e-9)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.normal(0.8, 0.1, 40), resamples=1000) for _ in range(300)]
    covered = np.mean([low <= 0.8 <= high for low, high in intervals])
    assert 0.90 <= covered <= 0.98


def test_more_images_make_a_narrower_interval():
    values = np.random.default_rng(0).random(400)
    few, many = (bootstrap_interval(values[:count]) for count in (20, 400))
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])


def test_many_images_are_resampled_in_parts():
    assert bootstrap_interval(np.ones(1_500_000), resamples=3) == (1.0, 1.0)


@pytest.mark.parametrize("values", [[0.1, np.nan], [[0.1, 0.2]]])
def test_an_interval_of_anything_but_numbers_is_refused(values):
    with pytest.raises(ValueError, match=r"values must be finite numbers \(N,\)"):
        bootstrap_interval(values)


def evaluation(folder: Path, dice: dict[str, float | None], **summary) -> Path:
    folder.mkdir(parents=True)
    rows = [{"image": name, "dice": value, "fov": "given"} for name, value in dice.items()]
    known = [value for value in dice.values() if value is not None]
    totals = {
        "manifest": "drive",
        "split": "test",
        "average_metrics": {"dice": statistics.fmean(known)},
        "pooled_metrics": {"dice": 0.5, "auc": None},
        **summary,
    }
    (folder / "per_image_metrics.yaml").write_text(yaml.safe_dump(rows))
    (folder / "test_metrics.yaml").write_text(yaml.safe_dump(totals))
    return folder


def training(folder: Path, best: float = 0.8) -> Path:
    folder.mkdir(parents=True)
    values = [best - 0.1, best, best - 0.2]
    history = [
        {"epoch": e, "val": {"val_dice": v, "val_loss": 1 - v}, "new_best": e < 3}
        for e, v in enumerate(values, start=1)
    ]
    (folder / "metrics_history.yaml").write_text(yaml.safe_dump([*history, {"epoch": 4}]))
    (folder / "config.yaml").write_text("early_stopping: {monitor: val_dice, mode: max}\n")
    return folder


def row_of(comparison, metric, run):
    (row,) = [r for r in comparison["rows"] if (r["metric"], r["run"]) == (metric, str(run))]
    return row


@pytest.fixture
def one(tmp_path):
    return evaluation(tmp_path / "one", {"a": 0.6, "b": 0.7, "c": 0.8, "d": None})


def test_an_evaluation_has_a_mean_and_an_interval_over_its_images(one):
    comparison = compare_runs([one])
    row = row_of(comparison, "test dice", one)
    assert (row["unit"], row["n"]) == ("image", 3)
    assert row["mean"] == pytest.approx(0.7)
    assert (row["low"], row["high"]) == bootstrap_interval([0.6, 0.7, 0.8])
    assert row["sd"] == pytest.approx(0.1)
    pooled = row_of(comparison, "test dice, pooled", one)
    assert (pooled["mean"], pooled["n"], pooled["low"]) == (0.5, None, None)
    assert "test auc, pooled" not in {row["metric"] for row in comparison["rows"]}


def test_the_difference_is_taken_image_by_image(one, tmp_path):
    other = evaluation(tmp_path / "other", {"c": 0.83, "b": 0.72, "a": 0.61, "d": 0.9})
    difference = row_of(compare_runs([one, other]), "test dice", other)["difference"]
    assert difference["n"] == 3
    assert difference["mean"] == pytest.approx(0.02)
    assert (difference["low"], difference["high"]) == pytest.approx(
        bootstrap_interval([0.01, 0.02, 0.03])
    )


def test_a_run_does_not_differ_from_itself(one):
    rows = compare_runs([one, one])["rows"]
    (difference,) = [row["difference"] for row in rows if row["difference"]]
    assert (difference["mean"], difference["low"], difference["high"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("dice", "summary"),
    [
        ({"a": 0.6, "b": 0.7}, {"manifest": "stare"}),
        ({"x": 0.6, "y": 0.7, "a": 0.1}, {}),
        ({"a": 0.6, "b": 0.7}, {"dataset_dir": None}),
    ],
    ids=["another data set", "other images", "a phantom of its own"],
)
def test_different_images_are_not_paired(one, tmp_path, dice, summary):
    other = evaluation(tmp_path / "other", dice, **summary)
    comparison = compare_runs([one, other])
    row = row_of(comparison, "test dice", other)
    assert row["difference"] is None
    assert row["note"] == "other images than the first"
    assert row["low"] is not None


def test_one_common_image_is_too_few_for_a_difference(tmp_path):
    folders = [evaluation(tmp_path / name, {"a": 0.6}) for name in ("one", "other")]
    row = row_of(compare_runs(folders), "test dice", folders[1])
    assert (row["difference"], row["note"]) == (None, "too few images for a difference")


def test_a_training_is_known_by_its_best_epoch_and_its_evaluations(tmp_path):
    run = training(tmp_path / "run")
    evaluation(run / "evaluation" / "val", {"a": 0.6, "b": 0.7}, split="val")
    measures = read_measures(run)
    assert measures["val_dice"].value == pytest.approx(0.8)
    assert measures["val_dice"].note == "best epoch 2"
    assert measures["val_loss"].value == pytest.approx(0.2)
    assert measures["val dice"].values == {"a": 0.6, "b": 0.7}


def test_the_figures_of_a_fold_are_those_of_its_best_epoch(tmp_path):
    assert fold_figures(training(tmp_path / "run")) == {
        "metric": "val_dice", "best": pytest.approx(0.8), "best_epoch": 2, "epochs": 4,
    }  # fmt: skip
    nothing = {"metric": None, "best": None, "best_epoch": None, "epochs": 0}
    assert fold_figures(tmp_path / "absent") == nothing


def folds(base: Path, best: list[float], *, undone: int | None = None, **summary) -> Path:
    for number, value in enumerate(best):
        training(base / f"fold_{number}", value)
    runs = [
        {"fold": number, "status": "failed" if number == undone else "done"}
        for number in range(len(best))
    ]
    identity = {"manifest": "drive", "count": len(best), "fold_seed": 1, **summary}
    (base / "folds.yaml").write_text(yaml.safe_dump({**identity, "runs": runs}))
    return base


def test_folds_have_mean_and_deviation(tmp_path):
    best = [0.7, 0.8, 0.75, 0.72, 0.78]
    row = row_of(compare_runs([folds(tmp_path / "cv", best)]), "val_dice", tmp_path / "cv")
    assert (row["unit"], row["n"], row["low"]) == ("fold", 5, None)
    assert row["mean"] == pytest.approx(statistics.fmean(best))
    assert row["sd"] == pytest.approx(statistics.stdev(best))
    assert row["values"] == pytest.approx({str(k): value for k, value in enumerate(best)})


def test_a_fold_that_is_not_done_is_left_out_and_said(tmp_path):
    base = folds(tmp_path / "cv", [0.7, 0.8, 0.1], undone=2)
    row = row_of(compare_runs([base]), "val_dice", base)
    assert row["mean"] == pytest.approx(0.75)
    assert row["note"] == "1 more not done"


def test_folds_of_the_same_cases_are_paired(tmp_path):
    one = folds(tmp_path / "one", [0.7, 0.8, 0.6])
    two = folds(tmp_path / "two", [0.71, 0.82, 0.63])
    other = folds(tmp_path / "other", [0.7, 0.8, 0.6], fold_seed=2)
    comparison = compare_runs([one, two, other])
    difference = row_of(comparison, "val_dice", two)["difference"]
    assert difference["mean"] == pytest.approx(0.02)
    assert difference["sd"] == pytest.approx(0.01)
    assert row_of(comparison, "val_dice", other)["difference"] is None


def test_only_the_metrics_asked_for_are_shown(tmp_path):
    run = training(tmp_path / "run")
    assert {row["metric"] for row in compare_runs([run], ["val_dice"])["rows"]} == {"val_dice"}
    with pytest.raises(ConfigurationError, match=r"no run has a metric 'val_dic'.*'val_dice'"):
        compare_runs([run], ["val_dic"])


def test_the_table_lines_up_and_says_what_it_shows(one, tmp_path):
    other = evaluation(tmp_path / "other", {"a": 0.61, "b": 0.72, "c": 0.83})
    text = comparison_text(compare_runs([one, other], ["test dice"]))
    head, first, second, *notes = text.splitlines()
    for column in ("run", "of", "mean", "95 % interval", "sd", "difference"):
        place = head.index(column)
        assert all(line[place - 2 : place] == "  " for line in (head, first, second))
    assert "3 images" in first
    assert "+0.0200" in second
    assert "10000 bootstrap resamples of the images, seed 0" in notes[0]
    assert str(one) in notes[1]


def test_a_column_that_would_be_empty_is_left_out(tmp_path):
    text = comparison_text(compare_runs([training(tmp_path / "run")]))
    head = text.splitlines()[0].split()
    assert head == ["metric", "run", "mean", "note"]


def test_a_comparison_is_plain_data(one):
    comparison = compare_runs([one, one])
    assert json.loads(json.dumps(comparison, allow_nan=False)) == comparison


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (None, "no such folder"),
        ({}, "nothing to compare; expected the folder of a run"),
        ({"metrics_history.yaml": "[1]"}, "expected a list of epochs"),
        ({"per_image_metrics.yaml": "{}\n---"}, "per_image_metrics.yaml"),
        ({"per_image_metrics.yaml": "[{dice: 1}]"}, "expected a list of images"),
        ({"test_metrics.yaml": "[1]"}, "expected a mapping of metrics"),
    ],
)
def test_a_folder_that_cannot_be_compared_is_named(tmp_path, files, reason):
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises((InputError, ConfigurationError), match=reason) as caught:
        compare_runs([folder])
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("test mae_px", True), ("val_loss", True), ("test nll, pooled", True), ("test ece", True),
        ("voi_split", True), ("ilm_p95_px", True), ("order_violations", True),
        ("test dice", False), ("voi_score", False), ("surface_dice", False), ("ilm_ccc", False),
        ("test top5, pooled", False), ("val_macro_f1_48", False), ("truth_probability", False),
        ("vessel_density", None), ("ilm_bias_px", None), ("predicted_probability", None),
        ("temperature", None),
    ],
)  # fmt: skip
def test_a_name_tells_whether_less_is_better(metric, expected):
    assert lower_is_better(metric) is expected


def of_metric(folder: Path, metric: str, values: list[float]) -> Path:
    folder.mkdir(parents=True)
    rows = [{"image": str(number), metric: value} for number, value in enumerate(values)]
    (folder / "per_image_metrics.yaml").write_text(yaml.safe_dump(rows))
    totals = {"manifest": "m", "average_metrics": {metric: statistics.fmean(values)}}
    (folder / "test_metrics.yaml").write_text(yaml.safe_dump(totals))
    return folder


@pytest.mark.parametrize(
    ("metric", "step", "verdict"),
    [
        ("mae_px", -0.1, "better"), ("mae_px", 0.1, "worse"),
        ("dice", -0.1, "worse"), ("dice", 0.1, "better"),
        ("vessel_density", 0.1, ""), ("mae_px", 0.0, ""),
    ],
)  # fmt: skip
def test_less_of_an_error_is_better_and_less_of_a_score_is_worse(tmp_path, metric, step, verdict):
    values = [0.5, 0.6, 0.8, 0.7]
    one = of_metric(tmp_path / "one", metric, values)
    two = of_metric(tmp_path / "two", metric, [value + step for value in values])
    comparison = compare_runs([one, two])
    difference = row_of(comparison, f"test {metric}", two)["difference"]
    assert difference["mean"] == pytest.approx(step)
    assert difference["verdict"] == verdict
    assert comparison_text(comparison).splitlines()[2].endswith(verdict or "]")


def test_a_difference_within_chance_has_no_verdict(tmp_path):
    one = of_metric(tmp_path / "one", "mae_px", [0.5, 0.6, 0.8, 0.7])
    two = of_metric(tmp_path / "two", "mae_px", [0.6, 0.5, 0.9, 0.6])
    assert row_of(compare_runs([one, two]), "test mae_px", two)["difference"]["verdict"] == ""


def classifier(folder: Path, right: list[bool]) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for number, correct in enumerate(right):
        truth, other = ("ant", "bee") if number % 2 else ("bee", "ant")
        predicted = truth if correct else other
        rows.append(
            {"image": str(number), "truth": truth, "predicted": predicted, "correct": correct}
        )
    (folder / "per_image_metrics.yaml").write_text(yaml.safe_dump(rows))
    pooled = {"accuracy": statistics.fmean(right), "macro_f1": 0.5, "ece": 0.1}
    totals = {"manifest": "ip102", "split": "test", "pooled_metrics": pooled}
    (folder / "test_metrics.yaml").write_text(yaml.safe_dump(totals))
    return folder


def test_a_classifiers_accuracy_and_f1_have_intervals_and_paired_differences(tmp_path):
    one = classifier(tmp_path / "one", [n % 4 != 0 for n in range(40)])
    two = classifier(tmp_path / "two", [True] * 40)
    comparison = compare_runs([one, two])
    accuracy = row_of(comparison, "test accuracy", one)
    assert (accuracy["mean"], accuracy["n"]) == (0.75, 40)
    assert (accuracy["low"], accuracy["high"]) == bootstrap_interval([0.0] * 10 + [1.0] * 30)
    f1 = row_of(comparison, "test macro_f1, pooled", two)
    assert (f1["unit"], f1["n"], f1["low"], f1["high"]) == ("image", 40, 1.0, 1.0)
    for metric in ("test accuracy", "test macro_f1, pooled"):
        difference = row_of(comparison, metric, two)["difference"]
        assert difference["verdict"] == "better"
        assert 0 < difference["low"] <= difference["mean"] <= difference["high"]
    ece = row_of(comparison, "test ece, pooled", two)
    assert (ece["lower_is_better"], ece["low"], ece["difference"]) == (True, None, None)


def test_classifiers_of_other_images_are_not_paired(tmp_path):
    one = classifier(tmp_path / "one", [True, False] * 5)
    two = classifier(tmp_path / "two", [True, False] * 4)
    row = row_of(compare_runs([one, two]), "test macro_f1, pooled", two)
    assert row["difference"] is None
    assert "other images than the first" in row["note"]


def test_a_comparison_page_shows_every_run_metric_and_verdict(tmp_path):
    one = classifier(tmp_path / "runs" / "one" / "test", [n % 4 != 0 for n in range(40)])
    two = classifier(tmp_path / "runs" / "two" / "test", [True] * 40)
    text = comparison_report(compare_runs([one, two]), tmp_path / "report.html").read_text()
    assert text.count("<svg") == 2
    assert "test macro_f1, pooled, higher is better" in text
    assert ">one</text>" in text
    assert ">better</td>" in text
    assert str(two) in text


def test_a_comparison_page_of_folds_or_of_one_run_can_be_made(tmp_path):
    base = folds(tmp_path / "cv", [0.7, 0.8])
    text = comparison_report(compare_runs([base]), tmp_path / "report.html").read_text()
    assert "2 folds" in text
    single = compare_runs([training(tmp_path / "run")])
    assert "<svg" in comparison_report(single, tmp_path / "one.html").read_text()


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        (["/r/a/evaluation/test", "/r/b/evaluation/test"], ["a", "b"]),
        (["/r/a/fold_0", "/r/b/fold_1"], ["a/fold_0", "b/fold_1"]),
        (["a", "a/b"], ["a", "a/b"]),
        (["/r/a"], ["a"]),
        (["a", "a"], ["a"]),
        (["."], ["."]),
    ],
)
def test_runs_are_called_by_what_tells_them_apart(runs, names):
    assert list(_short_names(runs).values()) == names
