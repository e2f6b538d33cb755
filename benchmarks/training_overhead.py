"""What the default handlers cost per training step, and what the tuned allocator saves.

    python benchmarks/training_overhead.py [--repeats 5] [--steps 60]

A plain loop (forward, loss, backward, optimizer step) and the bundle's own trainer with every
handler of `train.yaml` on compute the same steps of the same small network on the same batches,
which are in memory, in turn, in one process. Steps are timed from batch to batch, so that neither
validation nor the end of an epoch is in them, and each repeat's figure is the median of its steps.
CPU time stands beside wall time: it counts the threads of the handlers, and other work on the
machine does not spoil it. Then the plain loop of the default recipe runs in a process per allocator
setting, in turn too. Times depend on the machine; the ratios are the claim.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow

from pipeline.bundles import prepare_run
from pipeline.fundus.phantom import write_phantom_dataset
from pipeline.hardware.allocator import tune_allocator

BUNDLE = "fundus_vessels"
WARM_UP = 10
CLOCKS = ("wall", "CPU")
TARGET = 0.25  # beside a step of 10 ms or more
Times = tuple[float, float]


def main() -> None:
    options = _options()
    if options.allocator is not None:
        print(_allocator_ms(options.allocator == "tuned", options))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = write_phantom_dataset(Path(folder) / "data", {"train": 4, "val": 1, "test": 1}, 128)
        plain: list[Times] = []
        trained: list[Times] = []
        for repeat in range(options.repeats):
            run = _workflow(data, Path(folder) / f"run_{repeat}", options)
            batches = _batches(run, options.steps)
            plain.append(_plain_loop(run, batches))
            trained.append(_trainer_step(run, batches))
    print(
        f"step of {options.batch_size} patches of {options.patch_px}^2, {options.repeats} repeats"
    )
    for place, clock in enumerate(CLOCKS):
        pairs = [(p[place], t[place]) for p, t in zip(plain, trained, strict=True)]
        base, full = (statistics.median(side) for side in zip(*pairs, strict=True))
        over = statistics.median(t / p for p, t in pairs) - 1
        print(f"{clock} time: plain loop {base:.2f} ms, trainer with all handlers {full:.2f} ms, "
              f"overhead {over:.1%} (of {', '.join(f'{t / p - 1:.0%}' for p, t in pairs)}), "
              f"{'within' if over <= TARGET else 'ABOVE'} the target of {TARGET:.0%}")  # fmt: skip
    found: dict[str, list[float]] = {"default": [], "tuned": []}
    for _ in range(options.repeats):
        for name, times in found.items():
            times.append(_in_own_process(name, options))
    default, tuned = (statistics.median(times) for times in found.values())
    print(f"plain loop of the default recipe, CPU time: allocator as it is {default:.1f} ms, "
          f"tuned {tuned:.1f} ms: {default / tuned:.2f} times as fast")  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of each repeat")
    parser.add_argument("--batch_size", type=int, default=3)
    parser.add_argument("--patch_px", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--allocator", choices=["default", "tuned"], help=argparse.SUPPRESS)
    return parser.parse_args()


def _workflow(data: Path, folder: Path, options: argparse.Namespace) -> Any:
    """Return the bundle's training, one epoch long, ready to run."""
    files, settings = prepare_run(
        BUNDLE,
        "train",
        overrides={
            "dataset_dir": str(data),
            "output_dir": str(folder),
            "device": options.device,
            "threads": options.threads,
            "max_epochs": 1,
            "val_interval": 2,
            "batch_size": options.batch_size,
            "effective_batch_size": options.batch_size,
            "patch_size": [options.patch_px, options.patch_px],
            "patches_per_image": -(-(options.steps + WARM_UP + 1) * options.batch_size // 4),
            "depths": options.depths,
            "fov_size_px": 128,
            "tune_allocator": False,
        },
    )
    run = ConfigWorkflow(
        config_file=[str(path) for path in files],
        workflow_type="train",
        logging_file=False,
        **settings,
    )
    run.initialize()
    return run


def _batches(run: Any, steps: int) -> list[Any]:
    """Return an epoch of the loader's batches, the first ones over and over."""
    run.parser.get_parsed_content("train::batches").begin(1)
    loader = run.parser.get_parsed_content("train::dataloader")
    first = list(islice(loader, 8))
    return [first[i % len(first)] for i in range(len(loader))][: steps + WARM_UP + 1]


def _plain_loop(run: Any, batches: list[Any]) -> Times:
    """Return the median milliseconds of a step, and leave network and optimizer as they were."""
    network, loss, optimizer, device = (
        run.parser.get_parsed_content(id)
        for id in ("network", "loss", "optimizer", "compute_device")
    )
    state = {key: value.clone() for key, value in network.state_dict().items()}
    network.train()
    times = [_now()]
    for batch in batches:
        image, label = batch["image"].to(device), batch["label"].to(device)
        optimizer.zero_grad(set_to_none=True)
        value = loss(network(image), label)
        value.backward()
        optimizer.step()
        float(value)  # a loop that does not look at its loss is nobody's loop
        times.append(_now())
    network.load_state_dict(state)
    optimizer.state.clear()
    return _median_step(times)


def _trainer_step(run: Any, batches: list[Any]) -> Times:
    trainer: Any = run.parser.get_parsed_content("train::trainer")
    trainer.data_loader = batches
    times: list[Times] = []

    def note(engine: Engine) -> None:
        times.append(_now())
        if len(times) == len(batches):
            engine.terminate(skip_completed=True)

    # Before a batch is fetched: all that a step does lies between two of these.
    trainer.add_event_handler(Events.GET_BATCH_STARTED, note)
    trainer.run()
    return _median_step(times)


def _now() -> Times:
    return 1e3 * time.perf_counter(), 1e3 * time.process_time()


def _median_step(times: list[Times]) -> Times:
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(times[WARM_UP:])]
    wall, cpu = (statistics.median(column) for column in zip(*steps, strict=True))
    return wall, cpu


def _allocator_ms(tuned: bool, options: argparse.Namespace) -> float:
    tune_allocator(tuned)
    with tempfile.TemporaryDirectory() as folder:
        data = write_phantom_dataset(Path(folder) / "data", {"train": 4, "val": 1, "test": 1}, 128)
        # the bundle's own
        options.patch_px, options.batch_size, options.depths = 96, 8, [8, 16, 32, 64, 128]
        run = _workflow(data, Path(folder) / "run", options)
        return _plain_loop(run, _batches(run, options.steps))[1]


def _in_own_process(allocator: str, options: argparse.Namespace) -> float:
    command = [sys.executable, "-W", "ignore", __file__, "--allocator", allocator]
    command += ["--steps", str(min(options.steps, 30)), "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    torch.multiprocessing.set_sharing_strategy("file_system")
    main()
