"""Inference over many files: past the bad ones, resumable, and accounted for.

A result counts as done where its sidecar says that it came from this input, this model and these
settings; a rerun computes only the others. One bad file never stops the rest: it is listed in
`failures.csv` and the run ends with exit code 3.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ignite.engine import Engine

from pipeline.data.atomic import check_writable, write_csv, write_json
from pipeline.data.checksums import file_sha256
from pipeline.data.writers import check_result_paths, result_path
from pipeline.errors import ConfigurationError, InputError, InputErrors, Problem, exit_code

__all__ = ["BatchRun"]

logger = logging.getLogger(__name__)

_SUMMARY = "summary.json"


class BatchRun:
    """The inputs of an inference run, which of them are still to do, and what became of each.

    Args:
        cases: one dictionary per input with at least `image` (path) and `name` (relative to the
            input folder, with `/`).
        output_dir: where results go; a result keeps its input's folders.
        check: called with a case; returns what is wrong with its file, an empty string if nothing.
        settings: plain data that determines the results: network, preprocessing, threshold, ...
        model_path: the checkpoint file, whose hash is part of a sidecar.
        bundle: the bundle's name, for the summary.
        overwrite: compute every result again.
        used: called when a result is written; plain data on what made it, for its sidecar, which
            may differ between machines without making the result another one.
        files: keys of a case under which paths of further files stand that determine its result,
            such as a mask; an absent or empty one is no file.

    Raises:
        ResourceError: `output_dir` cannot be written.
        ConfigurationError: results of two inputs would have one name.
    """

    def __init__(
        self,
        cases: Sequence[Mapping[str, Any]],
        output_dir: str,
        check: Callable[[Mapping[str, Any]], str],
        settings: Mapping[str, Any],
        model_path: str,
        bundle: str,
        overwrite: bool = False,
        files: Sequence[str] = (),
        used: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.output_dir = check_writable(Path(output_dir))
        self.files = tuple(files)
        self.bundle = bundle
        self.model_path = model_path
        self.settings = dict(settings)
        self._used = used
        self.started = datetime.datetime.now(datetime.UTC)
        self._clock_s = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.problems: list[Problem] = []
        self.skipped = 0
        self._origins: dict[str, dict[str, Any]] = {}
        self._model_sha256 = file_sha256(Path(model_path))
        self.inputs = len(cases)
        self._check_names([str(case["name"]) for case in cases])
        self.pending = [dict(case) for case in cases if self._is_pending(case, check, overwrite)]
        logger.info(
            "%d inputs: %d to do, %d done before, %d rejected",
            self.inputs, len(self.pending), self.skipped, len(self.problems),
        )  # fmt: skip

    def path(self, name: str, suffix: str) -> Path:
        """Return where a result of the input `name` goes: its folders and stem, and `suffix`."""
        return result_path(name, ".", self.output_dir, suffix)

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
        """
        row = {"image": name, **row}
        written = [path.relative_to(self.output_dir).as_posix() for path in results]
        sidecar = {**self._origins[name], "settings": self.settings, "used": self._used()}
        sidecar |= details
        sidecar |= {"results": written, "row": row}
        write_json(self.path(name, ".json"), sidecar)
        self.rows.append(row)

    def run(self, evaluator: Engine) -> None:
        """Compute what is pending and write the tables, also where it stops half-way."""
        for case in self.pending:  # an old sidecar must not vouch for a result half overwritten
            self.path(str(case["name"]), ".json").unlink(missing_ok=True)
        try:
            if self.pending:
                evaluator.run()
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
            raise InputErrors(self.problems, f"of {self.inputs} inputs rejected, the rest is done")

    def _is_pending(
        self, case: Mapping[str, Any], check: Callable[[Mapping[str, Any]], str], overwrite: bool
    ) -> bool:
        name = str(case["name"])
        try:
            origin = self._origin(case)
        except InputError as error:
            return self._reject(name, case, str(error))
        if not overwrite and (done := self._finished(name, origin)) is not None:
            self.skipped += 1
            self.rows.append({**done, "image": name})
            return False
        if wrong := check(case):
            return self._reject(name, case, wrong)
        self._origins[name] = origin
        return True

    def _reject(self, name: str, case: Mapping[str, Any], wrong: str) -> Literal[False]:
        logger.warning("rejected: %s", wrong)
        self.problems.append(Problem(name, "read", wrong.removeprefix(f"{case['image']}: ")))
        return False

    def _origin(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a case's result is made from."""
        beside = [key for key in self.files if case.get(key)]
        return {
            "input": str(case["image"]),
            "input_sha256": file_sha256(Path(case["image"])),
            "beside_sha256": {key: file_sha256(Path(case[key])) for key in beside},
            "model_sha256": self._model_sha256,
            "settings_sha256": _digest(self.settings),
            "lamina": _version(),
        }

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

    def _finished(self, name: str, origin: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the row of a finished result of the same origin, None where there is none."""
        sidecar = self.path(name, ".json")
        if not sidecar.is_file():
            return None
        try:
            found = json.loads(sidecar.read_text(encoding="utf-8"))
        except ValueError:
            return None
        if not isinstance(found, dict) or not isinstance(found.get("row"), dict):
            return None
        same = all(found.get(k) == v for k, v in origin.items() if k != "input")
        there = all((self.output_dir / str(name)).is_file() for name in found.get("results", ()))
        return dict(found["row"]) if same and there else None

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
            "checkpoint": self.model_path,
            "model_sha256": self._model_sha256,
            "settings": self.settings,
        }
        write_json(self.output_dir / _SUMMARY, summary)
        logger.info(
            "%d done, %d skipped, %d rejected in %.1f s", done, self.skipped, len(self.problems),
            summary["seconds"],
        )  # fmt: skip


def _version() -> str:
    try:
        return importlib.metadata.version("lamina")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _digest(settings: Mapping[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
