"""The page of a training run, made from the files that the run left."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.report.figures import curves
from pipeline.report.machine import add_environment, add_plan
from pipeline.report.page import Link, Page
from pipeline.report.run_files import mapping_in, pictures, read_json, read_text, rows_in
from pipeline.report.values import finite, format_duration, format_time

__all__ = ["training_report"]

_AT_SIZE = re.compile(r"(.+)_(\d+)")  # of a classifier: the metric at another image size
_SPEED = {"peak_memory_mb": "peak memory, MB", "loader_share": "share of time spent loading"}
_LOG_LINES = 200


def training_report(output_dir: Path | str) -> Path:
    """Write `report.html` into a training folder and return its path.

    Args:
        output_dir: holds `metrics_history.yaml`, or of a run that has not ended an epoch
            `environment.json`; and where present `config.yaml`, `run.log`, `checkpoints/`,
            `pictures/` and `evaluation/`.

    Raises:
        InputError: it is no folder of a training run.
    """
    folder = Path(output_dir)
    history = [entry for entry in rows_in(folder / "metrics_history.yaml") if "epoch" in entry]
    environment: dict[str, Any] = read_json(folder / "environment.json") or {}
    config = mapping_in(folder / "config.yaml")
    if not history and not environment:
        raise InputError(
            f"{folder}: no epoch in metrics_history.yaml: give the folder of a training run"
        )
    best = next((entry for entry in reversed(history) if entry.get("new_best")), None)
    page = Page(f"Training: {folder.name}", str(environment.get("command", "")))
    page.facts(_facts(history, best, environment, config))
    _evaluations(page, folder)
    if history and best is None:
        page.warning("No epoch was validated, so none is the best one.")
    if history:
        page.section("Curves")
        page.figures(_charts(history, best, config))
    else:
        page.warning("No epoch has ended yet.")
    shown = pictures(folder)
    if shown:
        page.section("Validation pictures")
        page.text("Panels of validation cases, as they were at the best epoch.", soft=True)
        page.pictures(shown)
    if history:
        _epochs(page, history)
    add_plan(page, environment)
    add_environment(page, environment)
    _files(page, folder, config)
    return page.write(folder / "report.html")


def _facts(
    history: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any] | None,
    environment: Mapping[str, Any],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    values = _part(best or {}, "val")
    monitor = str(_part(config, "early_stopping").get("monitor") or "")
    facts: dict[str, Any] = {}
    if best is not None:
        facts["best epoch"] = best["epoch"]
        if monitor in values:
            facts[f"{monitor}, which chose it"] = values[monitor]
    if history:
        asked = config.get("max_epochs")
        done = history[-1]["epoch"]
        facts["epochs"] = f"{done} of {asked}" if isinstance(asked, int) else done
        spent_s = sum(finite(entry.get("seconds")) or 0.0 for entry in history)
        facts["time"] = format_duration(spent_s)
    facts["device"] = environment.get("device")
    facts["started"] = format_time(environment.get("started"))
    others = {f"best {k}": v for k, v in values.items() if k != monitor and not _at_size(k, values)}
    return facts | others


def _charts(
    history: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any] | None,
    config: Mapping[str, Any],
) -> list[str]:
    """Return one chart per metric, training and validation and all image sizes in the same one."""
    found = {
        f"{split}.{name}": (split, name.removeprefix("val_"))
        for entry in history
        for split in ("train", "val")
        for name in _part(entry, split)
    }
    metrics = {metric for _, metric in found.values()}
    groups: dict[str, dict[str, str]] = {}
    for key, (split, metric) in found.items():
        if of := _at_size(metric, metrics):
            groups.setdefault(of, {})[f"{metric.removeprefix(f'{of}_')} px"] = key
        else:
            groups.setdefault(metric, {})[split] = key
    monitor = str(_part(config, "early_stopping").get("monitor") or "").removeprefix("val_")
    first = [name for name in ("loss", monitor) if name in groups]
    groups = {name: groups[name] for name in dict.fromkeys([*first, *groups])}
    if any("learning_rate" in entry for entry in history):
        groups["learning rate"] = {"learning rate": "learning_rate"}
    for key, title in _SPEED.items():
        if any(key in _part(entry, "speed") for entry in history):
            groups[title] = {title: f"speed.{key}"}
    mark = float(best["epoch"]) if best is not None else None
    return [curves(history, keys, title, mark) for title, keys in groups.items()]


def _at_size(metric: str, metrics: Collection[str]) -> str:
    """Return which of `metrics` this one is at another image size; empty where it is none."""
    match = _AT_SIZE.fullmatch(metric)
    return match[1] if match and match[1] in metrics else ""


def _epochs(page: Page, history: Sequence[Mapping[str, Any]]) -> None:
    page.section("Epochs")
    rows = [_row(entry) for entry in history]
    last = ["learning rate", "seconds", "new best"]  # a row without validation has fewer keys
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in last]
    page.table(rows, [*columns, *last])


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"epoch": entry["epoch"]}
    row |= {f"train {key}": value for key, value in _part(entry, "train").items()}
    row |= {key.replace("val_", "val ", 1): value for key, value in _part(entry, "val").items()}
    row |= {"learning rate": entry.get("learning_rate"), "seconds": entry.get("seconds")}
    return row | {"new best": "yes" if entry.get("new_best") else ""}


def _evaluations(page: Page, folder: Path) -> None:
    """Add the figures of the evaluations below a run, with a way to their pages."""
    rows = []
    for path in sorted((folder / "evaluation").glob("*/test_metrics.yaml")):
        metrics = mapping_in(path)
        figures = _part(metrics, "pooled_metrics") or _part(metrics, "average_metrics")
        beside = path.with_name("report.html")
        target = beside.relative_to(folder).as_posix() if beside.exists() else ""
        row: dict[str, Any] = {"evaluation": Link(path.parent.name, target)}
        row |= {"images": metrics.get("num_test_images"), "epoch": metrics.get("epoch")}
        rows.append(row | dict(figures))
    if rows:
        page.section("Evaluations")
        page.table(rows)


def _settings(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the top-level settings that are plain values."""
    return [
        {"setting": key, "value": str(value)}
        for key, value in config.items()
        if isinstance(value, (bool, int, float, str)) and not str(value).startswith(("$", "@", "%"))
    ]


def _files(page: Page, folder: Path, config: Mapping[str, Any]) -> None:
    page.section("Files")
    checkpoints = sorted((folder / "checkpoints").glob("*.pt"))
    if checkpoints:
        rows = [
            {"checkpoint": path.relative_to(folder).as_posix(), "MB": path.stat().st_size / 1e6}
            for path in checkpoints
        ]
        page.table(rows)
    else:
        page.text("No checkpoint lies in this folder.")
    if config:
        with page.fold("Settings that are plain values"):
            page.table(_settings(config))
        page.details("config.yaml", read_text(folder / "config.yaml"))
    for name in ("environment.json", "run.log"):
        text = read_text(folder / name)
        if text:
            page.details(name, _shortened(text))


def _shortened(text: str) -> str:
    """Return a log's beginning and end."""
    lines = text.splitlines()
    half = _LOG_LINES // 2
    if len(lines) <= _LOG_LINES:
        return text
    left_out = f"... {len(lines) - _LOG_LINES} lines are left out ..."
    return "\n".join([*lines[:half], left_out, *lines[-half:]])


def _part(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = entry.get(key)
    return part if isinstance(part, Mapping) else {}
