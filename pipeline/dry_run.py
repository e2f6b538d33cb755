"""What a run would do, found out by building its configuration and running nothing.

Nothing is written under `output_dir`. Where training draws its phantom, it is drawn elsewhere and
thrown away, since the cases are found in it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.bundles import Workflow, open_config, prepare_run
from pipeline.data.atomic import to_plain
from pipeline.resolving import build, unwrapped

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

__all__ = ["dry_run", "dry_run_text"]

_NAMED = 5  # inputs told by name


def dry_run(
    bundle: str | PathLike[str],
    workflow: Workflow,
    overlays: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what `run_bundle` would do with the same arguments, as plain data.

    Returns:
        `workflow`, `files` (merged in this order), `overrides`, `output_dir`, `lines` for a
        person, and the figures behind them: of a training `cases`, `plan`, `done_epochs` and
        `seconds_per_epoch` (None where no epoch was timed), of an evaluation `cases`, `split` and
        `checkpoint`, of inference `inputs`, `pending` and `done_before`, names all of them.

    Raises:
        LaminaError: what would stop the run before its first step.
    """
    files, _ = prepare_run(bundle, workflow, overlays, overrides)
    parser, checkpoint = open_config(bundle, workflow, overlays, overrides)
    output_dir = _value(parser, "output_dir", ".")
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        elsewhere = str(Path(folder) / "run")
        if workflow == "train":
            found = _training(parser, Path(output_dir), elsewhere)
        elif workflow == "evaluate":
            found = _evaluation(parser, elsewhere, checkpoint)
        else:
            found = _inference(parser, Path(output_dir), elsewhere)
    found["lines"] = [str(line).replace(elsewhere, output_dir) for line in found["lines"]]
    about = {
        "workflow": workflow,
        "files": [str(path) for path in files],
        "overrides": dict(overrides or {}),
        "output_dir": output_dir,
    }
    plain: dict[str, Any] = to_plain({**about, **found})
    return plain


def dry_run_text(found: Mapping[str, Any]) -> str:
    """Return what `dry_run` found, in lines for a person."""
    merged = " + ".join(Path(path).name for path in found["files"])
    settings = " ".join(f"--{id} {value}" for id, value in found["overrides"].items())
    lines = [
        f"dry run: {found['workflow']}, nothing is written",
        f"configuration: {Path(found['files'][0]).parent}: {merged}",
        *([f"settings: {settings}"] if settings else []),
        f"output: {found['output_dir']}",
        *found["lines"],
    ]
    return "\n".join(lines)


def _training(parser: ConfigParser, output_dir: Path, elsewhere: str) -> dict[str, Any]:
    resume = _value(parser, "resume", False)
    parser["output_dir"] = elsewhere
    if "plan::output_dir" in parser:  # a run that goes on keeps the plan of its checkpoint
        parser["plan::output_dir"] = str(output_dir)
    parts = _parts(parser, "cases", "facts", "plan")
    epochs = _value(parser, "max_epochs", None)
    done, seconds = _earlier(output_dir) if resume else (0, None)
    plan = parts["plan"].as_dict() if "plan" in parts else None
    lines = [*_facts(parts), *parts.get("facts", ()), *_memory(plan)]
    if done:
        lines.append(f"goes on after epoch {done} of {epochs}")
    if seconds is not None and epochs is not None:
        left = max(int(epochs) - done, 0) * seconds / 60
        lines.append(f"time: {seconds:.1f} s per epoch so far, about {left:.1f} minutes left")
    elif epochs is not None:
        lines.append("time: not known before an epoch has run")
    return {
        "cases": _counts(parts),
        "plan": plan,
        "done_epochs": done,
        "seconds_per_epoch": seconds,
        "lines": lines,
    }


def _evaluation(
    parser: ConfigParser, elsewhere: str, checkpoint: Mapping[str, Any] | None
) -> dict[str, Any]:
    from pipeline.training.checkpoints import check_definition, load_weights

    source = _value(parser, "ckpt_path", "")
    results = _value(parser, "evaluation_dir", None)
    parser["output_dir"] = elsewhere
    if source:
        parser["ckpt_path"] = source  # it may lie below output_dir
    parts = _parts(parser, "cases", "network", "definition", "split")
    if checkpoint is not None and "definition" in parts:
        check_definition(checkpoint, source=source, settings=parts["definition"])
    if checkpoint is not None and "network" in parts:
        load_weights(parts["network"], checkpoint, source)
    lines = [*_facts(parts), *_network(parts.get("network")), *_checkpoint(source, checkpoint)]
    split, scored = parts.get("split"), 0
    if "cases" in parts and split is not None:
        scored = len(unwrapped(lambda: parts["cases"].split(split)))
        lines.append(f"to score: {scored} cases of split {split}, results in {results}")
    return {
        "cases": _counts(parts),
        "split": split,
        "scored": scored,
        "checkpoint": source,
        "lines": lines,
    }


def _inference(parser: ConfigParser, output_dir: Path, elsewhere: str) -> dict[str, Any]:
    if "batch::output_dir" in parser and not output_dir.is_dir():
        parser["batch::output_dir"] = elsewhere  # which makes its folder
    parts = _parts(parser, "cases", "members", "batch", "checkpoint")
    inputs = [str(case["name"]) for case in parts.get("cases", ())]
    pending = [str(case["name"]) for case in parts["batch"].pending] if "batch" in parts else inputs
    done = [name for name in inputs if name not in set(pending)]
    source = _value(parser, "ckpt_path", "")
    named = ", ".join(pending[:_NAMED]) + (", ..." if len(pending) > _NAMED else "")
    return {
        "inputs": inputs,
        "pending": pending,
        "done_before": done,
        "lines": [
            *_checkpoint(source, parts.get("checkpoint")),
            *_network(parts.get("members")),
            f"inputs: {len(inputs)} found, {len(pending)} to do, {len(done)} done before",
            *([f"to do: {named}"] if pending else []),
        ],
    }


def _parts(parser: ConfigParser, *ids: str) -> dict[str, Any]:
    """Build those of `ids` that the configuration has."""
    return build(parser, [id for id in ids if id in parser])


def _value(parser: ConfigParser, id: str, default: Any) -> Any:
    return build(parser, [id])[id] if id in parser else default


def _facts(parts: Mapping[str, Any]) -> Sequence[str]:
    return getattr(parts.get("cases"), "facts", ())


def _counts(parts: Mapping[str, Any]) -> dict[str, int]:
    cases = parts.get("cases")
    return {} if cases is None else {s: len(getattr(cases, s)) for s in ("train", "val", "test")}


def _memory(plan: Mapping[str, Any] | None) -> list[str]:
    if plan is None:
        return []
    needed, limit = plan.get("estimated_bytes"), plan.get("limit_bytes")
    if needed is None:
        return ["memory: not estimated, as the plan needs no estimate for a batch that is given"]
    within = "" if limit is None else f", of {limit / 1e9:.2f} GB that it may take"
    return [
        f"memory: about {needed / 1e9:.2f} GB of tensors at the peak of a step{within}; "
        "the libraries take their own"
    ]


def _network(network: Any) -> list[str]:
    if network is None:
        return []
    members = list(getattr(network, "networks", [network]))
    count = sum(p.numel() for p in members[0].parameters())
    several = f"{len(members)} networks, the first " if len(members) > 1 else ""
    return [f"network: {several}{type(members[0]).__name__}, {count:,} parameters"]


def _checkpoint(source: str, checkpoint: Mapping[str, Any] | None) -> list[str]:
    if checkpoint is None:
        return []
    said = [
        f"{key} {checkpoint[key]}"
        for key in ("architecture", "epoch", "threshold")
        if checkpoint.get(key) is not None
    ]
    return [f"checkpoint: {source} ({', '.join(said)})"]


def _earlier(output_dir: Path) -> tuple[int, float | None]:
    """Return how many epochs a run has behind it, and how long one of them took."""
    from pipeline.training.checkpoints import read_checkpoint

    last = output_dir / "checkpoints" / "last.pt"
    if not last.is_file():
        return 0, None
    return int(read_checkpoint(last)["epoch"]), _seconds(output_dir / "metrics_history.yaml")


def _seconds(history: Path) -> float | None:
    from pipeline.data.strict_yaml import read_yaml

    entries = read_yaml(history) if history.is_file() else None
    timed = [entry["seconds"] for entry in entries or [] if entry.get("seconds")]
    return float(sum(timed) / len(timed)) if timed else None
