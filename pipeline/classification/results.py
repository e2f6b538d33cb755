"""What evaluation and inference write: classes with their probabilities, tables, pictures."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from numpy.typing import NDArray
from torch import Tensor

from pipeline.classification.evaluation import ClassMetrics, checked_names
from pipeline.classification.metrics import TOP_K, log_probabilities
from pipeline.classification.pictures import captioned_image, write_confusion_picture
from pipeline.data.atomic import write_csv
from pipeline.data.writers import write_png
from pipeline.errors import InputError
from pipeline.inference.batch import BatchRun
from pipeline.inference.evaluation_tables import EvaluationFolder, column_means, items_of
from pipeline.inference.sidecars import read_sidecar

__all__ = ["ClassWriter", "EvaluationWriter"]

PREDICTIONS = "predictions.csv"


class ClassWriter:
    """Record each image's class as inference goes along, and list them all at its end.

    List it among the evaluator's `handlers`. The result of an input is its sidecar, `<name>.json`:
    `class`, `index`, `probability` and `top`, the best guesses with theirs. `predictions.csv` has a
    row per input with the same, those done in an earlier run included.

    Args:
        batch: the run over files, which names the results and keeps the account.
        class_names: of all classes, in the order of their numbers, from the checkpoint.
        save_probabilities: whether the probabilities of all classes are written too, as columns
            `p_<class>`.
        top_k: how many guesses are written.
        temperature: divides the logits, as validation chose.
        checkpoint: plain data of the checkpoint for the sidecar: epoch, score, ...

    Raises:
        ConfigurationError: fewer than two class names, or one of them twice.
    """

    def __init__(
        self,
        batch: BatchRun,
        class_names: Sequence[str],
        save_probabilities: bool = False,
        top_k: int = TOP_K,
        temperature: float = 1.0,
        checkpoint: Mapping[str, Any] | None = None,
    ) -> None:
        self.batch = batch
        self.class_names = checked_names(class_names)
        self.save_probabilities = save_probabilities
        self.top_k = min(top_k, len(self.class_names))
        self.temperature = temperature
        self.checkpoint = dict(checkpoint or {})
        # At the end of the run, also of one with nothing to do, which no engine sees.
        batch.closing.callback(self.write_table)

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def write_table(self) -> None:
        """Write `predictions.csv`, from the sidecars of all inputs that are done."""
        found = {
            str(row["image"]): read_sidecar(self.batch.path(str(row["image"]), ".json")) or {}
            for row in self.batch.rows
        }
        rows = [_table_row(name, found[name]) for name in sorted(found)]
        columns = ["image", "class", "index", "probability"]
        for place in range(2, self.top_k + 1):
            columns += [f"class_{place}", f"probability_{place}"]
        if self.save_probabilities:
            columns += [f"p_{name}" for name in self.class_names]
        write_csv(self.batch.output_dir / PREDICTIONS, rows, columns)

    def _write(self, engine: Engine) -> None:
        for item in items_of(engine):
            name = str(item["name"])
            probability = self._probability(name, item["pred"])
            best = np.argsort(-probability, kind="stable")[: self.top_k]
            top = [self._guess(int(number), probability) for number in best]
            details: dict[str, Any] = {**top[0], "top": top, "checkpoint": self.checkpoint}
            if self.save_probabilities:
                details["probabilities"] = dict(
                    zip(self.class_names, probability.tolist(), strict=True)
                )
            self.batch.record(name, [], top[0], details)

    def _guess(self, number: int, probability: NDArray[np.float64]) -> dict[str, Any]:
        return {
            "class": self.class_names[number],
            "index": number,
            "probability": float(probability[number]),
        }

    def _probability(self, name: str, logits: Tensor) -> NDArray[np.float64]:
        """Return the probabilities `(K,)` of logits `(K,)`, or of `(1,)` for two classes."""
        values = np.asarray(logits.detach().cpu().float()) / self.temperature
        try:
            found: NDArray[np.float64] = np.exp(log_probabilities(values[None])[0])
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if len(found) != len(self.class_names):
            raise InputError(
                f"{name}: the network tells {len(found)} classes apart and the checkpoint names "
                f"{len(self.class_names)}; use the checkpoint's own network"
            )
        return found


class EvaluationWriter:
    """Write tables, confusion matrix and the hardest images of an evaluation.

    List it among `validate::handlers` of an evaluation: `test_metrics.yaml`,
    `per_image_metrics.yaml`, `per_class_metrics.csv`, `confusion_matrix.csv` (truth along the
    rows), `confusion_matrix.png` and, below `pictures/`, the images whose truth was given the
    lowest probability, as the network saw them.

    Args:
        output_dir: the evaluation's folder.
        metrics: the evaluator's metric; its `watch` becomes this writer's.
        summary: plain data for the head of `test_metrics.yaml`.
        most_pictures: how many images are drawn, at most.
    """

    def __init__(
        self,
        output_dir: str,
        metrics: ClassMetrics,
        summary: Mapping[str, Any],
        most_pictures: int = 24,
    ) -> None:
        self.folder = EvaluationFolder(output_dir, summary)
        self.metrics = metrics
        self.most_pictures = most_pictures
        self._hardest: list[tuple[float, int, Mapping[str, Any], NDArray[np.float32]]] = []
        metrics.watch = self.watch

    def attach(self, engine: Engine) -> None:
        """Follow `engine`, the evaluator."""
        engine.add_event_handler(Events.STARTED, self._hardest.clear)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def watch(self, item: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Keep the image of `item` while it is among the hardest."""
        hardness, number = -float(row["truth_probability"]), -len(self.metrics.per_image)
        full = len(self._hardest) >= self.most_pictures
        if self.most_pictures < 1 or (full and (hardness, number) < self._hardest[0][:2]):
            return
        image = np.asarray(item["image"].detach().cpu().float())
        entry = (hardness, number, row, image)  # the number settles ties: rows have no order
        if full:
            heapq.heapreplace(self._hardest, entry)
        else:
            heapq.heappush(self._hardest, entry)

    def write(self) -> None:
        """Write everything, the tables last."""
        names, confusion = self.metrics.class_names, self.metrics.confusion()
        for _, _, row, image in sorted(self._hardest, key=lambda entry: entry[:2]):
            truth = f"truth: {row['truth']} ({row['truth_probability']:.0%})"
            said = f"predicted: {row['predicted']} ({row['predicted_probability']:.0%})"
            picture = captioned_image(image, truth, said, bool(row["correct"]))
            write_png(self.folder.picture(str(row["image"])), picture)
        write_csv(self.folder.output_dir / "per_class_metrics.csv", self.metrics.per_class())
        write_csv(
            self.folder.output_dir / "confusion_matrix.csv",
            [
                {"truth/predicted": name, **dict(zip(names, map(int, row), strict=True))}
                for name, row in zip(names, confusion, strict=True)
            ],
        )
        write_confusion_picture(self.folder.output_dir / "confusion_matrix.png", confusion, names)
        rows = self.metrics.per_image
        figures = {
            "classes": len(names),
            "temperature": self.metrics.temperature,
            "average_metrics": column_means(rows),
            "pooled_metrics": self.metrics.figures(),
        }
        strata = _strata(rows)
        self.folder.write_tables(rows, figures | ({"strata": strata} if strata else {}))


def _table_row(name: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of `predictions.csv` for the input `name`."""
    row = {"image": name, **{key: said.get(key, "") for key in ("class", "index", "probability")}}
    for place, guess in enumerate(said.get("top", ())[1:], start=2):
        row |= {f"{key}_{place}": guess[key] for key in ("class", "probability")}
    return row | {f"p_{key}": value for key, value in said.get("probabilities", {}).items()}


def _strata(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return how many images of each stratum were right, since one mean hides failures."""
    found = {}
    for stratum in sorted({row["stratum"] for row in rows if "stratum" in row}):
        members = [row for row in rows if row.get("stratum") == stratum]
        right = [{"accuracy": float(row["correct"])} for row in members]
        found[stratum] = {"images": len(members), **column_means(right)}
    return found
