"""Whether a volume streamed by two workers is what one process gives, also where one is killed.

    python benchmarks/distributed_streaming.py [--runs 20] [--seed 0]

Each run streams a volume of its own (uint8 noise, random size, overlap, weights and type of result)
through two convolutions: in this process as one block, then by two dask workers in many, some of
them with the planes cut as well. In every second run a worker that is computing a block is killed
by SIGKILL, at a random moment; dask starts another one. Results are compared bit for bit, and the
folder is looked at for anything left over. Five runs share a cluster, with the workers that have
replaced killed ones.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.data.volumes import open_volume
from pipeline.inference.cluster import local_or_running, stream_on_cluster
from pipeline.inference.finishing import Finish
from pipeline.inference.sliding_window import SlidingWindow
from pipeline.inference.streaming import stream_volume

WORKERS = 2
RUNS_PER_CLUSTER = 5


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    generator = random.Random(options.seed)
    equal, killed = 0, 0
    print(f"{'run':<5}{'volume':<18}{'weights':<11}{'result':<10}{'blocks':>7}{'windows':>9}"
          f"{'in one':>8}{'one s':>8}{'two s':>8}  killed after    equal")  # fmt: skip
    for first in range(0, options.runs, RUNS_PER_CLUSTER):
        with local_or_running(None, WORKERS) as client:
            for run in range(first, min(first + RUNS_PER_CLUSTER, options.runs)):
                found = _run(client, run, run % 2 == 1, generator)
                equal += found[0]
                killed += found[1]
    print(f"{equal} of {options.runs} equal bit for bit, a worker killed in {killed}")
    sys.exit(equal != options.runs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 2, 3, padding=1))
    return layers.eval().requires_grad_(False)


def _run(client: Any, run: int, kill: bool, generator: random.Random) -> tuple[bool, bool]:
    """Compute a volume twice; return whether the results are equal, and whether a worker died."""
    shape = tuple(generator.randint(128, 200) for _ in range(3))
    weights: Any = generator.choice(["separable", "gaussian", "constant"])
    inferer = SlidingWindow((48, 48, 48), generator.choice([0.25, 0.5]), weights)
    blocks, tiles = generator.choice([4, 6, 8]), generator.choice([(1, 1), (2, 1)])
    chunks = (generator.choice([8, 12, 16]), 64, 64)
    finish = generator.choice([Finish(), Finish("softmax"), Finish("sigmoid", dtype="uint8")])
    settings: dict[str, Any] = {"inferer": inferer, "chunks": chunks, "finish": finish}
    with tempfile.TemporaryDirectory() as folder:
        source, one, two = (Path(folder) / name for name in ("v.npy", "one.zarr", "two.zarr"))
        np.save(source, np.random.default_rng(run).integers(0, 255, shape, dtype=np.uint8))
        alone = stream_volume(source, one, make_network(), **settings)
        rows = generator.randint(1, max(1, shape[0] // chunks[0] - blocks))
        killer = _Killer(client, two, rows if kill else None)
        both = stream_on_cluster(
            source,
            two,
            make_network,
            blocks=blocks,
            tiles=tiles,
            scheduler=client.scheduler.address,
            **settings,
        )
        when = killer.stop()
        equal = _equal(one, two) and len(list(Path(folder).iterdir())) == 3
    kind = finish.activation or "logits"
    print(f"{run:<5}{'x'.join(map(str, shape)):<18}{weights:<11}{kind:<10}{blocks:>7}"
          f"{both.plan.windows:>9}{alone.windows:>8}{alone.seconds:>8.1f}{both.seconds:>8.1f}  "
          f"{when or '-':<16}{'yes' if equal else 'NO'}", flush=True)  # fmt: skip
    return equal, when is not None


def _equal(one: Path, two: Path) -> bool:
    first, second = open_volume(one), open_volume(two)
    if first.header != second.header:
        return False
    return all(
        np.array_equal(first[z : z + 32], second[z : z + 32]) for z in range(0, first.shape[0], 32)
    )


class _Killer:
    """Kills a busy worker once so many rows of chunks are written; None: never."""

    def __init__(self, client: Any, target: Path, rows: int | None) -> None:
        self._client = client
        self._partial = target.with_name(f"{target.name}.partial")
        self._rows = rows
        self._stopped = threading.Event()
        self._when: str | None = None
        self._thread = threading.Thread(target=self._wait_and_kill)
        self._thread.start()

    def stop(self) -> str | None:
        """Return when a worker was killed, None where none was."""
        self._stopped.set()
        self._thread.join()
        return self._when

    def _wait_and_kill(self) -> None:
        while self._rows is not None and not self._stopped.is_set():
            written = len(list(self._partial.glob("*.zarr/0/c/0/*")))
            if written >= self._rows and self._kill():
                self._when = f"{written} rows"
                return
            time.sleep(0.01)

    def _kill(self) -> bool:
        busy = [address for address, tasks in self._client.processing().items() if tasks]
        processes = self._client.run(os.getpid, workers=busy[:1]) if busy else {}
        for process in processes.values():
            os.kill(process, signal.SIGKILL)
        return bool(processes)


if __name__ == "__main__":
    main()
