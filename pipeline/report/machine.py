"""What a run was planned to use and what it ran on, from its `environment.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.report.page import Page
from pipeline.report.values import finite, format_time, format_value

__all__ = ["add_environment", "add_plan", "plan_rows"]

_TOLD_IN_TITLE = frozenset({"command", "plan", "versions"})
_GB = 1e9


def add_plan(page: Page, environment: Mapping[str, Any]) -> None:
    """Add what was planned for the machine and why; an old run has no plan."""
    plan = environment.get("plan")
    if isinstance(plan, Mapping) and plan:
        page.section("Plan")
        page.table(plan_rows(plan))


def plan_rows(plan: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return `item`, `planned` and `reason` per decision, whatever the plan holds of them."""
    reasons = plan.get("reasons")
    known = dict(reasons) if isinstance(reasons, Mapping) else {}
    decisions = {
        "device": _joined(plan.get("device"), _labelled("tier", plan.get("tier"))),
        "batch": _batch(plan),
        "memory": _memory(plan),
        "learning rate": _shown(plan.get("learning_rate")),
        "precision": _shown(plan.get("precision")),
        "blocks": _switches(plan, {"memory_efficient": "computed again", "compile": "compiled"}),
        "loader": _joined(
            _labelled("worker processes", plan.get("num_workers")),
            _switches(plan, {"pin_memory": "pinned memory"}, off=False),
            _labelled("prefetch", plan.get("prefetch_factor")),
        ),
        "threads": "torch's choice" if "threads" in plan and plan["threads"] is None
        else _shown(plan.get("threads")),
        "kernels": _switches(plan, {"tf32": "TF32", "cudnn_benchmark": "cuDNN benchmark"}),
    }  # fmt: skip
    return [
        {"item": item, "planned": planned, "reason": str(known.get(item, ""))}
        for item, planned in decisions.items()
        if planned
    ]


def add_environment(page: Page, environment: Mapping[str, Any]) -> None:
    """Add machine, versions and time."""
    if not environment:
        return
    page.section("Environment")
    facts: dict[str, Any] = {
        key.replace("_", " "): value
        for key, value in environment.items()
        if key not in _TOLD_IN_TITLE and isinstance(value, (bool, int, float, str))
    }
    if "started" in facts:
        facts["started"] = format_time(facts["started"])
    versions = environment.get("versions")
    page.facts(facts | (dict(versions) if isinstance(versions, Mapping) else {}))


def _batch(plan: Mapping[str, Any]) -> str:
    parts = {"images": "batch_size", "steps": "accumulation_steps", "processes": "processes"}
    known = {word: plan[key] for word, key in parts.items() if plan.get(key) is not None}
    factors = [f"{n} {word}" for word, n in known.items() if n != 1 or word == "images"]
    effective = _shown(plan.get("effective_batch_size"))
    if len(factors) < 2:
        return effective and f"{effective}, in one step"
    return f"{effective} = {' x '.join(factors)}"


def _memory(plan: Mapping[str, Any]) -> str:
    estimated, limit = finite(plan.get("estimated_bytes")), finite(plan.get("limit_bytes"))
    if estimated is None or limit is None:
        return ""
    return f"{estimated / _GB:.2f} GB estimated, {limit / _GB:.2f} GB allowed"


def _switches(plan: Mapping[str, Any], names: Mapping[str, str], *, off: bool = True) -> str:
    states = {word: plan[key] for key, word in names.items() if isinstance(plan.get(key), bool)}
    told = [f"{word} {'on' if on else 'off'}" for word, on in states.items() if on or off]
    return ", ".join(told)


def _labelled(label: str, value: Any) -> str:
    return "" if value is None else f"{label} {format_value(value)}"


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _shown(value: Any) -> str:
    return "" if value is None else format_value(value)
