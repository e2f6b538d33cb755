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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine

from pipeline.data.atomic import check_writable, write_csv, write_json
from pipeline.data.checksums import file_sha256
from pipeline.errors import InputErrors, Problem

__all__ = ["BatchRun"]

logger = logging.getLogger(__name__)


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
    ) -> None:
        self.output_dir = check_writable(Path(output_dir))
        self.bundle = bundle
        self.model_path = model_path
        self.settings = dict(settings)
        self.started = datetime.datetime.now(datetime.UTC)
        self._clock_s = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.problems: list[Problem] = []
        self.skipped = 0
        self._origins: dict[str, dict[str, str]] = {}
        self._model_sha256 = file_sha256(Path(model_path))
        self.inputs = len(cases)
        self.pending = [dict(case) for case in cases if self._is_pending(case, check, overwrite)]
        logger.info(
            "%d inputs: %d to do, %d done before, %d rejected",
            self.inputs, len(self.pending), self.skipped, len(self.problems),
        )  # fmt: skip

    def path(self, name: str, suffix: str) -> Path:
        """Return where a result of the input `name` goes: its folders and stem, and `suffix`."""
        relative = Path(name)
        return self.output_dir / relative.parent / f"{relative.stem}{suffix}"

    def record(self, name: str, row: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Note that the results of `name` are written: call it after the last of its files.

        Args:
            name: the input's name.
            row: its line in `per_image.csv`.
            details: what else its sidecar should say, such as shape and threshold.
        """
        row = {"image": name, **row}
        sidecar = {**self._origins[name], "settings": self.settings, **details, "row": row}
        write_json(self.path(name, ".json"), sidecar)
        self.rows.append(row)

    def run(self, evaluator: Engine) -> None:
        """Compute what is pending and write the tables, also where it stops half-way."""
        try:
            if self.pending:
                evaluator.run()
        finally:
            self._write_tables()

    def finish(self) -> None:
        """Tell of rejected inputs: the last step of a run.

        Raises:
            InputErrors: inputs were rejected; everything else is done.
        """
        if self.problems:
            raise InputErrors(self.problems, f"of {self.inputs} inputs rejected, the rest is done")

    def _is_pending(
        self, case: Mapping[str, Any], check: Callable[[Mapping[str, Any]], str], overwrite: bool
    ) -> bool:
        name = str(case["name"])
        wrong = check(case)
        if wrong:
            self.problems.append(Problem(name, "read", wrong))
            logger.warning("rejected: %s", wrong)
            return False
        origin = {
            "input": str(case["image"]),
            "input_sha256": file_sha256(Path(case["image"])),
            "model_sha256": self._model_sha256,
            "settings_sha256": _digest(self.settings),
            "lamina": importlib.metadata.version("lamina"),
        }
        self._origins[name] = origin
        if overwrite or (done := self._finished(name, origin)) is None:
            return True
        self.skipped += 1
        self.rows.append(done)
        return False

    def _finished(self, name: str, origin: Mapping[str, str]) -> dict[str, Any] | None:
        """Return the row of a finished result of the same origin, None where there is none."""
        sidecar = self.path(name, ".json")
        if not sidecar.is_file():
            return None
        try:
            found = json.loads(sidecar.read_text(encoding="utf-8"))
        except ValueError:
            return None
        same = all(found.get(k) == v for k, v in origin.items() if k != "input")
        return found.get("row") if same else None

    def _write_tables(self) -> None:
        ended = datetime.datetime.now(datetime.UTC)
        self.rows.sort(key=lambda row: str(row["image"]))
        write_csv(self.output_dir / "per_image.csv", self.rows)
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
            "exit_code": InputErrors.exit_code if self.problems else 0,
            "checkpoint": self.model_path,
            "model_sha256": self._model_sha256,
            "settings": self.settings,
        }
        write_json(self.output_dir / "summary.json", summary)
        logger.info(
            "%d done, %d skipped, %d rejected in %.1f s", done, self.skipped, len(self.problems),
            summary["seconds"],
        )  # fmt: skip


def _digest(settings: Mapping[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
