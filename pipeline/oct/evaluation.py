"""Errors of the boundaries over a validation or test set, as a metric of MONAI's evaluator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ignite.engine import Engine
from ignite.metrics import Metric
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import InputError
from pipeline.inference.evaluation_tables import items_of, known_mean
from pipeline.oct.coordinates import Layers, extract_layers, original_extraction
from pipeline.oct.frames import layers_to_frame
from pipeline.oct.losses import IGNORE_LABEL
from pipeline.oct.mask_metrics import CLASSES, dice_per_class, mask_confusion
from pipeline.oct.metrics import ScanRows, evaluate_scans, layer_metrics
from pipeline.oct.pixel_maps import class_mask
from pipeline.oct.risk_coverage import sigma_for_coverage

__all__ = ["LayerMetrics", "Watch", "layers_in_source"]

Watch = Callable[[Mapping[str, Any], Layers, ScanRows], None]

_BOUNDARIES = ("ilm", "bm")
_TOLD = (
    *(f"{name}_{figure}" for name in _BOUNDARIES for figure in ("mae_px", "p95_px", "coverage")),
    "thickness_mae_px",
    "dice",
)
_COMPARED = (
    *(f"{name}_{key}" for name in _BOUNDARIES for key in ("mae_px", "p95_px", "max_px", "found")),
    "order_violations",
)


class LayerMetrics(Metric):
    """Score rows against annotated ones, in the frame of the B-scans as they were stored.

    All annotated columns count; the figures of the valid ones stand beside them. The value is the
    mean of the ILM's and BM's MAE in px, each the mean over the eyes: lower is better. The
    evaluator's metrics get `val_ilm_mae_px`, `val_bm_mae_px`, `..._p95_px`, `..._coverage`,
    `val_thickness_mae_px`, `val_dice` (mean over the classes) and `val_coverage`, and as
    `max_sigma_px` and `threshold`, under which a checkpoint keeps it, the sigma that leaves the
    wanted share of columns valid. What could not be measured is left out.

    `per_image` holds a row per B-scan. Of the items no more than their rows is kept.

    Args:
        extraction: arguments of `extract_layers`.
        watch: called with the item, what was extracted, and the rows that are compared.
        coverage: share of the annotated columns that `max_sigma_px` is to leave valid.
        compare_transition: give, with `transition_` before the name, also what the original's
            extraction makes of the same logits.
    """

    required_output_keys = None

    def __init__(
        self,
        extraction: Mapping[str, Any],
        watch: Watch | None = None,
        coverage: float = 0.99,
        compare_transition: bool = False,
    ) -> None:
        self.extraction = dict(extraction)
        self.watch = watch
        self.coverage = coverage
        self.compare_transition = compare_transition
        super().__init__()

    def reset(self) -> None:
        """Forget the B-scans seen."""
        self.per_image: list[dict[str, Any]] = []
        self._scans: list[ScanRows] = []
        self._by_transition: list[ScanRows] = []
        self._sigmas: list[NDArray[np.float64]] = []
        self._confusion = np.zeros((len(CLASSES), len(CLASSES)), np.int64)

    def iteration_completed(self, engine: Engine) -> None:
        """Take the items of the iteration."""
        self.update(items_of(engine))

    def update(self, output: Sequence[Mapping[str, Any]]) -> None:
        """Take items.

        Args:
            output: each with `pred`, logits `(3, h, w)`; `ilm_source` and `bm_source`, rows `(W,)`
                in the frame of `source_shape` `(H, W)`; `name`; `subject`, or more exactly `eye`;
                `scale_y_um`, NaN where unknown; and, for the Dice, `label` `(1, h, w)`, in which
                255 is left out. Rows of `label` beyond `h` are, too.

        Raises:
            InputError: an item has no annotated rows, or its logits are not finite.
        """
        for item in output:
            self._score(item)

    def _score(self, item: Mapping[str, Any]) -> None:
        """Compare one B-scan, and keep its rows."""
        logits = item["pred"][None]
        frame, shape = _size(logits.shape[2:]), _size(item["source_shape"])
        layers = layers_in_source(logits, self.extraction, shape, _scale_um(item))
        scan = _scan(item, layers)
        row: dict[str, Any] = {"image": scan.name, "subject": str(item.get("subject", ""))}
        row |= {"stratum": item["stratum"]} if item.get("stratum") else {}
        figures = layer_metrics([scan])
        row["mae_px"] = known_mean(
            figures[f"{name}_mae_px"] for name in _BOUNDARIES if f"{name}_mae_px" in figures
        )
        row |= figures
        if item.get("label") is not None:
            confusion = _confusion(logits, item["label"])
            self._confusion += confusion
            row["dice"] = known_mean(dice_per_class(confusion).values())
        if self.compare_transition:
            original = layers_to_frame(original_extraction(logits), frame, shape)
            self._by_transition.append(_scan(item, original))
            row |= _transition_figures(layer_metrics(self._by_transition[-1:]))
        self._scans.append(scan)
        self._sigmas.append(_annotated_sigmas(layers, scan) * (frame[0] / shape[0]))
        self.per_image.append(row)
        if self.watch is not None:
            self.watch(item, layers, scan)

    def figures(self) -> dict[str, Any]:
        """Return `overall` and `per_subject` of all B-scans seen, as `evaluate_scans` has them.

        Returns:
            To `overall` are added `dice`, `dice_` of each class, `coverage`, `max_sigma_px`, and
            the figures of the original's extraction where they are asked for.

        Raises:
            InputError: there was no B-scan.
        """
        found = evaluate_scans(self._scans)
        overall = found["overall"]
        dice = dice_per_class(self._confusion)
        overall |= {"dice": known_mean(dice.values()), **{f"dice_{k}": v for k, v in dice.items()}}
        overall["coverage"] = known_mean(overall[f"{name}_coverage"] for name in _BOUNDARIES)
        overall["max_sigma_px"] = self._chosen_sigma()
        if self._by_transition:
            overall |= _transition_figures(evaluate_scans(self._by_transition)["overall"])
        subjects = {str(row.pop("eye")): row for row in found["per_eye"]}
        return {"overall": overall, "per_subject": subjects}

    def compute(self) -> float:
        """Return the mean of the ILM's and BM's MAE in px, NaN where there was no B-scan."""
        return _value(evaluate_scans(self._scans)["overall"]) if self._scans else math.nan

    def completed(self, engine: Engine, name: str) -> None:
        """Put the figures into the evaluator's metrics; what stands before `_` in `name`, first."""
        overall = self.figures()["overall"] if self._scans else {}
        prefix, metrics = name.split("_", 1)[0], engine.state.metrics
        for key in (*_TOLD, "coverage"):
            metrics.pop(f"{prefix}_{key}", None)  # of an earlier epoch
            if math.isfinite(value := overall.get(key, math.nan)):
                metrics[f"{prefix}_{key}"] = value
        metrics[name] = _value(overall) if overall else math.nan
        if math.isfinite(sigma := overall.get("max_sigma_px", math.nan)):
            metrics["max_sigma_px"] = metrics["threshold"] = sigma

    def _chosen_sigma(self) -> float:
        """Return the sigma, in rows of the logits, that leaves the wanted share valid."""
        sigmas = np.concatenate(self._sigmas)
        return sigma_for_coverage(sigmas, self.coverage) if sigmas.size else math.nan


def layers_in_source(
    logits: NDArray[Any] | Tensor,
    extraction: Mapping[str, Any],
    source_shape: Sequence[int],
    scale_y_um: float | None = None,
) -> Layers:
    """Return the boundaries of some B-scans in their own frame.

    Args:
        logits: `(B, 3, h, w)`.
        extraction: arguments of `extract_layers`, whose rows are those of the logits. Its
            `thickness_um` counts where the scale is known.
        source_shape: rows and columns of the B-scans as they were stored.
        scale_y_um: height of a pixel of these; None where unknown.

    Raises:
        ConfigurationError: a setting is out of its range.
        InputError: shape or type of the logits is another one, or one of them is not finite.
    """
    frame, source = _size(logits.shape[2:]), _size(source_shape)
    settings = dict(extraction)
    if settings.get("thickness_um") is not None:
        settings["scale_y_um"] = None if scale_y_um is None else scale_y_um * source[0] / frame[0]
        if scale_y_um is None:
            del settings["thickness_um"]
    return layers_to_frame(extract_layers(logits, **settings), frame, source)


def _scan(item: Mapping[str, Any], layers: Layers) -> ScanRows:
    """Return extracted and annotated rows of one B-scan."""
    name = str(item.get("name", ""))
    lacking = [key for key in _BOUNDARIES if item.get(f"{key}_source") is None]
    if lacking:
        raise InputError(
            f"{name}: no annotated rows of {' and '.join(lacking).upper()}, expected both (NaN "
            "where nobody annotated); choose scans with annotation"
        )
    group = item.get("eye") or item.get("subject") or name
    truth = {key: np.asarray(item[f"{key}_source"], np.float64) for key in _BOUNDARIES}
    return ScanRows(
        name=name,
        eye=str(group),
        predicted={"ILM": layers.ilm_px[0], "BM": layers.bm_px[0]},
        truth={"ILM": truth["ilm"], "BM": truth["bm"]},
        valid={"ILM": layers.ilm_valid[0], "BM": layers.bm_valid[0]},
        scale_y_um=_scale_um(item),
    )


def _scale_um(item: Mapping[str, Any]) -> float | None:
    scale = item.get("scale_y_um")
    return None if scale is None or math.isnan(float(scale)) else float(scale)


def _size(shape: Sequence[int]) -> tuple[int, int]:
    rows, columns = (int(side) for side in shape)
    return rows, columns


def _annotated_sigmas(layers: Layers, scan: ScanRows) -> NDArray[np.float64]:
    """Return the sigmas of both boundaries where they are annotated, in rows of the source."""
    pairs = (("ILM", layers.ilm_sigma_px), ("BM", layers.bm_sigma_px))
    return np.concatenate([sigma[0][np.isfinite(scan.truth[name])] for name, sigma in pairs])


def _confusion(logits: Any, label: Any) -> NDArray[np.int64]:
    classes = class_mask(logits)[0]
    truth = np.asarray(label.cpu() if isinstance(label, Tensor) else label)[0]
    return mask_confusion(classes, truth[: len(classes)].astype(np.uint8), IGNORE_LABEL)


def _transition_figures(figures: Mapping[str, Any]) -> dict[str, float]:
    return {f"transition_{key}": figures[key] for key in _COMPARED if key in figures}


def _value(overall: Mapping[str, Any]) -> float:
    return known_mean(overall[f"{name}_mae_px"] for name in _BOUNDARIES)
