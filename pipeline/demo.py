"""A demonstration of a bundle: trained for a minute or two on drawn data, applied to an example."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.arguments import setting_words
from pipeline.bundles import find_bundle_root, prepare_run
from pipeline.commands import exit_code_of_signal, signals_passed_on
from pipeline.errors import ConfigurationError
from pipeline.examples import EXAMPLE_OF, write_example

__all__ = ["Demonstration", "demonstrate"]

_OVERLAY = "quick"


@dataclass(frozen=True)
class Demonstration:
    """How a demonstration ended.

    Attributes:
        exit_code: 0, or that of the command that ended it, which has told why.
        training: its folder.
        predictions: their folder.
    """

    exit_code: int
    training: Path
    predictions: Path


def demonstrate(
    bundle: str,
    folder: Path | str,
    overrides: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Demonstration:
    """Train a bundle's `quick` overlay, write an example and apply the bundle to it.

    Each step is a command of its own, as a person would give it. The weights that the bundle ships
    are applied, those just trained where it ships none.

    Args:
        bundle: its name.
        folder: gets `train`, `input` and `predict`. A demonstration that was stopped goes on.
        overrides: of the training.
        say: gets each command before it runs.

    Raises:
        ConfigurationError: a bundle without demonstration, or an unknown id.
    """
    if bundle not in EXAMPLE_OF:
        raise ConfigurationError(
            f"no demonstration of {bundle!r}; there is one of {', '.join(EXAMPLE_OF)}"
        )
    settings = {**(overrides or {}), "output_dir": str(Path(folder) / "train")}
    prepare_run(bundle, "train", [_OVERLAY], settings)  # typos, before anything runs
    ended = Demonstration(0, Path(folder, "train"), Path(folder, "predict"))
    train = ["train", bundle, _OVERLAY, *setting_words(settings)]
    code = _run(train, say)
    if code == 0:
        example = write_example(EXAMPLE_OF[bundle], Path(folder) / "input")
        predict = ["predict", bundle, "-i", str(example), "-o", str(ended.predictions)]
        if not (Path(find_bundle_root(bundle)) / "models" / "model.pt").is_file():
            best = {"ckpt_path": str(ended.training / "checkpoints" / "best.pt")}
            predict += setting_words(best)
        code = _run(predict, say)
    return Demonstration(code, ended.training, ended.predictions)


def _run(words: list[str], say: Callable[[str], None]) -> int:
    """Run a command to its end, and return its exit code."""
    say(f"$ python -m pipeline {' '.join(words)}")
    with signals_passed_on() as commands:
        returned = commands.run([sys.executable, "-m", "pipeline", *words], os.environ)
    return exit_code_of_signal(-returned) if returned < 0 else returned
