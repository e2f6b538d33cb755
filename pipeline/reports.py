"""The page of any folder that a run left, written again from the files in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.report.evaluation import evaluation_report
from pipeline.report.inference import inference_report
from pipeline.report.run_files import read_yaml
from pipeline.report.training import training_report

__all__ = ["write_report"]

_PAGES: dict[str, Callable[..., Path]] = {  # by the file that such a folder has
    "summary.json": inference_report,
    "test_metrics.yaml": evaluation_report,
    "metrics_history.yaml": training_report,
}
_REFERENCE = re.compile(r"@([\w:]+)")


def write_report(folder: Path | str) -> Path:
    """Write `report.html` into the folder of a run and return its path.

    What else its bundle told the page, such as the figure that orders the pictures, is taken from
    the run's own `config.yaml`.

    Args:
        folder: of a training, an evaluation or predictions; of several in one folder, the one that
            was written last.

    Raises:
        InputError: it is none of these.
    """
    folder = Path(folder)
    found = [name for name in _PAGES if (folder / name).is_file()]
    if not found:
        raise InputError(
            f"{folder}: no {', '.join(_PAGES)}: give the folder of a training, of an evaluation "
            "(evaluation/test below it) or of predictions"
        )
    last = max(found, key=lambda name: (folder / name).stat().st_mtime_ns)
    page = _PAGES[last]
    given, named = _arguments(folder, page.__name__)
    return page(folder, *given, **named)


def _arguments(folder: Path, function: str) -> tuple[list[Any], dict[str, Any]]:
    """Return what the run's configuration gave `function` beside the folder."""
    config = read_yaml(folder / "config.yaml")
    steps = config.get("run") if isinstance(config, Mapping) else None
    for step in steps if isinstance(steps, list) else []:
        text = str(step).removeprefix("$")
        if text.startswith(f"{function}("):
            return _literals(text, config)
    return [], {}


def _literals(call: str, config: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a call behind the first, where they are plain.

    A reference stands for its value in `config`. Nothing is evaluated.
    """
    try:
        tree = ast.parse(_REFERENCE.sub(lambda match: repr(f"@{match[1]}"), call), mode="eval").body
        if not isinstance(tree, ast.Call):
            return [], {}
        given = [ast.literal_eval(node) for node in tree.args[1:]]
        named = {word.arg: ast.literal_eval(word.value) for word in tree.keywords if word.arg}
    except (SyntaxError, ValueError):  # an expression: the page's own defaults serve
        return [], {}

    def value(item: Any) -> Any:
        reference = isinstance(item, str) and item.startswith("@")
        return config.get(item[1:]) if reference else item

    return [value(item) for item in given], {key: value(item) for key, item in named.items()}
