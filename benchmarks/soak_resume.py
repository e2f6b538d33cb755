"""Kill a bundle's training at random moments and compare what it ends with, bit by bit.

    python benchmarks/soak_resume.py [--trials 20] [--ID VALUE ...]

Each trial trains fundus_vessels on the phantom with gradient accumulation, by turns with a moving
average of the weights and with stochastic weight averaging; half of the trials have no loader
workers and half have two. A trial is killed with SIGKILL, some while a checkpoint is being written
(its temporary file is left behind), started again, and compared with a run that nobody disturbed:
sha256 of all states in `last.pt`, `previous.pt`, `best.pt` and `swa.pt`, and of the history without
its times. Further settings are the bundle's, for every run.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUNDLE = "fundus_vessels"
SETTINGS = {
    "device": "cpu",
    "threads": "1",
    "max_epochs": "6",
    "val_interval": "2",
    "patches_per_image": "8",
    "patch_size": "[32,32]",
    "margin_size": "[48,48]",
    "fov_size_px": "128",
    "batch_size": "5",  # 48 patches: ten steps, the last of 3, in groups of 3, 3, 3 and 1
    "accumulation_steps": "3",
    "checkpoint_every": "3",
    "depths": "[4,8]",
    "tensorboard": "false",
}
COMPARED = ("last", "previous", "best", "swa")
TIMES = ("seconds", "speed")  # of an epoch in the history
AVERAGING: tuple[tuple[str, ...], ...] = ((), ("swa",))  # overlays: moving, stochastic
ATTEMPTS = 8  # to kill inside a write that takes a few milliseconds


@dataclass(frozen=True)
class Trial:
    """One run to kill.

    Args:
        number: names its folder.
        workers: of the loader.
        overlays: configurations merged into the bundle's.
        write: kill it inside this one of the writes that are seen; None kills it after `share`.
        share: of the undisturbed run's training time, in [0, 1).
    """

    number: int
    workers: int
    overlays: tuple[str, ...]
    write: int | None
    share: float


class Soak:
    """Trains, kills and compares below one folder."""

    def __init__(self, folder: Path, settings: dict[str, str], forked: bool) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.settings = settings
        self.forked = forked
        self.undisturbed: dict[tuple[str, ...], dict[str, str]] = {}
        self.training_s = 0.0

    def draw_phantom(self) -> None:
        from pipeline.fundus.phantom import write_phantom_dataset

        write_phantom_dataset(self.data, {"train": 6, "val": 2}, size_px=128)

    def train_undisturbed(self, overlays: tuple[str, ...]) -> None:
        """Train without a kill, and remember the result and how long it took."""
        run = self.folder / "_".join(("undisturbed", *overlays))
        process = self._start(run, 0, overlays)
        began = _wait_for(run / "run.log", process)
        _finish(process, run)
        seconds = (run / "checkpoints" / "swa.pt").stat().st_mtime - began
        self.training_s = max(seconds, self.training_s)
        self.undisturbed[overlays] = fingerprints(run)

    def differences(self, trial: Trial) -> list[str]:
        """Kill a run, let it go on, and return what it does not have as the undisturbed one."""
        run = self.folder / f"trial_{trial.number}"
        for _ in range(ATTEMPTS):
            process = self._start(run, trial.workers, trial.overlays)
            _wait_for(run / "run.log", process)
            if _kill(process, run, trial, self.training_s):
                break
            if process.poll() == 0:  # the blow came too late: from the start
                shutil.rmtree(run)
        else:
            return [f"not killed in {ATTEMPTS} attempts"]
        _finish(self._start(run, trial.workers, trial.overlays), run)
        found, wanted = fingerprints(run), self.undisturbed[trial.overlays]
        differing = [name for name in found | wanted if found.get(name) != wanted.get(name)]
        return differing + [path.name for path in unfinished(run / "checkpoints")]

    def _start(self, run: Path, workers: int, overlays: tuple[str, ...]) -> Any:
        words = ["train", BUNDLE, *overlays, "--output_dir", str(run)]
        settings = {**self.settings, "dataset_dir": str(self.data), "num_workers": str(workers)}
        words += [word for key, value in settings.items() for word in (f"--{key}", value)]
        log = run.with_suffix(".log")
        if self.forked:
            return Forked(words, log)
        with log.open("ab") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", "pipeline", *words],
                stdout=stream,
                stderr=subprocess.STDOUT,
            )


class Forked:
    """A run in a process forked from one that has everything imported; like a `Popen`."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, words: list[str], log: Path) -> None:
        self.process = self.context.Process(target=_train, args=(words, log))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return int(self.process.exitcode or 0)

    def kill(self) -> None:
        self.process.kill()


def _train(words: list[str], log: Path) -> None:
    from pipeline.cli import main

    # As in a process of its own. Loader workers from a fork server outlive a killed run.
    multiprocessing.set_start_method("fork", force=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.exit(main(words))


def _wait_for(path: Path, process: Any) -> float:
    """Return the time at which a starting run, or one that starts again, has begun its log."""
    before = path.stat().st_mtime if path.exists() else 0.0
    while process.poll() is None:
        if path.exists() and path.stat().st_mtime > before:
            return path.stat().st_mtime
        time.sleep(0.002)
    raise SystemExit(_ended(path.parent, process.poll()))


def _kill(process: Any, run: Path, trial: Trial, training_s: float) -> bool:
    """Send SIGKILL when the trial says; return whether it hit, inside a write where one is due."""
    if trial.write is None:
        time.sleep(trial.share * training_s)
        process.kill()
        return process.wait() == -signal.SIGKILL
    checkpoints = run / "checkpoints"
    seen, writing = 0, False
    while process.poll() is None:
        now = bool(unfinished(checkpoints))
        seen += now and not writing
        writing = now
        if writing and seen >= trial.write:
            process.kill()
    return process.wait() == -signal.SIGKILL and bool(unfinished(checkpoints))


def unfinished(checkpoints: Path) -> list[Path]:
    """Return the temporary files of checkpoints that are being, or were not, written whole."""
    return list(checkpoints.glob(".*.tmp.pt"))


def _finish(process: Any, run: Path) -> None:
    code = process.wait()
    if code != 0:
        raise SystemExit(_ended(run, code))


def _ended(run: Path, code: int) -> str:
    log = run.with_suffix(".log").read_text(encoding="utf-8").splitlines()
    return f"{run.name}: ended with {code}: {log[-1] if log else 'nothing said'}"


def fingerprints(run: Path) -> dict[str, str]:
    """Return the sha256 of what a finished run leaves, by name."""
    import yaml

    from pipeline.training.checkpoints import read_checkpoint

    found = {}
    for name in COMPARED:
        content = read_checkpoint(run / "checkpoints" / f"{name}.pt")
        found |= {f"{name}.pt {key}": _sha256(value) for key, value in content.items()}
    history = yaml.safe_load((run / "metrics_history.yaml").read_text(encoding="utf-8"))
    epochs = [{k: v for k, v in epoch.items() if k not in TIMES} for epoch in history]
    return {**found, "history": _sha256(epochs)}


def _sha256(content: Any) -> str:
    digest = hashlib.sha256()
    _add(digest, content)
    return digest.hexdigest()


def _add(digest: Any, content: Any) -> None:
    """Feed nested plain data and tensors to a digest, each with its type and size."""
    import torch

    if isinstance(content, torch.Tensor):
        digest.update(f"{content.dtype} {list(content.shape)}".encode())
        digest.update(content.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(content, dict):
        digest.update(f"dict {len(content)}".encode())
        for key in sorted(content, key=str):
            digest.update(repr(key).encode())
            _add(digest, content[key])
    elif isinstance(content, list | tuple):
        digest.update(f"list {len(content)}".encode())
        for item in content:
            _add(digest, item)
    else:
        digest.update(repr(content).encode())


def main() -> int:
    options, settings = _options()
    if options.forked:
        Forked.context.set_forkserver_preload(
            ["monai.bundle", "monai.engines", "monai.transforms", "ignite.handlers",
             "pipeline.cli", "pipeline.bundles", "pipeline.training.saving", "skimage.morphology"]
        )  # fmt: skip
    draw = random.Random(options.seed)
    trials = [
        Trial(
            number,
            workers=0 if number < (options.trials + 1) // 2 else 2,
            overlays=AVERAGING[number % len(AVERAGING)],
            write=draw.randint(1, 2 * int(settings["max_epochs"]))
            if number % options.trials_per_write == 0
            else None,
            share=draw.random(),
        )
        for number in range(options.trials)
    ]
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="soak_") as folder:
        soak = Soak(Path(folder), settings, options.forked)
        soak.draw_phantom()
        with ThreadPoolExecutor(options.parallel) as pool:
            list(pool.map(soak.train_undisturbed, {trial.overlays for trial in trials}))
            results = list(pool.map(soak.differences, trials))
    for trial, differences in zip(trials, results, strict=True):
        moment = f"after {trial.share * soak.training_s:.2f} s of {soak.training_s:.2f} s"
        if trial.write is not None:
            moment = f"inside write {trial.write}"
        verdict = f"DIFFERS in {', '.join(differences)}" if differences else "equal"
        kind = "stochastic" if trial.overlays else "moving"
        print(f"{trial.number}: {trial.workers} workers, {kind} average, {moment}: {verdict}")
    inside = sum(trial.write is not None for trial in trials)
    equal = sum(not differences for differences in results)
    print(f"{inside} of {len(trials)} killed inside a checkpoint write")
    print(f"{equal} of {len(trials)} equal")
    return 0 if equal == len(trials) else 1


def _options() -> tuple[argparse.Namespace, dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--trials_per_write", type=int, default=5, help="every so many, one inside")
    parser.add_argument("--parallel", type=int, default=2, help="trials side by side")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where the runs go; removed at the end")
    parser.add_argument("--forked", action="store_true", help="import once: faster, less strict")
    options, further = parser.parse_known_args()
    names = [word.removeprefix("--") for word in further[::2]]
    return options, {**SETTINGS, **dict(zip(names, further[1::2], strict=True))}


if __name__ == "__main__":
    sys.exit(main())
