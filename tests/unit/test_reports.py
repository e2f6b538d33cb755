from __future__ import annotations

import json
import os

import pytest
import yaml

from pipeline import cli
from pipeline.errors import InputError
from pipeline.reports import write_report


def plain(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content)
    path.write_text(text, encoding="utf-8")


def predictions(folder):
    plain(folder / "summary.json", {"bundle": "tiny", "inputs": 3, "done": 3})


def evaluation(folder):
    rows = [{"image": "a.png", "dice": 0.2}, {"image": "b.png", "dice": 0.9}]
    plain(folder / "test_metrics.yaml", {"experiment": "mine", "average_metrics": {"dice": 0.55}})
    plain(folder / "per_image_metrics.yaml", rows)


def training(folder):
    epoch = {"epoch": 1, "train": {"loss": 1.0}, "val": {"val_dice": 0.5}, "seconds": 1.0}
    plain(folder / "metrics_history.yaml", [epoch])


@pytest.mark.parametrize(
    ("make", "title"),
    [(predictions, "Predictions"), (evaluation, "Evaluation"), (training, "Training")],
)
def test_a_page_is_written_again_whichever_folder_it_is(tmp_path, capsys, make, title):
    make(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'report.html'}\n"
    assert title in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_of_several_runs_in_a_folder_the_last_has_the_page(tmp_path):
    predictions(tmp_path)
    training(tmp_path)
    os.utime(tmp_path / "summary.json", (2e9, 2e9))
    assert "Predictions" in write_report(tmp_path).read_text(encoding="utf-8")
    os.utime(tmp_path / "metrics_history.yaml", (3e9, 3e9))
    assert "Training" in write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("call", "given"),
    [
        ("evaluation_report(@evaluation_dir, 'nll', lower_is_better=True)", ("nll", True)),
        ("evaluation_report(@evaluation_dir, @monitored)", ("hd95", False)),
        ("evaluation_report(@evaluation_dir)", (None, False)),
        ("evaluation_report(@evaluation_dir, __import__('os').sep)", (None, False)),
    ],
)
def test_the_page_is_told_what_its_bundle_told_it(tmp_path, monkeypatch, call, given):
    import pipeline.reports as room

    evaluation(tmp_path)
    plain(tmp_path / "config.yaml", {"run": ["$@evaluator.run()", f"${call}"], "monitored": "hd95"})
    asked = []

    def evaluation_report(folder, metric=None, *, lower_is_better=False):
        asked.append((metric, lower_is_better))
        return folder

    monkeypatch.setitem(room._PAGES, "test_metrics.yaml", evaluation_report)
    write_report(tmp_path)
    assert asked == [given]


def test_another_folder_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(InputError, match=r"no summary\.json, test_metrics\.yaml"):
        write_report(tmp_path)
    assert cli.main(["report", str(tmp_path / "absent")]) == 3
    assert capsys.readouterr().err.count("\n") == 1
