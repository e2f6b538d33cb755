"""What an evaluation of any system writes, and the means in its tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from ignite.engine import Engine

from pipeline.data.atomic import write_yaml
from pipeline.data.writers import result_path

__all__ = ["EvaluationFolder", "column_means", "items_of", "known_mean"]


class EvaluationFolder:
    """The folder of an evaluation: `predictions/`, `pictures/` and two tables.

    What belongs to an input keeps the folders and the stem of its name.

    Args:
        output_dir: the folder.
        summary: plain data for the head of `test_metrics.yaml`: experiment, checkpoint, split, ...
    """

    def __init__(self, output_dir: Path | str, summary: Mapping[str, Any]) -> None:
        self.output_dir = Path(output_dir)
        self.summary = dict(summary)

    def prediction(self, name: str, suffix: str) -> Path:
        """Return where the prediction for the input `name` goes."""
        return result_path(name, ".", self.output_dir / "predictions", suffix)

    def picture(self, name: str) -> Path:
        """Return where the picture of the input `name` goes."""
        return result_path(name, ".", self.output_dir / "pictures", ".png")

    def write_tables(
        self, per_image: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]
    ) -> None:
        """Write `per_image_metrics.yaml` and, last, `test_metrics.yaml`.

        Args:
            per_image: a row per input.
            figures: of all inputs; in `test_metrics.yaml` they follow the summary and the number of
                inputs.

        Raises:
            ResourceError: the folder cannot be written.
        """
        write_yaml(self.output_dir / "per_image_metrics.yaml", per_image)
        content = {**self.summary, "num_test_images": len(per_image), **figures}
        write_yaml(self.output_dir / "test_metrics.yaml", content)


def items_of(engine: Engine) -> list[dict[str, Any]]:
    """Return the decollated items of an evaluator's iteration, batch and output merged."""
    state: Any = engine.state
    return [{**given, **made} for given, made in zip(state.batch, state.output, strict=True)]


def column_means(rows: Sequence[Mapping[str, Any]], complete: bool = False) -> dict[str, float]:
    """Return the mean of every column of numbers, over the rows in which it is known.

    A value that is absent, None or NaN is not known; a column with anything else that is no number
    has no mean.

    Args:
        rows: one mapping each.
        complete: leave out a column that is not known in every row, because a mean over some rows
            could not be compared; else it is NaN where no row knows it.

    Example:
        >>> column_means([{"image": "a", "x": 1.0}, {"image": "b", "x": 2.0, "y": 5.0}])
        {'x': 1.5, 'y': 5.0}
        >>> column_means([{"image": "a", "x": 1.0}, {"image": "b", "x": 2.0, "y": 5.0}], True)
        {'x': 1.5}
    """
    means = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [math.nan if row.get(key) is None else row[key] for row in rows]
        if not all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
            continue
        numbers = [float(value) for value in values]
        if not (complete and any(map(math.isnan, numbers))):
            means[key] = known_mean(numbers)
    return means


def known_mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN, NaN where there is none."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
