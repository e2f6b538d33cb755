"""The commands: `python -m pipeline VERB`, thin doors to the rooms.

Only what a verb needs is imported, when it runs: help and a misspelt setting answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.arguments import ERROR_FILE, PROGRAM, parser, split_overrides
from pipeline.errors import (
    ConfigurationError,
    InputError,
    InputErrors,
    LaminaError,
    Problem,
    exit_code,
    lamina_cause,
)

if TYPE_CHECKING:
    from pipeline.bundles import Workflow

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; 2 also where argparse itself refuses.

    Args:
        argv: the arguments; those of the process if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("LAMINA_DEBUG", "") not in {"", "0"}
    try:
        arguments, overrides = split_overrides(arguments)
        options = parser().parse_args(arguments)
        return _ACTIONS[options.verb](options, overrides)
    except KeyboardInterrupt as error:
        _complain("interrupted")
        return exit_code(error)
    except BrokenPipeError:  # `... | head` closed the pipe: nobody is left to tell
        sys.stderr.close()
        return 0
    except Exception as error:  # the last door: whatever happens becomes one line and a code
        if debug:
            traceback.print_exc()
        _complain(_one_line(error))
        return exit_code(error)


def _one_line(error: Exception) -> str:
    known = lamina_cause(error)
    code = exit_code(error)
    if known is not None:
        text = str(known) or type(known).__name__
    elif code != LaminaError.exit_code:
        text = str(error) or type(error).__name__
    else:
        text = f"{type(error).__name__}: {error} (unexpected: add --debug to see where)"
    return " ".join(text.split())


def _doctor(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.bundles import bundle_status
    from pipeline.hardware.environment import environment_report, environment_text

    report = environment_report()
    report["bundles"] = bundle_status()
    report["missing"] += [
        f"{bundle['name']} has no weights (models/model.pt): train it, or give --ckpt_path"
        for bundle in report["bundles"]
        if bundle["weights"] is None
    ]
    _say(json.dumps(report, indent=2) if options.json else environment_text(report))
    return 0


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
    outcome = cross_validate(
        plan, continue_on_error=options.continue_on_error, debug=options.debug, say=_say
    )
    _say(folds_text(outcome.summary))
    _say(f"summary: {outcome.path}")
    if outcome.error:
        _complain(outcome.error)
    return outcome.exit_code


def _predict(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    for id, value in (("dataset_dir", options.input), ("output_dir", options.output)):
        if id in overrides:
            raise ConfigurationError(f"--{id} stands beside -i/-o, which set it: give one of them")
        overrides[id] = value
    if not Path(options.input).exists():
        raise InputError(f"{options.input}: not found, expected an image or a folder of images")
    return _run(options, overrides, "inference")


def _run(options: argparse.Namespace, overrides: dict[str, Any], workflow: Workflow) -> int:
    from pipeline.bundles import prepare_run, run_bundle

    if overrides.get("fold") == "all":
        raise ConfigurationError("--fold all is for train; evaluate one fold at a time")
    prepare_run(options.bundle, workflow, options.overlays, overrides)  # typos, before torch loads
    started_s = time.time()
    try:
        result = run_bundle(options.bundle, workflow, options.overlays, **overrides)
    except InputErrors:  # some inputs rejected, the others done: say where before telling which
        if workflow == "inference":
            _show_results(Path(options.output), started_s)
        raise
    _show_results(Path(result.get("output_dir", ".")), started_s)
    return 0


def _show_results(folder: Path, started_s: float) -> None:
    """Name the report and pictures that a run has left, to open them."""
    reports = {path: path.stat().st_mtime for path in folder.rglob("report.html")}
    fresh = [path for path, written_s in reports.items() if written_s >= started_s - 1]
    for report in sorted(fresh, key=lambda path: reports[path])[-1:]:
        pictures = sorted(report.parent.glob("pictures/**/*.png"))
        if pictures:
            _say(f"pictures: {report.parent / 'pictures'} ({len(pictures)}), first {pictures[0]}")
        _say(f"report: {report}")


def _compare(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.data.atomic import to_plain
    from pipeline.report.comparison import compare_runs, comparison_text

    found = compare_runs(options.runs, options.metric or (), seed=options.seed)
    _say(json.dumps(to_plain(found), indent=2) if options.json else comparison_text(found))
    return 0


def _data_list(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.data.manifests import list_manifests

    for manifest in list_manifests():
        _say(f"{manifest.name:16} {manifest.title} ({manifest.licence})")
    return 0


def _data_init(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    import yaml

    from pipeline.data.atomic import write_text
    from pipeline.data.guess import guess_manifest

    text = yaml.safe_dump(guess_manifest(options.folder), sort_keys=False, allow_unicode=True)
    if options.output is None:
        _say(text.rstrip())
    else:
        write_text(Path(options.output), text)
        _say(
            f"{options.output}: look at it, then "
            f"{PROGRAM} data check {options.output} {options.folder}"
        )
    return 0


def _data_preview(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.data.manifests import find_samples, load_manifest
    from pipeline.data.preview import contact_sheet
    from pipeline.report.preview import preview_rows

    samples = find_samples(load_manifest(options.manifest), options.folder)[: options.cases]
    transform = None
    if options.bundle is not None:
        from pipeline.bundles import build_part

        transform = build_part(options.bundle, "train", "train::preprocessing")
    contact_sheet(preview_rows(samples, transform, options.variants), options.output)
    _say(str(options.output))
    return 0


def _data_check(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.data.integrity import check_samples
    from pipeline.data.manifests import find_samples, load_manifest

    manifest = load_manifest(options.manifest)
    count, problems = 0, list[Problem]()
    try:
        samples = find_samples(manifest, options.folder, verify=True)
        count = len(samples)
        problems = list(check_samples(samples, manifest))
    except InputErrors as error:
        problems = list(error.problems)
    except InputError as error:
        problems = [Problem(str(options.folder), "find", str(error))]
    code = max((problem.code for problem in problems), default=0)
    if options.json:
        found = [vars(problem) for problem in problems]
        _say(json.dumps({"samples": count, "problems": found, "exit_code": code}, indent=2))
    else:
        for problem in problems:
            _complain(str(problem))
        _say(f"{manifest.name} in {options.folder}: {count} samples, {len(problems)} problems")
    return code


def _data_freeze(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.data.freeze import freeze
    from pipeline.data.manifests import load_manifest

    manifest = load_manifest(options.manifest)
    freeze(manifest, options.folder, options.output, folds=options.folds, seed=options.seed)
    _say(str(options.output))
    return 0


def _data_sample(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    import skimage.data

    from pipeline.data.writers import write_png

    path = options.output / "retina.png"
    write_png(path, skimage.data.retina())
    _say(str(path))
    return 0


def _no_verb(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    raise ConfigurationError(f"give a command after `data`, see {PROGRAM} data --help")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()  # before what another process writes to the same terminal or file


def _complain(text: str) -> None:
    sys.stderr.write(f"error: {text}\n")
    if ERROR_FILE in os.environ:  # for the process that started this one
        with suppress(OSError):
            Path(os.environ[ERROR_FILE]).write_text(text, encoding="utf-8")


_ACTIONS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], int]] = {
    "doctor": _doctor,
    "train": _train,
    "predict": _predict,
    "evaluate": partial(_run, workflow="evaluate"),
    "compare": _compare,
    "data": _no_verb,
    "data list": _data_list,
    "data init": _data_init,
    "data preview": _data_preview,
    "data check": _data_check,
    "data freeze": _data_freeze,
    "data sample": _data_sample,
}
