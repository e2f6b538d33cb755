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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

PROGRAM = "python -m pipeline"
BUNDLE_VERBS = ("train", "predict", "evaluate")
_DESCRIPTION = "Lamina: train and use bundles for thin things in images."
_SETTINGS = (
    "Any setting of the bundle's configuration follows as --ID VALUE, nested ids with ::, such as "
    "--learning_rate 1e-3 or --early_stopping::patience 5. A name the bundle does not have is "
    "refused. The settings stand at the head of bundles/BUNDLE/configs/*.yaml."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; 2 also where argparse itself refuses.

    Args:
        argv: the arguments; those of the process if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("LAMINA_DEBUG", "") not in {"", "0"}
    try:
        overrides: dict[str, Any] = {}
        if arguments and arguments[0] in BUNDLE_VERBS:
            arguments, overrides = _split_overrides(arguments)
        options = _parser().parse_args(arguments)
        verb: Callable[[argparse.Namespace, dict[str, Any]], int] = options.action
        return verb(options, overrides)
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


def _split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the arguments without `--ID VALUE` pairs, and these; a lone `--ID` is true."""
    from pipeline.configs import parse_value

    own = {"--help", "--debug", "--input", "--output"}
    kept: list[str] = []
    overrides: dict[str, Any] = {}
    rest = iter(range(len(arguments)))
    for index in rest:
        word = arguments[index]
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or f"--{key}" in own:
            kept.append(word)
            continue
        following = arguments[index + 1] if index + 1 < len(arguments) else "--"
        if key in overrides or not key:
            raise ConfigurationError(f"{word}: given twice or without a name; give --ID VALUE once")
        if equals:
            overrides[key] = parse_value(text)
        elif following.startswith("--") or following in {"-i", "-o", "-h"}:
            overrides[key] = True
        else:
            overrides[key] = parse_value(following)
            next(rest)
    return kept, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=_DESCRIPTION,
        epilog=f"example: {PROGRAM} predict fundus_vessels -i photos -o results",
    )
    verbs = parser.add_subparsers(title="commands", metavar="VERB", required=True)

    def add(
        group: Any, name: str, action: Callable[..., int], text: str, example: str, more: str = ""
    ) -> argparse.ArgumentParser:
        child: argparse.ArgumentParser = group.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {more}",
            epilog=f"example: {PROGRAM} {example}",
        )
        child.add_argument("--debug", action="store_true", help="show the traceback of an error")
        child.set_defaults(action=action)
        return child

    doctor = add(
        verbs, "doctor", _doctor, "show versions, devices, memory and what is missing", "doctor"
    )
    doctor.add_argument("--json", action="store_true", help="for a program")
    train = add(
        verbs, "train", partial(_run, workflow="train"), "train a bundle",
        "train fundus_vessels quick --dataset_dir DRIVE --manifest drive", _SETTINGS,
    )  # fmt: skip
    predict = add(
        verbs, "predict", _predict, "apply a bundle to an image or a folder",
        "predict fundus_vessels -i photos -o results --ckpt_path best.pt", _SETTINGS,
    )  # fmt: skip
    predict.add_argument("-i", "--input", required=True, help="an image, or a folder of images")
    predict.add_argument("-o", "--output", required=True, help="folder for the results")
    evaluate = add(
        verbs, "evaluate", partial(_run, workflow="evaluate"), "score a checkpoint against labels",
        "evaluate fundus_vessels --dataset_dir STARE --manifest stare --ckpt_path best.pt",
        _SETTINGS,
    )  # fmt: skip
    for child in (train, predict, evaluate):
        child.add_argument("bundle", metavar="BUNDLE", help="a bundle's name or folder")
        child.add_argument("overlays", nargs="*", metavar="OVERLAY", help="files of its configs/")
    data = add(
        verbs, "data", _no_verb, "describe, check and look at data", "data check drive DRIVE"
    )
    _add_data_verbs(data.add_subparsers(title="commands", metavar="VERB", required=True), add)
    return parser


def _add_data_verbs(data: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    add(data, "list", _data_list, "list the manifests", "data list")
    init = add(
        data, "init", _data_init, "guess a manifest from a folder", "data init mine -o mine.yaml"
    )
    init.add_argument("-o", "--output", help="file to write; printed if absent")
    preview = add(
        data, "preview", _data_preview, "draw images, labels and what training makes of them",
        "data preview drive DRIVE -o sheet.png --bundle fundus_vessels",
    )  # fmt: skip
    preview.add_argument("--bundle", help="whose training transforms to show")
    preview.add_argument("--cases", type=int, default=4, help="rows (default 4)")
    preview.add_argument("--variants", type=int, default=3, help="augmented per row (default 3)")
    check = add(
        data, "check", _data_check, "name every problem of a folder", "data check drive DRIVE"
    )
    check.add_argument("--json", action="store_true", help="for a program")
    freeze = add(
        data, "freeze", _data_freeze, "write every file with its checksum, split and fold",
        "data freeze drive DRIVE -o drive_frozen.yaml",
    )  # fmt: skip
    freeze.add_argument("--folds", type=int, default=5, help="number of folds (default 5)")
    freeze.add_argument("--seed", type=int, help="of the folds (default: the manifest's)")
    sample = add(
        data, "sample", _data_sample, "write a real example image", "data sample fundus -o photos"
    )
    sample.add_argument("name", choices=["fundus"], help="what the image shows")
    for child in (preview, check, freeze):
        child.add_argument("manifest", metavar="MANIFEST", help="a name of `data list`, or a file")
    for child in (init, preview, check, freeze):
        child.add_argument("folder", metavar="FOLDER", type=Path, help="where the data are")
    for child in (preview, freeze, sample):
        child.add_argument("-o", "--output", required=True, type=Path, help="where to write")


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


def _complain(text: str) -> None:
    sys.stderr.write(f"error: {text}\n")
