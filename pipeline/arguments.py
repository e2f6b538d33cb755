"""The words of the command line: what may be said, and which of it sets a bundle's configuration.

Apart from the verbs that are carried out (`pipeline.cli`), so that a run can also be told to
another process in the same words. Nothing here needs more than the standard library to give help.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigurationError

__all__ = [
    "ERROR_FILE",
    "EXAMPLES",
    "EXPORT_SUFFIXES",
    "PROGRAM",
    "parser",
    "setting_words",
    "split_overrides",
]

PROGRAM = "python -m pipeline"
ERROR_FILE = "LAMINA_ERROR_FILE"  # environment: a file that gets a command's line of error too

EXAMPLES = {  # what `data sample` writes, and what it shows
    "fundus": "a real fundus photograph",
    "oct": "a drawn OCT volume, as a .vol file",
    "scroll": "a drawn piece of a scroll, as a TIFF volume",
    "insects": "a folder of drawn insects",
}
EXPORT_SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".ts", "openvino": ".xml"}

_BUNDLE_VERBS = ("train", "predict", "evaluate", "ensemble", "export", "demo")
_OWN_OPTIONS = frozenset(
    {"--help", "--debug", "--input", "--output", "--continue-on-error", "--dry-run", "--json"}
)
_EXPORT_OPTIONS = frozenset({"--format", "--size"})
_DESCRIPTION = "Lamina: train and use bundles for thin things in images."
_SETTINGS = (
    "Any setting of the bundle's configuration follows as --ID VALUE, nested ids with ::, such as "
    "--learning_rate 1e-3 or --early_stopping::patience 5. A name the bundle does not have is "
    "refused. The settings stand at the head of bundles/BUNDLE/configs/*.yaml."
)
_DRY_RUN = "say what would run, on what and with how much memory; write no result"
_FOLDS = (
    "--fold all trains every fold of the manifest, one after another, each in fold_<k> below "
    "output_dir; the same command again goes on where it stopped. "
)


def split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the arguments without `--ID VALUE` pairs, and these; a lone `--ID` is true.

    Only verbs that run a bundle have such pairs; other arguments are returned as they are.

    Raises:
        ConfigurationError: an id is given twice, or a value cannot be read.
    """
    if not arguments or arguments[0] not in _BUNDLE_VERBS:
        return arguments, {}
    from pipeline.configs import parse_value

    own = _OWN_OPTIONS | (_EXPORT_OPTIONS if arguments[0] == "export" else frozenset())
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


def setting_words(overrides: Mapping[str, Any]) -> list[str]:
    """Return the words that `split_overrides` reads as `overrides`.

    Raises:
        ConfigurationError: a value has no form on a command line.

    Example:
        >>> setting_words({"max_epochs": 3, "name": "8", "patch_size": [64, 64]})
        ['--max_epochs=3', '--name="8"', '--patch_size=[64, 64]']
    """
    return [f"--{key}={_spelt(key, value)}" for key, value in overrides.items()]


def _spelt(key: str, value: Any) -> str:
    from pipeline.configs import parse_value
    from pipeline.data.atomic import to_plain

    plain = to_plain(value)
    bare = isinstance(plain, str) and plain.lstrip()[:1] not in {"[", "{", '"', "'"}
    if bare and parse_value(plain) == plain:
        return str(plain)
    text = json.dumps(plain, ensure_ascii=False)
    read = parse_value(text)
    if read != plain or type(read) is not type(plain):
        raise ConfigurationError(f"--{key}: {value!r} cannot be written on a command line")
    return text


def parser() -> argparse.ArgumentParser:
    """Return the parser; its result has the verb as `verb`, such as `data check`."""
    top = argparse.ArgumentParser(
        prog=PROGRAM,
        description=_DESCRIPTION,
        epilog=f"example: {PROGRAM} predict fundus_vessels -i photos -o results",
    )
    verbs = top.add_subparsers(title="commands", metavar="VERB", required=True)
    doctor = _add(verbs, "doctor", "show versions, devices, memory and what is missing", "doctor")
    _add_json(doctor)
    _add_bundle_verbs(verbs)
    _add_more_bundle_verbs(verbs)
    report = _add(
        verbs, "report", "write a run's page again from the files that the run left",
        "report runs/fundus_vessels/default",
    )  # fmt: skip
    report.add_argument(
        "folder", metavar="FOLDER", type=Path, help="of a training, an evaluation or predictions"
    )
    compare = _add(
        verbs, "compare", "set runs, evaluations or folds side by side",
        "compare runs/fundus_vessels/default runs/fundus_vessels/unet",
        "Means with bootstrap intervals over images, mean and deviation over folds, and the "
        "difference to the first RUN where the images are the same.",
    )  # fmt: skip
    compare.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="folder of a training, of an evaluation, or with fold_<k> below it",
    )  # fmt: skip
    compare.add_argument("--metric", action="append", help="only this one; may be repeated")
    compare.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    compare.add_argument("--html", metavar="FILE", help="write it as a page too")
    _add_json(compare)
    data = _add(verbs, "data", "describe, check and look at data", "data check drive DRIVE")
    _add_data_verbs(data.add_subparsers(title="commands", metavar="VERB", required=True))
    return top


def _add(group: Any, verb: str, text: str, example: str, more: str = "") -> argparse.ArgumentParser:
    child: argparse.ArgumentParser = group.add_parser(
        verb.rsplit(" ", 1)[-1],
        help=text,
        description=f"{text[0].upper()}{text[1:]}. {more}",
        epilog=f"example: {PROGRAM} {example}",
    )
    child.add_argument("--debug", action="store_true", help="show the traceback of an error")
    child.set_defaults(verb=verb)
    return child


def _add_json(child: argparse.ArgumentParser) -> None:
    child.add_argument("--json", action="store_true", help="for a program, on stdout")


def _add_in_and_out(child: argparse.ArgumentParser) -> None:
    child.add_argument("-i", "--input", required=True, help="a file, or a folder of files")
    child.add_argument("-o", "--output", required=True, help="folder for the results")


def _add_bundle_verbs(verbs: Any) -> None:
    train = _add(
        verbs, "train", "train a bundle",
        "train fundus_vessels quick --dataset_dir DRIVE --manifest drive", _FOLDS + _SETTINGS,
    )  # fmt: skip
    train.add_argument(
        "--continue-on-error", action="store_true",
        help="with --fold all: train the other folds when one fails, and exit 3",
    )  # fmt: skip
    predict = _add(
        verbs, "predict", "apply a bundle to an image or a folder",
        "predict fundus_vessels -i photos -o results --ckpt_path best.pt", _SETTINGS,
    )  # fmt: skip
    _add_in_and_out(predict)
    evaluate = _add(
        verbs, "evaluate", "score a checkpoint against labels",
        "evaluate fundus_vessels --dataset_dir STARE --manifest stare --ckpt_path best.pt",
        _SETTINGS,
    )  # fmt: skip
    for child in (train, predict, evaluate):
        child.add_argument("bundle", metavar="BUNDLE", help="a bundle's name or folder")
        child.add_argument("overlays", nargs="*", metavar="OVERLAY", help="files of its configs/")
        child.add_argument("--dry-run", action="store_true", help=_DRY_RUN)
        _add_json(child)


def _add_more_bundle_verbs(verbs: Any) -> None:
    ensemble = _add(
        verbs, "ensemble", "apply the mean of several checkpoints to an image or a folder",
        "ensemble fundus_vessels runs/fundus_vessels/default -i photos -o results",
        "A CHECKPOINT is a file, the folder of a run, or one with fold_<k> below it. " + _SETTINGS,
    )  # fmt: skip
    ensemble.add_argument("bundle", metavar="BUNDLE", help="a bundle's name or folder")
    ensemble.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="what is averaged")
    _add_in_and_out(ensemble)
    ensemble.add_argument("--dry-run", action="store_true", help=_DRY_RUN)
    _add_json(ensemble)
    export = _add(
        verbs, "export", "write a bundle's network as a file for other programs",
        "export fundus_vessels --ckpt_path best.pt -o vessels.onnx",
        "The file is opened and held against torch before it gets its name; a JSON beside it says "
        "what it is. Without --ckpt_path these are the weights that the bundle ships.",
    )  # fmt: skip
    export.add_argument("bundle", metavar="BUNDLE", help="a bundle's name or folder")
    export.add_argument("-o", "--output", required=True, type=Path, help="file to write")
    export.add_argument(
        "--format", help=f"{', '.join(EXPORT_SUFFIXES)} (default: by the suffix of -o)"
    )
    export.add_argument("--size", help="of the example window, such as 480x768")
    _add_json(export)
    demo = _add(
        verbs, "demo", "train a bundle on drawn data for a minute or two and apply it",
        "demo fundus_vessels -o runs/demo", "Settings are those of the training. " + _SETTINGS,
    )  # fmt: skip
    demo.add_argument(
        "bundle", nargs="?", default="fundus_vessels", metavar="BUNDLE",
        help="its name (default fundus_vessels)",
    )  # fmt: skip
    demo.add_argument("-o", "--output", default="runs/demo", help="folder (default runs/demo)")


def _add_data_verbs(data: Any) -> None:
    _add(data, "data list", "list the manifests", "data list")
    init = _add(data, "data init", "guess a manifest from a folder", "data init mine -o mine.yaml")
    init.add_argument("-o", "--output", help="file to write; printed if absent")
    preview = _add(
        data, "data preview", "draw images, labels and what training makes of them",
        "data preview drive DRIVE -o sheet.png --bundle fundus_vessels",
    )  # fmt: skip
    preview.add_argument("--bundle", help="whose training transforms to show")
    preview.add_argument("--cases", type=int, default=4, help="rows (default 4)")
    preview.add_argument("--variants", type=int, default=3, help="augmented per row (default 3)")
    check = _add(data, "data check", "name every problem of a folder", "data check drive DRIVE")
    _add_json(check)
    check.add_argument("--no-verify", action="store_true", help="do not compare checksums")
    check.add_argument(
        "--follow-symlinks", action="store_true", help="links may lead out of the folder"
    )
    freeze = _add(
        data, "data freeze", "write every file with its checksum, split and fold",
        "data freeze drive DRIVE -o drive_frozen.yaml",
    )  # fmt: skip
    freeze.add_argument("--folds", type=int, default=5, help="number of folds (default 5)")
    freeze.add_argument("--seed", type=int, help="of the folds (default: the manifest's)")
    sample = _add(data, "data sample", "write an example input", "data sample fundus -o photos")
    shows = "; ".join(f"{name}: {what}" for name, what in EXAMPLES.items())
    sample.add_argument("name", choices=list(EXAMPLES), help=shows)
    for child in (preview, check, freeze):
        child.add_argument("manifest", metavar="MANIFEST", help="a name of `data list`, or a file")
    for child in (init, preview, check, freeze):
        child.add_argument("folder", metavar="FOLDER", type=Path, help="where the data are")
    for child in (preview, freeze, sample):
        child.add_argument("-o", "--output", required=True, type=Path, help="where to write")
