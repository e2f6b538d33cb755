"""Cross-validation: a bundle's training on each fold, one after another, and what came of it.

Each fold is the very command `train BUNDLE --fold <k>` in a process of its own. So nothing is left
over from the fold before (memory of loaders and of the device, handlers, generators, a tuned
allocator), a crash or the system's killing for memory ends one fold and not the account of all, and
a fold can be repeated by itself. A signal to stop is passed on to the process that trains, which
saves its state; the same command then goes on where it stopped.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from pipeline.arguments import ERROR_FILE, setting_words
from pipeline.bundles import prepare_run, read_config
from pipeline.commands import Commands, exit_code_of_signal, signals_passed_on
from pipeline.data.atomic import write_yaml
from pipeline.data.manifests import load_manifest
from pipeline.data.strict_yaml import read_yaml
from pipeline.errors import ConfigurationError, InputError, Interrupted, Preempted
from pipeline.report.comparison import FOLDS_FILE, fold_figures
from pipeline.report.folds import fold_totals
from pipeline.training.run_lock import RunLock

__all__ = ["FoldsPlan", "Outcome", "cross_validate", "plan_folds"]

# What decides which cases are in which fold.
_IDENTITY = ("bundle", "manifest", "count", "fold_seed")
_STOPPED = frozenset({Preempted.exit_code, Interrupted.exit_code})
_FIGURES = ("metric", "best", "best_epoch", "epochs")

Say = Callable[[str], None]


@dataclass(frozen=True)
class FoldsPlan:
    """What is to be trained.

    Args:
        bundle: name or folder.
        overlays: merged after its training configuration.
        settings: overrides, without `fold` and `output_dir`.
        folder: where `fold_<k>` and `folds.yaml` go.
        manifest: whose folds they are.
        count: how many folds it has.
        fold_seed: that deals the folds; None: the manifest's own.
        restart: train folds anew that are done.
        fingerprint: of the configuration that every fold is trained with.
    """

    bundle: str
    overlays: tuple[str, ...]
    settings: Mapping[str, Any]
    folder: Path
    manifest: str
    count: int
    fold_seed: int | None
    restart: bool
    fingerprint: str

    def command(self, fold: int, *, debug: bool = False) -> list[str]:
        """Return the command that trains one fold."""
        words = ["train", self.bundle, *self.overlays, *setting_words(self.settings)]
        words += [f"--fold={fold}", *setting_words({"output_dir": self.fold_folder(fold)})]
        return [sys.executable, "-m", "pipeline", *words, *(["--debug"] if debug else [])]

    def fold_folder(self, fold: int) -> Path:
        """Return the output folder of a fold."""
        return self.folder / f"fold_{fold}"


@dataclass(frozen=True)
class Outcome:
    """How a cross-validation ended.

    Attributes:
        exit_code: 0 where every fold is done; 3 where one failed and the others were trained all
            the same; otherwise that of the fold that ended it.
        error: in one line what went wrong, empty where nothing did.
        path: the summary, `folds.yaml`.
        summary: its content.
    """

    exit_code: int
    error: str
    path: Path
    summary: dict[str, Any]


def plan_folds(
    bundle: str | PathLike[str],
    overlays: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> FoldsPlan:
    """Return what training every fold of a bundle means; nothing is written yet.

    Without an `output_dir` of its own the folds go below `runs/<bundle>/<name>`.

    Raises:
        ConfigurationError: an unknown bundle, overlay or id, or a manifest without folds.
    """
    given = {id: value for id, value in (overrides or {}).items() if id != "fold"}
    files, settings = prepare_run(bundle, "train", overlays, given)
    config = read_config(files)
    for id in ("fold", "manifest", "output_dir"):
        if id not in config:
            raise ConfigurationError(
                f"{files[0]}: has no id {id}, without which there are no folds"
            )
    merged = {**config, **settings}
    manifest = load_manifest(str(merged["manifest"]))
    if not manifest.folds:
        raise ConfigurationError(
            f"manifest {manifest.name} has no folds: give another --manifest, or one that "
            "`data freeze --folds 5` has written"
        )
    folder = str(merged["output_dir"])
    if folder.startswith("$"):  # the bundle's own expression, which every fold would follow
        folder = str(Path("runs", files[0].parents[1].name, str(merged.get("name", "default"))))
    kept = {id: value for id, value in given.items() if id != "output_dir"}
    trained_with = {**config, **{id: settings[id] for id in settings if id != "bundle_root"}}
    trained_with |= {"output_dir": None, "resume": None}
    text = json.dumps(sorted(trained_with.items()), default=str)
    return FoldsPlan(
        bundle=str(bundle),
        overlays=tuple(overlays),
        settings=kept,
        folder=Path(folder),
        manifest=manifest.name,
        count=int(manifest.folds["k"]),
        fold_seed=merged.get("fold_seed"),
        restart=merged.get("resume") is False,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
    )


def cross_validate(
    plan: FoldsPlan,
    *,
    continue_on_error: bool = False,
    debug: bool = False,
    say: Say = lambda text: None,
) -> Outcome:
    """Train the folds of a plan that are not done yet, and keep account in `folds.yaml`.

    A fold is done when its command ended well with this very configuration; with another one the
    command is given again, and the bundle's own `resume` decides what there is left to do.

    Args:
        plan: what `plan_folds` returned.
        continue_on_error: train the other folds when one fails. A signal always stops all.
        debug: let the folds show tracebacks.
        say: gets a line at the beginning and end of each fold.

    Raises:
        ConfigurationError: the folder holds the folds of another bundle, manifest or fold_seed, or
            another cross-validation is at work there.
    """
    path = plan.folder / FOLDS_FILE
    lock = RunLock(plan.folder)
    lock.acquire()
    try:
        summary = _begun(plan, path)
        _write(path, summary)
        with signals_passed_on() as commands:
            code = 0
            for entry in summary["runs"]:
                fold = f"fold {entry['fold']} of {plan.count}"
                if entry["status"] == "done":
                    say(f"{fold}: done before, {_result(entry)}")
                    continue
                if commands.received:
                    break
                say(f"{fold}: training in {plan.fold_folder(entry['fold'])}")
                code = _train_fold(plan, entry, commands, summary, debug=debug)
                say(f"{fold}: {entry['status']}, {entry['error'] or _result(entry)}")
                if code in _STOPPED or (code and not continue_on_error):
                    break
            if commands.received and code not in _STOPPED:
                code = exit_code_of_signal(commands.received[0])
    finally:
        lock.release()
    return Outcome(*_verdict(summary["runs"], code, continue_on_error), path, summary)


def _begun(plan: FoldsPlan, path: Path) -> dict[str, Any]:
    """Return the account as this call finds it: folds done with the same configuration stay so."""
    old: dict[str, Any] = _read(path)
    if old and not plan.restart:
        for key in _IDENTITY:
            before, now = old.get(key, "unknown"), _identity(plan)[key]
            if before != now:
                raise ConfigurationError(
                    f"{path}: its folds are of {key} {before!r} and would go on as folds of "
                    f"{now!r}: choose another output_dir, or set resume to false"
                )
    before = {entry["fold"]: entry for entry in old.get("runs", ())}
    same = old.get("fingerprint") == plan.fingerprint and not plan.restart
    runs = []
    for fold in range(plan.count):
        entry = before.get(fold, {})
        trained = (plan.fold_folder(fold) / "metrics_history.yaml").is_file()
        if same and trained and entry.get("status") == "done":
            runs.append(entry)
            continue
        fresh = {"fold": fold, "status": "waiting", "exit_code": None, "error": None}
        fresh |= dict.fromkeys(_FIGURES) | {"started": None, "ended": None, "seconds": 0.0}
        if not plan.restart:  # the time of a run that goes on is that of all its starts
            fresh |= {key: entry[key] for key in ("started", "seconds") if key in entry}
        runs.append(fresh)
    return {
        **_identity(plan),
        "overlays": list(plan.overlays),
        "settings": dict(plan.settings),
        "fingerprint": plan.fingerprint,
        "runs": runs,
    }


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = read_yaml(path)
    entries = content.get("runs") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and {"fold", "status", "seconds"} <= entry.keys()
        for entry in entries
    ):
        raise ConfigurationError(f"{path}: not a summary of folds; move it away, or restore it")
    return dict(content)


def _identity(plan: FoldsPlan) -> dict[str, Any]:
    name = Path(plan.bundle).name
    return dict(zip(_IDENTITY, (name, plan.manifest, plan.count, plan.fold_seed), strict=True))


def _train_fold(
    plan: FoldsPlan,
    entry: dict[str, Any],
    commands: Commands,
    summary: dict[str, Any],
    *,
    debug: bool,
) -> int:
    """Run one fold's command, keep account of it, and return its exit code."""
    path, folder = plan.folder / FOLDS_FILE, plan.fold_folder(entry["fold"])
    entry |= {"status": "running", "started": entry["started"] or _now()}
    _write(path, summary)
    code, error, spent_s = _run(plan.command(entry["fold"], debug=debug), commands)
    status = "done" if code == 0 else "stopped" if code in _STOPPED else "failed"
    entry |= {"status": status, "exit_code": code, "error": error or None, **fold_figures(folder)}
    entry |= {"ended": _now(), "seconds": round(entry["seconds"] + spent_s, 3)}
    _write(path, summary)
    return code


def _write(path: Path, summary: dict[str, Any]) -> None:
    """Bring the totals up to date and write the file."""
    summary["total"] = fold_totals(summary["runs"])
    write_yaml(path, summary)


def _verdict(
    runs: Sequence[Mapping[str, Any]], code: int, continue_on_error: bool
) -> tuple[int, str]:
    """Return exit code and error of a cross-validation whose last command ended with `code`."""
    if all(entry["status"] == "done" for entry in runs):
        return 0, ""
    again = "the same command goes on, without the folds that are done"
    if code in _STOPPED:
        return code, f"stopped before every fold was done; {again}"
    failed = [entry for entry in runs if entry["status"] == "failed"]
    first = f"fold {failed[0]['fold']}: {failed[0]['error']}"
    if continue_on_error:
        return InputError.exit_code, f"{len(failed)} of {len(runs)} folds failed, {first}; {again}"
    return code, f"{first}; {again}"


def _result(entry: Mapping[str, Any]) -> str:
    if entry["best"] is None:
        return f"{entry['epochs'] or 0} epochs"
    return f"{entry['metric']} {entry['best']:.4f} in epoch {entry['best_epoch']}"


def _run(command: list[str], commands: Commands) -> tuple[int, str, float]:
    """Run a fold's command; return its exit code, its line of error and the seconds it took."""
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        error_file = Path(folder) / "error"
        returned = commands.run(command, {**os.environ, ERROR_FILE: str(error_file)})
        error = error_file.read_text(encoding="utf-8").strip() if error_file.exists() else ""
    spent_s = time.monotonic() - begun_s
    if returned >= 0:
        unknown = f"ended with exit code {returned}" if returned else ""
        return returned, error or unknown, spent_s
    name = signal.Signals(-returned).name
    hint = ", often for want of memory" if name == "SIGKILL" else ""
    return exit_code_of_signal(-returned), f"killed by {name}{hint}", spent_s


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
