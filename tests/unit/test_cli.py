from __future__ import annotations

import errno
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import monai.bundle  # noqa: F401 - now: its log keeps the stderr that it is first imported under
import pytest
import yaml

from pipeline import arguments, cli
from pipeline.errors import (
    CheckpointError,
    ConfigurationError,
    DivergedError,
    InputErrors,
    Interrupted,
    Preempted,
    Problem,
    ResourceError,
)

TRAIN = """
output_dir: runs
max_epochs: 3
early_stopping: {enabled: true, patience: 5}
dataset_dir: null
run: ['$dict(epochs=@max_epochs)']
"""
INFERENCE = """
output_dir: runs
dataset_dir: null
ckpt_path: null
ensemble: []
run: ['$dict(output=@output_dir)']
"""


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    configs = tmp_path / "bundles" / "tiny" / "configs"
    configs.mkdir(parents=True)
    (configs / "train.yaml").write_text(TRAIN)
    (configs / "evaluate.yaml").write_text("run: []\n")
    (configs / "inference.yaml").write_text(INFERENCE)
    (configs / "metadata.json").write_text('{"version": "0.1.0"}')
    monkeypatch.chdir(tmp_path)
    return configs.parent


@pytest.fixture
def runs(monkeypatch):
    """Record what would run, and run nothing."""
    import pipeline.bundles

    calls = []

    def record(name, workflow, overlays=(), **overrides):
        calls.append((name, workflow, list(overlays), overrides))
        return {"output_dir": "runs"}

    monkeypatch.setattr(pipeline.bundles, "run_bundle", record)
    return calls


def verbs(parser, path=()):
    for action in parser._actions:
        for name, child in (
            (getattr(action, "choices", None) or {}).items()
            if action.dest == "==SUPPRESS=="
            else ()
        ):
            yield (*path, name), child
            yield from verbs(child, (*path, name))


VERBS = dict(verbs(arguments.parser()))


def test_the_verbs_of_the_design_are_there():
    assert {" ".join(path) for path in VERBS} == {
        "doctor", "train", "predict", "evaluate", "ensemble", "export", "demo", "report",
        "compare", "data", "data list", "data init", "data preview", "data check", "data freeze",
        "data sample",
    }  # fmt: skip


@pytest.mark.parametrize("path", list(VERBS), ids=" ".join)
def test_every_verb_helps_with_an_example_that_parses(path, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*path, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    example = re.search(r"example: python -m pipeline (.*)", text).group(1).split()
    assert example[: len(path)] == list(path)
    words, _ = arguments.split_overrides(example)
    arguments.parser().parse_args(words)


@pytest.mark.cli
def test_help_takes_less_than_half_a_second_of_cpu():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "pipeline", "export", "--help"]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "example:" in done.stdout
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 0.5, seconds


@pytest.mark.cli
def test_a_misspelt_setting_is_refused_before_torch_is_imported(bundle):
    code = (
        "import sys\nfrom pipeline.cli import main\n"
        "code = main(['train', 'tiny', '--max_epoch', '1'])\n"
        "sys.exit(99 if {'torch', 'monai'} & set(sys.modules) else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: --max_epoch: no id 'max_epoch'; did you mean max_epochs?\n"


def test_settings_reach_the_bundle_as_values(bundle, runs):
    words = ["--max_epochs", "1", "--early_stopping::patience=2", "--output_dir", "a b"]
    assert cli.main(["train", "tiny", *words]) == 0
    settings = {"max_epochs": 1, "early_stopping::patience": 2, "output_dir": "a b"}
    assert runs == [("tiny", "train", [], settings)]


def test_a_negative_number_is_a_value_and_a_lone_name_is_true(bundle, runs):
    words = ["evaluate", "tiny", "--max_epochs", "-1e-3", "--early_stopping::enabled"]
    assert cli.main(words) == 0
    assert runs[0][3] == {"max_epochs": -0.001, "early_stopping::enabled": True}


def test_predict_maps_input_and_output(bundle, runs, tmp_path):
    (tmp_path / "photos").mkdir()
    assert cli.main(["predict", "tiny", "-i", "photos", "-o", "out"]) == 0
    settings = {"dataset_dir": Path("photos"), "output_dir": Path("out")}
    assert runs == [("tiny", "inference", [], settings)]


def test_a_prediction_says_what_the_bundles_own_weights_have_seen(bundle, runs, capsys, tmp_path):
    (tmp_path / "photos").mkdir()
    words = ["predict", "tiny", "-i", "photos", "-o", "out"]
    assert cli.main(words) == 0
    assert "weights: the bundle's own, trained on " in capsys.readouterr().out
    assert cli.main([*words, "--ckpt_path", "own.pt"]) == 0
    assert "weights:" not in capsys.readouterr().out


def test_an_evaluation_ends_with_its_first_figures(bundle, runs, capsys, tmp_path):
    figures = {"average_metrics": {"dice": 0.81234, "note": "x"}, "pooled_metrics": {"auc": 0.9}}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "test_metrics.yaml").write_text(yaml.safe_dump(figures))
    assert cli.main(["evaluate", "tiny"]) == 0
    assert capsys.readouterr().out.splitlines() == ["mean: dice 0.8123", "pooled: auc 0.9000"]


def test_what_monai_cannot_build_is_told_by_its_reason(bundle, monkeypatch, capsys):
    def fail(*words, **settings):
        try:
            raise ValueError("Invalid learning rate: -1")
        except ValueError as error:
            text = "Failed to instantiate component 'AdamW' with keywords: lr,params"
            raise RuntimeError(text) from error

    monkeypatch.setattr("pipeline.bundles.run_bundle", fail)
    assert cli.main(["train", "tiny"]) == 1
    assert capsys.readouterr().err.startswith("error: ValueError: Invalid learning rate: -1")


def test_an_ensemble_is_a_prediction_with_several_checkpoints(bundle, runs, tmp_path):
    best = [f"runs/fold_{k}/checkpoints/best.pt" for k in range(2)]
    for path in [*best, "own.pt"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert cli.main(["ensemble", "tiny", "own.pt", "runs", "-i", ".", "-o", "out"]) == 0
    settings = {"dataset_dir": Path(), "output_dir": Path("out")}
    settings |= {"ckpt_path": "own.pt", "ensemble": best}
    assert runs == [("tiny", "inference", [], settings)]


@pytest.mark.parametrize("workflow", ["train", "evaluate", "predict"])
def test_a_dry_run_runs_nothing_and_names_what_would(bundle, runs, capsys, workflow):
    words = [workflow, "tiny", *(["-i", ".", "-o", "out"] if workflow == "predict" else [])]
    words += [] if workflow == "predict" else ["--output_dir", "out", "--max_epochs", "7"]
    assert cli.main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert ".yaml" in said
    assert "output: out" in said
    assert cli.main([*words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output_dir"] == "out"
    assert not runs
    assert not (bundle.parents[1] / "out").exists()


def test_a_dry_run_tells_a_misspelt_setting_too(bundle, capsys):
    assert cli.main(["train", "tiny", "--dry-run", "--max_epoch", "1"]) == 2
    assert "did you mean max_epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("workflow", "name", "content", "figure"),
    [
        ("train", "metrics_history.yaml", '[{"epoch": 4, "new_best": true}]', ("epochs", 4)),
        ("evaluate", "test_metrics.yaml", '{"average_metrics": {"dice": 0.5}, "nan": .nan}',
         ("average_metrics", {"dice": 0.5})),
        ("predict", "summary.json", '{"inputs": 2, "done": 2}', ("done", 2)),
    ],
)  # fmt: skip
def test_a_program_reads_one_json_document(
    bundle, tmp_path, monkeypatch, capsys, workflow, name, content, figure
):
    def run(*_, **__):
        sys.stdout.write("what a run says\n")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_text(content)
        return {"output_dir": "out"}

    monkeypatch.setattr("pipeline.bundles.run_bundle", run)
    words = [workflow, "tiny", *(["-i", ".", "-o", "out"] if workflow == "predict" else [])]
    assert cli.main([*words, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["output_dir"] == "out"
    assert found[figure[0]] == figure[1]
    assert "what a run says" in said.err


def test_a_demonstration_gives_the_commands_that_a_person_would(
    repository, tmp_path, monkeypatch, capsys
):
    from pipeline.bundles import prepare_run
    from pipeline.commands import Commands

    given = []

    def note(self, command, environment):
        given.append(command[3:])
        return 0

    monkeypatch.chdir(repository)
    monkeypatch.setattr(Commands, "run", note)
    out = tmp_path / "demo"
    assert cli.main(["demo", "insect_pests", "-o", str(out), "--max_epochs", "1"]) == 0
    train, predict = (arguments.split_overrides(words) for words in given)
    options = arguments.parser().parse_args(train[0])
    assert (options.verb, options.bundle, options.overlays) == ("train", "insect_pests", ["quick"])
    assert train[1] == {"output_dir": str(out / "train"), "max_epochs": 1}
    prepare_run(options.bundle, "train", options.overlays, train[1])
    options = arguments.parser().parse_args(predict[0])
    assert (options.verb, options.output) == ("predict", str(out / "predict"))
    assert len(list((out / "input").glob("*.png"))) > 1
    assert options.input == str(out / "input")
    assert str(out / "predict" / "report.html") in capsys.readouterr().out


def test_a_demonstration_ends_with_the_code_of_the_step_that_failed(
    repository, tmp_path, monkeypatch
):
    from pipeline.commands import Commands

    monkeypatch.chdir(repository)
    for returned, code in ((6, 6), (-15, 75)):
        monkeypatch.setattr(Commands, "run", lambda *_, returned=returned: returned)
        assert cli.main(["demo", "-o", str(tmp_path)]) == code
    assert not (tmp_path / "input").exists()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["predict", "tiny", "-i", "absent", "-o", "out"], 3, "absent: not found"),
        (["predict", "tiny", "-i", ".", "-o", "out", "--output_dir", "x"], 2, "beside -i/-o"),
        (["ensemble", "tiny", "a", "-i", ".", "-o", "out", "--ckpt_path", "x"], 2, "CHECKPOINT"),
        (["ensemble", "tiny", "a", "-i", ".", "-o", "out", "--ensembel", "x"], 2, "mean ensemble"),
        (["ensemble", "tiny", "absent.pt", "-i", ".", "-o", "out"], 4, "absent.pt"),
        (["export", "tinny", "-o", "a.onnx"], 2, "did you mean tiny"),
        (["demo", "tiny"], 2, "no demonstration of 'tiny'"),
        (["demo", "fundus_vessels", "--output_dir", "x"], 2, "beside -o"),
        (["report", "absent"], 3, "absent: no summary.json"),
        (["train", "tinny"], 2, "did you mean tiny"),
        (["train", "tiny", "fast"], 2, "no overlay 'fast'"),
        (["train", "tiny", "--max_epochs"], 2, "needs a number"),
        (["train", "tiny", "--max_epochs", "1", "--max_epochs", "2"], 2, "given twice"),
        (["train", "tiny", "--early_stopping", "[1"], 2, "cannot read the value"),
        (["data", "check", "no_such_manifest", "."], 2, "no_such_manifest"),
        (["train", "tiny", "--continue-on-error"], 2, "add --fold all"),
        (["evaluate", "tiny", "--fold", "all"], 2, "--fold all is for train"),
        (["train", "tiny", "--fold", "all"], 2, "has no id fold"),
        (["compare", "absent"], 3, "absent: no such folder"),
    ],
)
def test_a_usage_error_is_one_line(bundle, capsys, words, code, text):
    assert cli.main(words) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert text in error


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 3, "learning_rate": 1e-5, "augmentation": False, "fold": None},
        {"patch_size": [64, 1e-4], "early_stopping": {"patience": 5, "mode": "max"}},
        {"name": "8", "dataset_dir": "a b: c", "manifest": "true", "+a::b": "", "x": " [1"},
        {"run": "$@a + '/b'", "quoted": '"x"', "unicode": "Größe \U0001f441"},
    ],
)
def test_settings_told_to_another_process_arrive_as_they_were(settings):
    words = ["train", "tiny", *arguments.setting_words(settings)]
    assert arguments.split_overrides(words) == (["train", "tiny"], settings)


@pytest.mark.parametrize("value", [float("nan"), "1e-3", ["1e-3"]], ids=str)
def test_a_setting_that_would_arrive_as_another_is_refused(value):
    with pytest.raises(ConfigurationError, match=r"--x: .* cannot be written on a command line"):
        arguments.setting_words({"x": value})


def test_an_error_is_left_for_the_process_that_asks_for_it(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(arguments.ERROR_FILE, str(tmp_path / "error"))
    assert cli.main(["train", "tinny"]) == 2
    assert capsys.readouterr().err == f"error: {(tmp_path / 'error').read_text()}\n"


def test_folds_are_trained_and_summed_up(bundle, tmp_path, monkeypatch, capsys):
    import pipeline.crossvalidation as room

    asked = {}
    runs = [
        {"fold": k, "status": status, "best": None, "best_epoch": None, "epochs": 0}
        | {"seconds": 60.0, "error": error}
        for k, (status, error) in enumerate([("done", None), ("failed", "no space")])
    ]
    total = {"folds": {"done": 1, "failed": 1}, "metric": None, "seconds": 120.0}
    summary = {"runs": runs, "total": {**total, "mean": None, "sd": None}}

    def train(plan, **options):
        asked.update(options, plan=plan)
        return room.Outcome(3, "1 of 2 folds failed", tmp_path / "folds.yaml", summary)

    monkeypatch.setattr(room, "plan_folds", lambda *words: words)
    monkeypatch.setattr(room, "cross_validate", train)
    words = ["train", "tiny", "--fold", "all", "--max_epochs", "2", "--continue-on-error"]
    assert cli.main(words) == 3
    assert asked["plan"] == ("tiny", [], {"fold": "all", "max_epochs": 2})
    assert asked["continue_on_error"] is True
    shown, complained = capsys.readouterr()
    assert "total: 1 done, 1 failed; 2.0 minutes" in shown
    assert shown.endswith(f"summary: {tmp_path / 'folds.yaml'}\n")
    assert complained == "error: 1 of 2 folds failed\n"


def test_runs_are_compared_for_people_and_programs(tmp_path, capsys):
    import yaml

    for name, dices in (("one", [0.7, 0.8]), ("two", [0.75, 0.85])):
        (tmp_path / name).mkdir()
        rows = [{"image": str(k), "dice": dice} for k, dice in enumerate(dices)]
        (tmp_path / name / "per_image_metrics.yaml").write_text(yaml.safe_dump(rows))
        (tmp_path / name / "test_metrics.yaml").write_text("manifest: drive\nsplit: test\n")
    words = ["compare", str(tmp_path / "one"), str(tmp_path / "two")]
    assert cli.main(words) == 0
    assert "+0.0500" in capsys.readouterr().out
    assert cli.main([*words, "--json", "--metric", "test dice"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    assert comparison["rows"][1]["difference"]["mean"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("x"), 2),
        (InputErrors([Problem("a.png", "read", "x")]), 3),
        (CheckpointError("x"), 4),
        (ResourceError("x"), 5),
        (OSError(errno.ENOSPC, "x"), 5),
        (MemoryError("x"), 5),
        (DivergedError("x"), 6),
        (Preempted("x"), 75),
        (Interrupted("x"), 130),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("x"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_an_error_becomes_its_exit_code_and_one_line(bundle, monkeypatch, capsys, error, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("pipeline.bundles.run_bundle", fail)
    assert cli.main(["train", "tiny"]) == code
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1


@pytest.mark.parametrize("by", ["option", "variable"])
def test_debug_shows_the_traceback(bundle, monkeypatch, capsys, by):
    if by == "variable":
        monkeypatch.setenv("LAMINA_DEBUG", "1")
    assert cli.main(["train", "tinny", *(["--debug"] if by == "option" else [])]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_training_ends_by_naming_what_to_open(bundle, tmp_path, monkeypatch, capsys):
    def run(*_, **__):
        (tmp_path / "runs" / "pictures").mkdir(parents=True)
        (tmp_path / "runs" / "pictures" / "best_1.png").touch()
        (tmp_path / "runs" / "report.html").touch()
        return {"output_dir": "runs"}

    monkeypatch.setattr("pipeline.bundles.run_bundle", run)
    assert cli.main(["train", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert "runs/pictures/best_1.png" in shown
    assert shown.endswith("report: runs/report.html\n")


def test_a_bundle_really_runs(bundle, capsys):
    assert cli.main(["train", "tiny", "--max_epochs", "1"]) == 0
    assert cli.main(["evaluate", "tiny"]) == 0
    assert "error" not in capsys.readouterr().err


def test_doctor_speaks_to_programs_and_people(bundle, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"]
    assert any(device["name"] == "cpu" and device["usable"] for device in report["devices"])
    assert report["memory_bytes"] > 0
    assert any("tiny has no weights" in line for line in report["missing"])
    assert cli.main(["doctor"]) == 0
    assert "tiny 0.1.0, without weights" in capsys.readouterr().out


def pairs(folder, *, truncated=False):
    import numpy as np

    from pipeline.data.writers import write_png

    rng = np.random.default_rng(0)
    for split, name in (("train", "a"), ("train", "b"), ("val", "c"), ("test", "d")):
        image = rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)
        write_png(folder / split / "image" / f"{name}.png", image)
        label = folder / split / "label" / f"{name}.png"
        write_png(label, ((image[..., 0] > 128) * 255).astype(np.uint8))
        if truncated and name == "b":
            label.write_bytes(label.read_bytes()[:60])
    return folder


def test_data_list_names_the_manifests(capsys):
    assert cli.main(["data", "list"]) == 0
    assert {"drive", "stare", "images"} <= {
        line.split()[0] for line in capsys.readouterr().out.splitlines()
    }


def test_data_is_guessed_checked_frozen_and_shown(tmp_path, capsys):
    folder = str(pairs(tmp_path / "data"))
    guessed = str(tmp_path / "guessed.yaml")
    assert cli.main(["data", "init", folder, "-o", guessed]) == 0
    assert cli.main(["data", "check", guessed, folder]) == 0
    frozen = str(tmp_path / "frozen.yaml")
    assert cli.main(["data", "freeze", guessed, folder, "-o", frozen, "--folds", "2"]) == 0
    assert cli.main(["data", "check", frozen, folder, "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text[text.index("{") :]) == {"samples": 4, "problems": [], "exit_code": 0}
    sheet = tmp_path / "sheet.png"
    assert cli.main(["data", "preview", frozen, folder, "-o", str(sheet), "--cases", "2"]) == 0
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_data_check_names_the_bad_file_and_exits_3(tmp_path, capsys):
    folder = str(pairs(tmp_path / "data", truncated=True))
    assert cli.main(["data", "check", "vessel_pairs", folder]) == 3
    assert "train/label/b.png" in capsys.readouterr().err
    assert cli.main(["data", "check", "vessel_pairs", folder, "--json"]) == 3
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["path"] == "train/label/b.png"


def test_data_check_of_an_empty_folder_is_json_too(tmp_path, capsys):
    assert cli.main(["data", "check", "drive", str(tmp_path), "--json"]) == 3
    assert "expected layout" in json.loads(capsys.readouterr().out)["problems"][0]["message"]


@pytest.mark.parametrize("name", ["oct", "scroll", "insects"])
def test_a_drawn_example_is_written_and_named(tmp_path, capsys, name):
    assert cli.main(["data", "sample", name, "-o", str(tmp_path / "new")]) == 0
    path = capsys.readouterr().out.strip()
    assert path.startswith(str(tmp_path / "new"))
    assert any((tmp_path / "new").iterdir())


def test_a_sample_is_a_readable_photograph(tmp_path, capsys):
    from pipeline.data.images import read_image

    assert cli.main(["data", "sample", "fundus", "-o", str(tmp_path)]) == 0
    assert read_image(capsys.readouterr().out.strip()).shape == (1411, 1411, 3)
