"""The page of a training run, made from the files that the run left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.report.figures import curves
from pipeline.report.page import Page
from pipeline.report.run_files import pictures, read_json, read_text, read_yaml

__all__ = ["training_report"]


def training_report(output_dir: Path | str) -> Path:
    """Write `report.html` into a training folder and return its path.

    Args:
        output_dir: holds `metrics_history.yaml`, and where present `config.yaml`,
            `environment.json`, `checkpoints/` and `pictures/`.

    Raises:
        InputError: there is no history to report.
    """
    folder = Path(output_dir)
    history: list[dict[str, Any]] = read_yaml(folder / "metrics_history.yaml") or []
    if not history:
        raise InputError(
            f"{folder}: no epoch in metrics_history.yaml: give the folder of a training run"
        )
    environment = read_json(folder / "environment.json") or {}
    best = next((entry for entry in reversed(history) if entry.get("new_best")), None)
    page = Page(f"Training: {folder.name}", str(environment.get("command", "")))
    page.facts(_facts(history, best, environment))
    page.section("Curves")
    page.figures(_charts(history, best))
    shown = pictures(folder)
    if shown:
        page.section("Validation pictures")
        page.pictures(shown)
    page.section("Epochs")
    rows = [_row(entry) for entry in history]
    last = ["learning rate", "seconds", "new best"]  # a row without validation has fewer keys
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in last]
    page.table(rows, [*columns, *last])
    _files(page, folder)
    config = read_text(folder / "config.yaml")
    if config:
        page.section("Settings")
        page.table(_settings(read_yaml(folder / "config.yaml")))
        page.details("config.yaml", config)
    if environment:
        page.details("environment.json", read_text(folder / "environment.json"))
    return page.write(folder / "report.html")


def _facts(
    history: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any] | None,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "epochs": history[-1]["epoch"],
        "minutes": sum(float(entry.get("seconds", 0)) for entry in history) / 60,
        "device": environment.get("device"),
        "started": environment.get("started"),
    }
    if best is not None:
        facts["best epoch"] = best["epoch"]
        facts |= {f"best {key}": value for key, value in (best.get("val") or {}).items()}
    return facts


def _charts(history: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None) -> list[str]:
    """Return one chart per metric, training and validation in the same one."""
    groups: dict[str, list[str]] = {}
    for entry in history:
        for split in ("train", "val"):
            for name in entry.get(split) or {}:
                keys = groups.setdefault(name.removeprefix("val_"), [])
                if f"{split}.{name}" not in keys:
                    keys.append(f"{split}.{name}")
    if any("learning_rate" in entry for entry in history):
        groups["learning rate"] = ["learning_rate"]
    mark = float(best["epoch"]) if best is not None else None
    return [curves(history, keys, title, mark) for title, keys in groups.items()]


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"epoch": entry["epoch"]}
    row |= {f"train {key}": value for key, value in (entry.get("train") or {}).items()}
    row |= {key.replace("_", " ", 1): value for key, value in (entry.get("val") or {}).items()}
    row |= {"learning rate": entry.get("learning_rate"), "seconds": entry.get("seconds")}
    return row | {"new best": "yes" if entry.get("new_best") else ""}


def _settings(config: Any) -> list[dict[str, Any]]:
    """Return the top-level settings that are plain values."""
    return [
        {"setting": key, "value": str(value)}
        for key, value in (config or {}).items()
        if isinstance(value, (bool, int, float, str)) and not str(value).startswith(("$", "@", "%"))
    ]


def _files(page: Page, folder: Path) -> None:
    checkpoints = sorted((folder / "checkpoints").glob("*.pt"))
    if checkpoints:
        page.section("Checkpoints")
        rows = [
            {"file": str(p.relative_to(folder)), "MB": p.stat().st_size / 1e6} for p in checkpoints
        ]
        page.table(rows)
