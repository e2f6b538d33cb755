"""Inference over many files: past the bad ones, resumable, and accounted for.

A result counts as done where its sidecar says that it came from this input, this model and these
settings; a rerun computes only the others. One bad file never stops the rest: it is listed in
`failures.csv` and the run ends with exit code 3.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ignite.engine import Engine

from pipeline.data.atomic import check_writable, remove_stale, write_csv, write_json
from pipeline.data.writers import check_result_paths, result_path
from pipeline.errors import (
    ConfigurationError,
    InputError,
    InputErrors,
    Problem,
    exit_code,
    lamina_cause,
)
from pipeline.inference.sidecars import Identity, Origins, read_sidecar

__all__ = ["BatchRun"]

logger = logging.getLogger(__name__)

_SUMMARY = "summary.json"


class _Runs(Protocol):
    def run(self) -> object: ...


class BatchRun:
    """The inputs of an inference run, which of them are still to do, and what became of each.

    An input is read when its turn comes, by an `AcceptedLoader` or within `attempt`. What it is
    made from is asked before only where a sidecar says that it may be done.

    Args:
        cases: one dictionary per input with at least `image` (path) and `name` (relative to the
            input folder, with `/`).
        output_dir: where results go; a result keeps its input's folders.
        settings: plain data that determines the results: network, preprocessing, threshold, and of
            an ensemble the sha256 of each member.
        model_path: the checkpoint file, whose hash is part of a sidecar; None where there is none.
        bundle: the bundle's name, for the summary.
        overwrite: compute every result again.
        files: keys of a case under which paths of further files stand that determine its result,
            such as a mask; an absent or empty one is no file.
        used: called when a result is written; plain data on what made it, for its sidecar, which
            may differ between machines without making the result another one.
        identity: by what an input is known again: `content`, or for stores too large to be read
            for this alone `listing`; see `path_sha256`.

    Raises:
        ResourceError: `output_dir` cannot be written.
        ConfigurationError: results of two inputs would have one name.
    """

    def __init__(
        self,
        cases: Sequence[Mapping[str, Any]],
        output_dir: str,
        settings: Mapping[str, Any],
        model_path: str | None,
        bundle: str,
        overwrite: bool = False,
        files: Sequence[str] = (),
        used: Callable[[], Mapping[str, Any]] = dict,
        identity: Identity = "content",
    ) -> None:
        self.output_dir = check_writable(Path(output_dir))
        remove_stale(self.output_dir)  # what a killed run left half-written
        self.bundle = bundle
        self.model_path = model_path
        self.settings = dict(settings)
        self.origins = Origins(self.settings, model_path, files, identity)
        self._used = used
        self.started = datetime.datetime.now(datetime.UTC)
        self._clock_s = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.problems: list[Problem] = []
        self.skipped = 0
        self.closing = ExitStack()  # what is to be closed at the end of the run
        self.picture_legend = ""  # what the colours of the pictures mean; a writer says so
        self._sources = {Path(str(case["image"])).resolve() for case in cases}
        self._owners: dict[Path, str] = {}  # whose results they are
        self._open: dict[str, Mapping[str, Any]] = {}  # begun, neither recorded nor rejected
        self.inputs = len(cases)
        self._check_names([str(case["name"]) for case in cases])
        self._images = {str(case["name"]): str(case["image"]) for case in cases}
        self.pending = [dict(case) for case in cases if overwrite or not self._is_done(case)]
        logger.info(
            "%d inputs: %d to do, %d done before", self.inputs, len(self.pending), self.skipped
        )

    def path(self, name: str, suffix: str) -> Path:
        """Return where a result of the input `name` goes: its folders and stem, and `suffix`.

        Raises:
            InputError: an input lies there, or a result of another input, as `a_sheets.tif` of
                `a.tif` would where there is an input `a_sheets.tif`.
        """
        path = result_path(name, ".", self.output_dir, suffix)
        if path.resolve() in self._sources:
            raise InputError(
                f"{name}: its result would overwrite the input {path}; choose another output_dir"
            )
        owner = self._owners.setdefault(path, name)
        if owner != name:
            raise InputError(
                f"{name}: its result would overwrite {path.name} of {owner}; rename the file"
            )
        return path

    def begin(self, origins: Mapping[str, Mapping[str, Any]]) -> None:
        """Note that results are about to be written; what was begun before is no longer.

        Args:
            origins: per name what the result is made from, as `self.origins(case)` returns it.
        """
        self._open = dict(origins)
        for name in origins:  # an old sidecar must not vouch for a result half overwritten
            self.path(name, ".json").unlink(missing_ok=True)

    def is_open(self, name: str) -> bool:
        """Return whether `name` was begun, and neither recorded nor rejected since."""
        return name in self._open

    @contextmanager
    def attempt(self, name: str, stage: str = "predict") -> Iterator[None]:
        """Reject the input `name` where the body raises an `InputError`, and go on.

        For work that is not an engine's: within it come `begin`, the writing, and `record`.

        Args:
            name: the input's name.
            stage: where the problem was noticed, for `failures.csv`.
        """
        try:
            yield
        except Exception as error:
            cause = lamina_cause(error)
            if not isinstance(cause, InputError):
                raise
            self.reject(name, stage, str(cause))

    def reject(self, name: str, stage: str, message: str) -> None:
        """List an input in `failures.csv`.

        Args:
            name: the input's name.
            stage: where the problem was noticed: `read`, `predict`, ...
            message: what was found, what was expected, what to do.
        """
        self._open.pop(name, None)
        problem = Problem(name, stage, message.removeprefix(f"{self._images[name]}: "))
        logger.warning("rejected: %s", problem)
        self.problems.append(problem)

    def record(
        self,
        name: str,
        results: Sequence[Path],
        row: Mapping[str, Any],
        details: Mapping[str, Any],
    ) -> None:
        """Note that the results of `name` are written: call it after the last of its files.

        Args:
            name: the input's name.
            results: the files written for it; a later run computes them again where one is gone.
            row: its line in `per_image.csv`.
            details: what else its sidecar should say, such as shape and threshold.

        Raises:
            ValueError: `name` was not begun.
        """
        if name not in self._open:
            raise ValueError(f"{name}: recorded but not begun; read it by an AcceptedLoader")
        row = {"image": name, **row}
        written = [path.relative_to(self.output_dir).as_posix() for path in results]
        sidecar = {**self._open[name], "settings": self.settings, "used": self._used()}
        sidecar |= details
        sidecar |= {"results": written, "row": row}
        write_json(self.path(name, ".json"), sidecar)
        self.rows.append(row)
        del self._open[name]

    def run(self, work: Callable[[], object] | _Runs) -> None:
        """Compute what is pending and write the tables, also where it stops half-way.

        Args:
            work: a function, or an object with `run`, such as MONAI's evaluator with an
                `AcceptedLoader`. Such an engine is run past inputs whose forward pass,
                post-processing or writing raises an `InputError`; they are rejected. Other work
                sees to that by `attempt`.
        """
        try:
            with self.closing:
                self._do(work)
        except BaseException as error:
            self._write_tables(exit_code(error))
            raise
        rejected = self.problems or not self.inputs
        self._write_tables(InputErrors.exit_code if rejected else 0)

    def finish(self) -> None:
        """Tell of rejected inputs: the last step of a run.

        Raises:
            InputErrors: inputs were rejected; everything else is done.
            InputError: there was no input at all.
        """
        if not self.inputs:
            raise InputError(
                "found no input, expected at least one; point dataset_dir at a file or a folder"
            )
        if self.problems:
            rest = "the rest is done" if len(self.problems) < self.inputs else "none is done"
            raise InputErrors(self.problems, f"of {self.inputs} inputs rejected, {rest}")

    def _do(self, work: Callable[[], object] | _Runs) -> None:
        if not self.pending:
            return
        if isinstance(work, Engine):
            self._run_engine(work)
        elif callable(work):
            work()
        else:
            work.run()

    def _run_engine(self, engine: Engine) -> None:
        """Run `engine` again, on the rest of its loader, after each input that failed."""
        engine.interrupt_resume_enabled = False  # else the run after an error does nothing
        engine.logger.addFilter(_is_told_here)
        try:
            while True:
                try:
                    engine.run()
                    return
                except Exception as error:
                    cause = lamina_cause(error)
                    if not isinstance(cause, InputError) or not self._open:
                        raise
                    for name in list(self._open):
                        self.reject(name, "predict", str(cause))
        finally:
            engine.logger.removeFilter(_is_told_here)

    def _is_done(self, case: Mapping[str, Any]) -> bool:
        """Return whether the result of `case` is there, and if so take its row over."""
        name = str(case["name"])
        sidecar = read_sidecar(self.path(name, ".json"))
        if sidecar is None:
            return False
        if not all((self.output_dir / str(result)).exists() for result in sidecar["results"]):
            return False
        try:
            if not self.origins.match(sidecar, case):
                return False
        except InputError:  # told when its turn comes
            return False
        self._owners |= {self.output_dir / str(result): name for result in sidecar["results"]}
        self.skipped += 1
        self.rows.append({**sidecar["row"], "image": name})
        return True

    def _check_names(self, names: Sequence[str]) -> None:
        """Refuse inputs whose results would overwrite each other or the summary."""
        check_result_paths(names, ".")
        counts = Counter(names)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ConfigurationError(f"inputs are listed twice: {', '.join(twice[:20])}")
        for name in names:
            if self.path(name, ".json") == self.output_dir / _SUMMARY:
                raise ConfigurationError(
                    f"{name}: its result would be named like {_SUMMARY} of the run; rename the file"
                )

    def _write_tables(self, code: int) -> None:
        ended = datetime.datetime.now(datetime.UTC)
        self.rows.sort(key=lambda row: str(row["image"]))
        columns = dict.fromkeys(["image", *(key for row in self.rows for key in row)])
        write_csv(self.output_dir / "per_image.csv", self.rows, columns=list(columns))
        write_csv(
            self.output_dir / "failures.csv",
            [vars(problem) for problem in self.problems],
            columns=["path", "stage", "code", "message"],
        )
        done = len(self.rows) - self.skipped
        summary = {
            "bundle": self.bundle,
            "started": self.started.isoformat(timespec="seconds"),
            "ended": ended.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock_s, 3),
            "inputs": self.inputs,
            "done": done,
            "skipped": self.skipped,
            "rejected": len(self.problems),
            "exit_code": code,
            "checkpoint": self.model_path or "",
            "model_sha256": self.origins.of_the_run["model_sha256"],
            "versions": self.origins.versions,
            "settings": self.settings,
            "picture_legend": self.picture_legend,
        }
        write_json(self.output_dir / _SUMMARY, summary)
        logger.info(
            "%d done, %d skipped, %d rejected in %.1f s", done, self.skipped, len(self.problems),
            summary["seconds"],
        )  # fmt: skip


def _is_told_here(record: logging.LogRecord) -> bool:
    """Drop ignite's two lines per error: it is raised, or told as a rejected input."""
    return "is terminating due to exception" not in record.getMessage()
