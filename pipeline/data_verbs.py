"""The verbs that describe, check and show data: `data list`, `data check`, ..."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.arguments import PROGRAM
from pipeline.errors import ConfigurationError, InputError, InputErrors, Problem
from pipeline.terminal import complain, say, say_json

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ACTIONS"]


def _data_list(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.data.manifests import list_manifests

    for manifest in list_manifests():
        say(f"{manifest.name:16} {manifest.title} ({manifest.licence})")
    return 0


def _data_init(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    import yaml

    from pipeline.data.atomic import write_text
    from pipeline.data.guess import guess_manifest

    text = yaml.safe_dump(guess_manifest(options.folder), sort_keys=False, allow_unicode=True)
    if options.output is None:
        say(text.rstrip())
    else:
        write_text(Path(options.output), text)
        say(
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
    problems = list[Problem]()
    rows = preview_rows(samples, transform, options.variants, problems)
    for problem in problems:
        complain(problem.message)
    if rows:
        contact_sheet(rows, options.output)
        say(str(options.output))
    return max((problem.code for problem in problems), default=0)


def _data_check(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.data.integrity import check_samples
    from pipeline.data.manifests import find_samples, load_manifest

    manifest = load_manifest(options.manifest)
    count, problems = 0, list[Problem]()
    try:
        samples = find_samples(
            manifest,
            options.folder,
            verify=not options.no_verify,
            follow_symlinks=options.follow_symlinks,
            incomplete=problems,
        )
        count = len(samples)
        problems += check_samples(samples, manifest) if samples else []
    except InputErrors as error:
        problems += error.problems
    except InputError as error:
        problems.append(Problem(str(options.folder), "find", str(error)))
    code = max((problem.code for problem in problems), default=0)
    if options.json:
        found = [vars(problem) for problem in problems]
        say_json({"samples": count, "problems": found, "exit_code": code})
    else:
        for problem in problems:
            complain(str(problem))
        say(f"{manifest.name} in {options.folder}: {count} samples, {len(problems)} problems")
    return code


def _data_freeze(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.data.freeze import freeze
    from pipeline.data.manifests import load_manifest

    manifest = load_manifest(options.manifest)
    freeze(manifest, options.folder, options.output, folds=options.folds, seed=options.seed)
    say(str(options.output))
    return 0


def _data_sample(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.examples import write_example

    say(str(write_example(options.name, options.output)))
    return 0


def _no_verb(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    raise ConfigurationError(f"give a command after `data`, see {PROGRAM} data --help")


ACTIONS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], int]] = {
    "data": _no_verb,
    "data list": _data_list,
    "data init": _data_init,
    "data preview": _data_preview,
    "data check": _data_check,
    "data freeze": _data_freeze,
    "data sample": _data_sample,
}
