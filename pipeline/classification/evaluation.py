"""Scores of a classifier over a validation or test set, as a metric of MONAI's evaluator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ignite.engine import Engine
from ignite.metrics import Metric
from numpy.typing import NDArray
from torch import Tensor

from pipeline.classification.metrics import (
    TOP_K,
    best_temperature,
    class_metrics,
    classification_metrics,
    confusion_matrix,
    log_probabilities,
)
from pipeline.errors import ConfigurationError, InputError
from pipeline.inference.evaluation_tables import items_of

__all__ = ["ClassMetrics", "Watch", "checked_names"]

Watch = Callable[[Mapping[str, Any], Mapping[str, Any]], None]

_PER_SCALE = ("accuracy", "macro_f1", "nll")


class ClassMetrics(Metric):
    """Score logits against class numbers.

    The evaluator's metrics get `val_accuracy`, `val_balanced_accuracy`, `val_macro_f1`, `val_nll`,
    `val_ece`, with more than five classes `val_top5` and with two `val_auc`; `val` being what
    stands before the first `_` of the metric's own name. That name says which of them is the value,
    such as `val_macro_f1`. What could not be measured is left out.

    `temperature`, and the same as `threshold` for the checkpoint, is what divides the logits so
    that probabilities are as sure as they are right.

    With `scales`, each item also has the logits of the same image seen at other sizes, and the
    metrics get `val_accuracy_48`, `val_macro_f1_48` and `val_nll_48`.

    Attributes:
        per_image: a row per image: truth and prediction with their probabilities.

    Args:
        class_names: of all classes, in the order of their numbers.
        scales: sizes in pixels; an item has logits `pred_<size>` for each of them but one at most,
            which is the size that `pred` was made at.
        top_k: how many guesses `top<k>` has.
        temperature: divides the logits; None leaves them as they are and chooses one on these very
            images, as validation does.
        watch: called with each item and its row.

    Raises:
        ConfigurationError: fewer than two class names, or one of them twice.
    """

    required_output_keys = None

    def __init__(
        self,
        class_names: Sequence[str],
        scales: Sequence[int] = (),
        top_k: int = TOP_K,
        temperature: float | None = None,
        watch: Watch | None = None,
    ) -> None:
        if temperature is not None and not temperature > 0:
            raise ConfigurationError(f"temperature must be null or above 0, got {temperature!r}")
        self.class_names = checked_names(class_names)
        self.scales = tuple(scales)
        self.top_k = top_k
        self.temperature = temperature
        self.watch = watch
        super().__init__()

    def reset(self) -> None:
        """Forget the images seen."""
        self.per_image: list[dict[str, Any]] = []
        self._labels: list[int] = []
        self._predicted: list[int] = []
        self._logits: dict[str, list[NDArray[np.float32]]] = {}

    def iteration_completed(self, engine: Engine) -> None:
        """Take the items of the iteration."""
        self.update(items_of(engine))

    def update(self, output: Sequence[Mapping[str, Any]]) -> None:
        """Take items.

        Args:
            output: each with `pred`, logits `(K,)`, or `(1,)` for two classes; `label`, a class
                number; `name`; `pred_<size>`, logits like `pred`, for the `scales`; and, as far as
                known, `stratum`.

        Raises:
            InputError: label or logits do not fit the classes, or a logit is not finite.
        """
        for item in output:
            label = self._label(item)
            for key in self._keys(item):
                self._logits.setdefault(key, []).append(self._item_logits(item, key))
            self._labels.append(label)
            row = self._row(item, label)
            self.per_image.append(row)
            if self.watch is not None:
                self.watch(item, row)

    def figures(self) -> dict[str, float]:
        """Return the scores of all images seen, those of the `scales` with `_<size>` behind."""
        truth = np.array(self._labels, np.int64)
        found = {
            key: classification_metrics(np.stack(logits), truth, top_k=self.top_k)
            for key, logits in self._logits.items()
        }
        figures = found.pop("pred", {})
        for size in self.scales:
            scores = found.get(f"pred_{size}", figures)
            figures = figures | {f"{k}_{size}": scores[k] for k in _PER_SCALE if k in scores}
        return figures

    def confusion(self) -> NDArray[np.float64]:
        """Return the counts `(K, K)` of images, truth along the rows."""
        predicted, truth = np.array(self._predicted, np.int64), np.array(self._labels, np.int64)
        return confusion_matrix(predicted, truth, len(self.class_names))

    def per_class(self) -> list[dict[str, Any]]:
        """Return a row per class: `support`, `predicted`, `recall`, `precision` and `f1`."""
        columns = class_metrics(self.confusion())
        return [
            {
                "class": name,
                "index": number,
                **{key: int(columns[key][number]) for key in ("support", "predicted")},
                **{key: float(columns[key][number]) for key in ("recall", "precision", "f1")},
            }
            for number, name in enumerate(self.class_names)
        ]

    def compute(self) -> float:
        """Return the accuracy, NaN where there was no image."""
        return self.figures().get("accuracy", math.nan)

    def completed(self, engine: Engine, name: str) -> None:
        """Put the figures into the evaluator's metrics.

        Raises:
            ConfigurationError: no figure is called like the metric.
        """
        figures, metrics = self.figures(), engine.state.metrics
        prefix, _, main = name.partition("_")
        if figures and main not in figures:
            raise ConfigurationError(
                f"metric {name}: no such figure of {len(self.class_names)} classes; expected one "
                f"of {', '.join(f'{prefix}_{key}' for key in figures)}"
            )
        for key, value in figures.items():
            metrics.pop(f"{prefix}_{key}", None)  # of an earlier epoch
            if math.isfinite(value):
                metrics[f"{prefix}_{key}"] = value
        metrics[name] = figures.get(main, math.nan)
        metrics["temperature"] = metrics["threshold"] = self._temperature()

    def _temperature(self) -> float:
        if self.temperature is not None:
            return self.temperature
        if not self._labels:
            return 1.0
        return best_temperature(np.stack(self._logits["pred"]), np.array(self._labels, np.int64))

    def _keys(self, item: Mapping[str, Any]) -> list[str]:
        """Return `pred` and the keys of the other scales' logits."""
        at_scale = [f"pred_{size}" for size in self.scales]
        if len(absent := [key for key in at_scale if key not in item]) > 1:
            raise ConfigurationError(
                f"scales: the items have no {', '.join(absent)}; expected one for each scale but "
                "that of pred; see how the evaluator predicts at several scales"
            )
        return ["pred", *(key for key in at_scale if key in item)]

    def _item_logits(self, item: Mapping[str, Any], key: str) -> NDArray[np.float32]:
        logits = _array(item[key]).astype(np.float32)
        classes = len(self.class_names)
        if logits.shape != (classes,) and not (classes == 2 and logits.shape == (1,)):
            raise InputError(
                f"{_name(item)}: {key} has the shape {logits.shape} for {classes} classes; set "
                "num_classes of the network to their number, or to 1 where there are two"
            )
        if not np.isfinite(logits).all():
            raise InputError(
                f"{_name(item)}: {key} is not finite; train again at a lower learning rate"
            )
        return logits if self.temperature is None else logits / np.float32(self.temperature)

    def _label(self, item: Mapping[str, Any]) -> int:
        value = _array(item["label"])
        classes = len(self.class_names)
        if value.size != 1 or value.item() not in range(classes):
            raise InputError(
                f"{_name(item)}: label {value.tolist()}, expected a class number from 0 to "
                f"{classes - 1}; see the list of classes"
            )
        return int(value.item())

    def _row(self, item: Mapping[str, Any], label: int) -> dict[str, Any]:
        log_probability = log_probabilities(self._logits["pred"][-1][None])[0]
        probability = np.exp(log_probability)
        predicted = int(probability.argmax())
        self._predicted.append(predicted)
        row = {
            "image": _name(item),
            "truth": self.class_names[label],
            "truth_probability": float(probability[label]),
            "predicted": self.class_names[predicted],
            "predicted_probability": float(probability[predicted]),
            "nll": -float(log_probability[label]),
            "correct": predicted == label,
        }
        return row | ({"stratum": str(item["stratum"])} if item.get("stratum") else {})


def checked_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the classes as texts.

    Raises:
        ConfigurationError: fewer than two, or one of them twice.
    """
    if isinstance(class_names, str) or len(class_names) < 2:
        raise ConfigurationError(
            f"class_names must be a list of two names or more, got {class_names!r}"
        )
    names = tuple(str(name) for name in class_names)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(
            f"class_names has {', '.join(twice[:20])} twice; give each class a name of its own"
        )
    return names


def _name(item: Mapping[str, Any]) -> str:
    return str(item.get("name", ""))


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(value.detach().cpu().float() if isinstance(value, Tensor) else value)
