"""The commands: `python -m pipeline VERB`, thin doors to the rooms.

Only what a verb needs is imported, when it runs: help and a misspelt setting answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from pipeline import bundle_verbs, data_verbs
from pipeline.arguments import parser, split_overrides
from pipeline.errors import LaminaError, exit_code, lamina_cause
from pipeline.terminal import complain, say, say_json

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; 2 also where argparse itself refuses.

    Args:
        argv: the arguments; those of the process if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("LAMINA_DEBUG", "") not in {"", "0"}
    try:
        arguments, overrides = split_overrides(arguments)
        options = parser().parse_args(arguments)
        return _ACTIONS[options.verb](options, overrides)
    except KeyboardInterrupt as error:
        complain("interrupted")
        return exit_code(error)
    except BrokenPipeError:  # `... | head` closed the pipe: nobody is left to tell
        sys.stderr.close()
        return 0
    except Exception as error:  # the last door: whatever happens becomes one line and a code
        if debug:
            traceback.print_exc()
        complain(_one_line(error))
        return exit_code(error)


def _one_line(error: BaseException) -> str:
    known = lamina_cause(error)
    code = exit_code(error)
    if (
        known is None
        and str(error).startswith("Failed to instantiate component")
        and error.__cause__
    ):
        error = error.__cause__  # of MONAI, which tells of every argument and not of the reason
    if known is not None:
        text = str(known) or type(known).__name__
    elif code != LaminaError.exit_code:
        text = str(error) or type(error).__name__
    else:
        text = f"{type(error).__name__}: {error} (unexpected: add --debug to see where)"
    return " ".join(text.split())


def _doctor(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.bundles import bundle_status
    from pipeline.hardware.environment import environment_report, environment_text

    report = environment_report()
    report["bundles"] = bundle_status()
    report["missing"] += [
        f"{bundle['name']} has no weights (models/model.pt): train it, or give --ckpt_path"
        for bundle in report["bundles"]
        if bundle["weights"] is None
    ]
    if options.json:
        say_json(report)
    else:
        say(environment_text(report))
    return 0


def _report(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.reports import write_report

    say(f"report: {write_report(options.folder)}")
    return 0


def _compare(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from pipeline.report.comparison import compare_runs, comparison_text

    found = compare_runs(options.runs, options.metric or (), seed=options.seed)
    if options.html:
        from pipeline.report.comparison_page import comparison_report

        comparison_report(found, options.html)
    if options.json:
        say_json(found)
    else:
        say(comparison_text(found))
    return 0


_ACTIONS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], int]] = {
    "doctor": _doctor,
    "report": _report,
    "compare": _compare,
    **bundle_verbs.ACTIONS,
    **data_verbs.ACTIONS,
}
