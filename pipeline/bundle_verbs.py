"""The verbs that run a bundle or write its network: `train`, `predict`, `evaluate`, ..."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigurationError, InputError, InputErrors
from pipeline.terminal import answers_only, complain, say, say_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.bundles import Workflow

__all__ = ["ACTIONS"]

_SHOWN = 6  # figures of an evaluation in a terminal


def _train(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    if overrides.get("fold") == "all":
        return _train_folds(options, overrides)
    if options.continue_on_error:
        raise ConfigurationError("--continue-on-error is about several folds: add --fold all")
    return _run(options, overrides, "train")


def _train_folds(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.crossvalidation import cross_validate, plan_folds
    from pipeline.report.folds import folds_text

    plan = plan_folds(options.bundle, options.overlays, overrides)
    if options.dry_run:
        if not options.json:
            say(f"{plan.count} folds of {plan.manifest} in {plan.folder}/fold_<k>; the first:")
        settings = {**plan.settings, "fold": 0, "output_dir": str(plan.fold_folder(0))}
        return _dry_run(options, settings, "train")
    with answers_only(options.json):
        outcome = cross_validate(
            plan, continue_on_error=options.continue_on_error, debug=options.debug, say=say
        )
    if options.json:
        say_json({**outcome.summary, "path": outcome.path, "exit_code": outcome.exit_code})
    else:
        say(folds_text(outcome.summary))
        say(f"summary: {outcome.path}")
    if outcome.error:
        complain(outcome.error)
    return outcome.exit_code


def _predict(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    # as paths: a name that begins with $ is no expression
    given = {"dataset_dir": Path(options.input), "output_dir": Path(options.output)}
    _take(overrides, given, "-i/-o")
    if not Path(options.input).exists():
        raise InputError(f"{options.input}: not found, expected an image or a folder of images")
    return _run(options, overrides, "inference")


def _ensemble(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.bundles import prepare_run

    members = dict.fromkeys(("ckpt_path", "ensemble"), options.checkpoints)
    _take(overrides, members, "CHECKPOINT")
    prepare_run(options.bundle, "inference", (), overrides)  # typos, before torch loads
    from pipeline.inference.ensembles import find_checkpoints

    first, *others = [str(path) for path in find_checkpoints(options.checkpoints)]
    overrides |= {"ckpt_path": first, "ensemble": others}
    options.overlays = []
    return _predict(options, overrides)


def _take(overrides: dict[str, Any], values: dict[str, Any], option: str) -> None:
    """Add what an option of the verb sets to the settings."""
    for id, value in values.items():
        if id in overrides:
            raise ConfigurationError(
                f"--{id} stands beside {option}, which set it: give one of them"
            )
        overrides[id] = value


def _run(options: argparse.Namespace, overrides: dict[str, Any], workflow: Workflow) -> int:
    from pipeline.bundles import prepare_run, run_bundle

    if overrides.get("fold") == "all":
        raise ConfigurationError("--fold all is for train; evaluate one fold at a time")
    prepare_run(options.bundle, workflow, options.overlays, overrides)  # typos, before torch loads
    if options.dry_run:
        return _dry_run(options, overrides, workflow)
    if workflow == "inference":
        from pipeline.data.atomic import check_writable

        output = Path(options.output).absolute()  # before gigabytes of weights are read
        check_writable(next(path for path in (output, *output.parents) if path.is_dir()))
    started_s = time.time()
    try:
        with answers_only(options.json):
            result = run_bundle(options.bundle, workflow, options.overlays, **overrides)
    except InputErrors:  # some inputs rejected, the others done: say where before telling which
        if workflow == "inference":
            _show_results(options, {"output_dir": options.output}, workflow, started_s)
        raise
    _show_results(options, result, workflow, started_s)
    if workflow == "inference" and "ckpt_path" not in overrides and not options.json:
        say(f"weights: the bundle's own, trained on {_trained_on(result)}")
    return 0


def _trained_on(result: dict[str, Any]) -> str:
    """Return what the shipped weights have seen: on other images they may find anything."""
    from pipeline.report.run_files import read_json

    root = Path(result.get("bundle_root", "."))
    metadata = read_json(root / "configs" / "metadata.json") or {}
    return str(metadata.get("data_source", "data that its metadata do not name"))


def _dry_run(options: argparse.Namespace, overrides: dict[str, Any], workflow: Workflow) -> int:
    from pipeline.dry_run import dry_run, dry_run_text

    with answers_only(options.json):
        found = dry_run(options.bundle, workflow, options.overlays, overrides)
    if options.json:
        say_json(found)
    else:
        say(dry_run_text(found))
    return 0


def _show_results(
    options: argparse.Namespace, result: dict[str, Any], workflow: Workflow, started_s: float
) -> None:
    """Name the report and pictures that a run has left, to open them; or tell its figures."""
    folder = Path(result.get("output_dir") or ".")
    report = _fresh_report(folder, started_s)
    if options.json:
        results = Path(result.get("evaluation_dir") or folder)
        found = {"output_dir": results, "report": report, **_figures(results, workflow)}
        say_json(found)
        return
    if report is not None:
        pictures = sorted(report.parent.glob("pictures/**/*.png"))
        if pictures:
            say(f"pictures: {report.parent / 'pictures'} ({len(pictures)}), first {pictures[0]}")
    if workflow == "evaluate":
        for line in _scores(_figures(Path(result.get("evaluation_dir") or folder), workflow)):
            say(line)
    if report is not None:
        say(f"report: {report}")


def _scores(figures: dict[str, Any]) -> list[str]:
    """Return the first figures of an evaluation, of which its report has all."""
    lines = []
    for name, kind in (("average_metrics", "mean"), ("pooled_metrics", "pooled")):
        numbers = {k: v for k, v in (figures.get(name) or {}).items() if isinstance(v, float)}
        shown = [f"{metric} {value:.4f}" for metric, value in list(numbers.items())[:_SHOWN]]
        lines += [f"{kind}: {', '.join(shown)}"] if shown else []
    return lines


def _fresh_report(folder: Path, started_s: float) -> Path | None:
    reports = {path: path.stat().st_mtime for path in folder.rglob("report.html")}
    fresh = [path for path, written_s in reports.items() if written_s >= started_s - 1]
    return max(fresh, key=lambda path: reports[path], default=None)


def _figures(folder: Path, workflow: Workflow) -> dict[str, Any]:
    """Return what a run wrote for programs: metrics, or the summary of its inputs."""
    from pipeline.report.comparison import fold_figures
    from pipeline.report.run_files import read_csv, read_json, read_yaml

    if workflow == "train":
        return fold_figures(folder)
    if workflow == "evaluate":
        return read_yaml(folder / "test_metrics.yaml") or {}
    summary = read_json(folder / "summary.json") or {}
    return {**summary, "failures": read_csv(folder / "failures.csv")}


def _export(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.bundles import prepare_run
    from pipeline.exporting import export_bundle, export_text

    prepare_run(options.bundle, "inference", (), overrides)  # typos, before torch loads
    size = None if options.size is None else _size(options.size)
    with answers_only(options.json):
        export = export_bundle(options.bundle, options.output, options.format, size, **overrides)
    if options.json:
        say_json(export.as_dict())
    else:
        say(export_text(export))
    return 0


def _size(text: str) -> list[int]:
    sides = text.split("x")
    if not all(side.isdigit() for side in sides):
        raise ConfigurationError(f"--size: {text!r} is no size, expected such as 480x768")
    return [int(side) for side in sides]


def _demo(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.demo import demonstrate

    _take(overrides, {"output_dir": options.output}, "-o")
    done = demonstrate(options.bundle, options.output, overrides, say)
    if done.exit_code == 0:
        pictures = sorted(done.predictions.glob("pictures/**/*.png"))
        say("")
        if pictures:
            say(f"picture: {pictures[0]}")
        say(f"open in a browser: {done.predictions / 'report.html'} (the example)")
        say(f"                   {done.training / 'report.html'} (the training on drawn data)")
    return done.exit_code


ACTIONS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], int]] = {
    "train": _train,
    "predict": _predict,
    "evaluate": partial(_run, workflow="evaluate"),
    "ensemble": _ensemble,
    "export": _export,
    "demo": _demo,
}
