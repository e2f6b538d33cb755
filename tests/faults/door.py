"""A process that has everything imported and forks `python -m pipeline` for whoever asks.

Each command has a process, an exit code and a standard error of its own, as a person's has, without
the seconds that importing torch takes. Requests and answers are lines of JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

IMPORTED = (
    "matplotlib.pyplot", "monai.bundle", "monai.engines", "monai.transforms", "ignite.handlers",
    "nibabel", "skimage.data", "skimage.exposure", "skimage.morphology", "skimage.transform",
    "torch.utils.tensorboard", "pipeline.bundles", "pipeline.cli", "pipeline.fundus.cases",
    "pipeline.fundus.evaluation", "pipeline.fundus.networks", "pipeline.fundus.results",
    "pipeline.fundus.transforms", "pipeline.hardware.planning", "pipeline.inference.accepted",
    "pipeline.inference.backends", "pipeline.report.inference", "pipeline.report.training",
    "pipeline.running_config", "pipeline.training.saving", "pipeline.training.tensorboard",
    "pipeline.vesuvius.cases", "pipeline.vesuvius.evaluation", "pipeline.vesuvius.networks",
    "pipeline.vesuvius.results", "pipeline.vesuvius.transforms", "injected",
)  # fmt: skip


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            running.discard(request["wait"])
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            process = os.fork()
            if process == 0:
                answers.close()
                _become(request)
            running.add(process)
            answer = {"pid": process}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for process in running:  # whoever asked is gone
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _become(request: dict[str, Any]) -> None:
    """Run the command of `request` in this process, and end with its code."""
    import injected

    from pipeline.cli import main as run

    code = 1
    try:
        for path, descriptor in ((os.devnull, 0), (request["out"], 1), (request["err"], 2)):
            opened = os.open(path, os.O_RDWR | os.O_CREAT)
            os.dup2(opened, descriptor)
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        for name, arguments in request["inject"].items():
            getattr(injected, name)(*arguments)
        code = run(request["words"])
    except SystemExit as end:  # argparse
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
