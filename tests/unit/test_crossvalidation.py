from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from pipeline import arguments, cli
from pipeline.crossvalidation import FoldsPlan, cross_validate, plan_folds
from pipeline.errors import ConfigurationError
from pipeline.report.folds import folds_text
from pipeline.training.run_lock import RunLock

TRAIN = """
name: default
manifest: drive
fold: null
fold_seed: null
output_dir: $some_expression(@name, @fold)
max_epochs: 3
seed: 1
resume: auto
run: []
"""
# What stands for a training: it leaves a run's files, and does to fold k what behaviour.json says.
CHILD = """
import json, os, pathlib, signal, sys, time
folder, fold = pathlib.Path(sys.argv[1]), sys.argv[2]
base = folder.parent
does = json.loads((base / "behaviour.json").read_text()).get(fold, "train")
with (base / "calls").open("a") as calls:
    calls.write(fold + "\\n")
received = []
def save(number, frame):
    received.append(signal.Signals(number).name)
    (folder / "received").write_text(" ".join(received))
if does == "wait":
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, save)
folder.mkdir(exist_ok=True)
best = 0.8 + int(fold) / 100
history = [{"epoch": 1, "val": {"val_dice": best}, "new_best": True}, {"epoch": 2}]
(folder / "metrics_history.yaml").write_text(json.dumps(history))
(folder / "config.yaml").write_text("early_stopping: {monitor: val_dice}")
(folder / "group").write_text(str(os.getpgid(0)))
if isinstance(does, int):
    pathlib.Path(os.environ["LAMINA_ERROR_FILE"]).write_text(f"fold {fold} is spoilt")
    sys.exit(does)
if does == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
(base / "ready").touch()
until = time.monotonic() + (30 if does in ("wait", "linger") else 0)
while time.monotonic() < until:
    time.sleep(0.01)
    if received:
        time.sleep(0.2)
        sys.exit(130 if received[0] == "SIGINT" else 75)
"""


@pytest.fixture
def configs(tmp_path, monkeypatch):
    folder = tmp_path / "bundles" / "tiny" / "configs"
    folder.mkdir(parents=True)
    (folder / "train.yaml").write_text(TRAIN)
    (folder / "metadata.json").write_text('{"version": "0.1.0"}')
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def trained(configs, monkeypatch):
    """Train the folds of `drive` (five) by `CHILD`; returns outcome and folds commanded."""

    def command(plan, fold, *, debug=False):
        return [sys.executable, "-c", CHILD, str(plan.fold_folder(fold)), str(fold)]

    monkeypatch.setattr(FoldsPlan, "command", command)

    def train(behaviour=None, *, continue_on_error=False, **overrides):
        plan = plan_folds("tiny", (), {"output_dir": "cv", **overrides})
        plan.folder.mkdir(exist_ok=True)
        does = {str(fold): what for fold, what in (behaviour or {}).items()}
        (plan.folder / "behaviour.json").write_text(json.dumps(does))
        (plan.folder / "calls").write_text("")
        outcome = cross_validate(plan, continue_on_error=continue_on_error)
        return outcome, [int(fold) for fold in (plan.folder / "calls").read_text().split()]

    return train


def statuses(outcome):
    assert yaml.safe_load(outcome.path.read_text()) == outcome.summary
    return [entry["status"] for entry in outcome.summary["runs"]]


def test_every_fold_is_trained_once_and_accounted_for(trained):
    outcome, calls = trained()
    assert (outcome.exit_code, outcome.error, calls) == (0, "", [0, 1, 2, 3, 4])
    assert statuses(outcome) == ["done"] * 5
    total = outcome.summary["total"]
    best = [0.80, 0.81, 0.82, 0.83, 0.84]
    assert [entry["best"] for entry in outcome.summary["runs"]] == pytest.approx(best)
    assert total["mean"] == pytest.approx(statistics.fmean(best))
    assert total["sd"] == pytest.approx(statistics.stdev(best))
    assert total["seconds"] == pytest.approx(sum(e["seconds"] for e in outcome.summary["runs"]))
    entry = outcome.summary["runs"][2]
    assert (entry["metric"], entry["best_epoch"], entry["epochs"]) == ("val_dice", 1, 2)
    assert entry["error"] is None
    assert entry["started"] <= entry["ended"]


def test_the_first_failure_ends_it_with_its_own_exit_code(trained):
    outcome, calls = trained({1: 6})
    assert (outcome.exit_code, calls) == (6, [0, 1])
    assert statuses(outcome) == ["done", "failed", "waiting", "waiting", "waiting"]
    assert outcome.summary["runs"][1]["error"] == "fold 1 is spoilt"
    assert outcome.error.startswith("fold 1: fold 1 is spoilt; ")


def test_a_failure_of_the_last_fold_keeps_its_exit_code_too(trained):
    assert trained({4: 4})[0].exit_code == 4


def test_the_others_are_trained_on_request_and_the_code_says_so(trained):
    outcome, calls = trained({1: 6, 3: 2}, continue_on_error=True)
    assert (outcome.exit_code, calls) == (3, [0, 1, 2, 3, 4])
    assert statuses(outcome) == ["done", "failed", "done", "failed", "done"]
    assert outcome.summary["total"]["folds"] == {"done": 3, "failed": 2}
    assert outcome.summary["total"]["mean"] == pytest.approx((0.80 + 0.82 + 0.84) / 3)


def test_the_same_command_goes_on_where_it_stopped(trained):
    first, _ = trained({1: 6})
    outcome, calls = trained()
    assert (outcome.exit_code, calls) == (0, [1, 2, 3, 4])
    assert outcome.summary["runs"][0] == first.summary["runs"][0]
    before, after = (run.summary["runs"][1] for run in (first, outcome))
    assert after["started"] == before["started"]
    assert after["seconds"] > before["seconds"]
    assert after["error"] is None
    assert trained()[1] == []


def test_another_setting_or_a_lost_folder_commands_a_fold_again(trained, tmp_path):
    trained()
    (tmp_path / "cv" / "fold_3" / "metrics_history.yaml").unlink()
    assert trained()[1] == [3]
    assert trained(max_epochs=5)[1] == [0, 1, 2, 3, 4]


def test_an_edited_configuration_commands_the_folds_again(trained, configs):
    trained()
    (configs / "train.yaml").write_text(TRAIN.replace("max_epochs: 3", "max_epochs: 4"))
    assert trained()[1] == [0, 1, 2, 3, 4]


def test_resume_false_begins_anew(trained):
    first, _ = trained()
    outcome, calls = trained(resume=False)
    assert calls == [0, 1, 2, 3, 4]
    assert outcome.summary["runs"][0]["started"] >= first.summary["runs"][0]["ended"]


@pytest.mark.parametrize("change", [{"manifest": "hrf"}, {"fold_seed": 2}, {"manifest": "stare"}])
def test_folds_of_other_cases_do_not_go_on_from_these(trained, change):
    trained()
    with pytest.raises(ConfigurationError, match=r"cv/folds.yaml: .*choose another output_dir"):
        trained(**change)
    assert len(trained(**change, resume=False)[1]) == (10 if "stare" in change.values() else 5)


def test_a_foreign_summary_is_refused(trained, tmp_path):
    trained()
    (tmp_path / "cv" / "folds.yaml").write_text("runs: [1, 2]")
    with pytest.raises(ConfigurationError, match=r"folds.yaml: not a summary of folds"):
        trained()


def test_a_fold_killed_by_the_system_is_a_failure_of_that_fold(trained):
    outcome, calls = trained({0: "killed"}, continue_on_error=True)
    assert (outcome.exit_code, len(calls)) == (3, 5)
    assert "SIGKILL" in outcome.summary["runs"][0]["error"]
    assert outcome.summary["runs"][0]["exit_code"] == 5


@pytest.mark.parametrize("does", ["wait", "linger"])
@pytest.mark.parametrize(
    ("sent", "code", "passed"),
    [
        (signal.SIGTERM, 75, "SIGTERM"),
        (signal.SIGINT, 130, "SIGINT"),
        (signal.SIGHUP, 75, "SIGTERM"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_signal_stops_the_fold_and_all_that_follow(trained, tmp_path, sent, code, passed, does):
    """Passed on once to a run that saves on it (`wait`), and to one that does not yet."""
    handlers = {number: signal.getsignal(number) for number in (sent, signal.SIGTERM)}

    def send():
        while not (tmp_path / "cv" / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), sent)

    sender = threading.Thread(target=send)
    sender.start()
    outcome, calls = trained({0: does}, continue_on_error=True)
    sender.join()
    assert (outcome.exit_code, calls) == (code, [0])
    assert statuses(outcome) == ["stopped", "waiting", "waiting", "waiting", "waiting"]
    assert "the same command goes on" in outcome.error
    if does == "wait":
        assert (tmp_path / "cv" / "fold_0" / "received").read_text() == passed
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_second_cross_validation_in_one_folder_is_refused(trained, tmp_path):
    lock = RunLock(tmp_path / "cv")
    lock.acquire()
    with pytest.raises(ConfigurationError, match=r"cv: another run is at work there"):
        trained()
    lock.release()
    assert trained()[0].exit_code == 0


def test_a_fold_has_a_process_group_of_its_own(trained, tmp_path):
    trained()
    groups = {(tmp_path / "cv" / f"fold_{k}" / "group").read_text() for k in range(5)}
    assert len(groups) == 5
    assert str(os.getpgid(0)) not in groups


def test_the_account_on_screen_names_folds_and_total(trained):
    outcome, _ = trained({1: 6}, continue_on_error=True)
    lines = folds_text(outcome.summary).splitlines()
    assert lines[0].split()[:3] == ["fold", "status", "val_dice"]
    assert lines[2].split()[:2] == ["1", "failed"]
    assert lines[2].endswith("fold 1 is spoilt")
    assert lines[-2].startswith("total: 4 done, 1 failed; ")
    assert lines[-1].startswith("val_dice: mean 0.8225 +- ")


def test_the_folds_go_below_the_run_they_belong_to(configs):
    assert plan_folds("tiny").folder == Path("runs/tiny/default")
    assert plan_folds("tiny", (), {"name": "wide"}).folder == Path("runs/tiny/wide")
    assert plan_folds("tiny", (), {"output_dir": "here"}).fold_folder(2) == Path("here/fold_2")


def test_the_manifest_says_how_many_folds_there_are(configs):
    assert plan_folds("tiny", (), {"manifest": "stare"}).count == 10
    with pytest.raises(ConfigurationError, match=r"manifest images has no folds"):
        plan_folds("tiny", (), {"manifest": "images"})


def test_a_bundle_without_folds_is_refused(configs):
    (configs / "train.yaml").write_text(TRAIN.replace("fold: null\n", ""))
    with pytest.raises(ConfigurationError, match=r"train.yaml: has no id fold"):
        plan_folds("tiny")


def test_a_misspelt_setting_is_refused_before_anything_is_written(configs, tmp_path):
    with pytest.raises(ConfigurationError, match=r"did you mean max_epochs"):
        plan_folds("tiny", (), {"max_epoch": 1})
    assert not (tmp_path / "runs").exists()


def test_a_fold_is_commanded_in_the_words_of_the_command_line(configs):
    settings = {"fold": "all", "max_epochs": 2, "name": "8", "output_dir": "a b"}
    _, dash_m, module, *words = plan_folds("tiny", (), settings).command(3)
    assert (dash_m, module) == ("-m", "pipeline")
    kept, overrides = arguments.split_overrides(words)
    assert kept == ["train", "tiny"]
    assert overrides == {"max_epochs": 2, "name": "8", "fold": 3, "output_dir": "a b/fold_3"}


@pytest.mark.cli
def test_the_command_line_trains_folds_until_one_fails(configs, tmp_path, repository, capfd):
    manifest = yaml.safe_load((repository / "data_manifests" / "images.yaml").read_text())
    (tmp_path / "two.yaml").write_text(
        yaml.safe_dump({**manifest, "name": "two", "folds": {"k": 2, "seed": 0}})
    )
    run = "run: [$Path(@output_dir).mkdir(parents=True), '$divmod(1, 1 - @fold)']\n"
    run += "imports: [$from pathlib import Path]\n"
    (configs / "train.yaml").write_text(TRAIN.replace("run: []\n", run))
    words = ["train", "tiny", "--fold", "all", "--manifest", "two.yaml", "--output_dir", "cv"]
    assert cli.main(words) == 1
    shown, complained = capfd.readouterr()
    assert "fold 0 of 2: training in cv/fold_0" in shown
    assert "summary: cv/folds.yaml" in shown
    assert complained.splitlines()[-1].startswith("error: fold 1: ")
    assert "divmod" in complained.splitlines()[-1]
    summary = yaml.safe_load(Path("cv/folds.yaml").read_text())
    assert [entry["status"] for entry in summary["runs"]] == ["done", "failed"]
    assert "divmod" in summary["runs"][1]["error"]
    assert Path("cv/fold_1").is_dir()
