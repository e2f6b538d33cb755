from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ignite.engine import Engine, Events

from pipeline.training.history import History, read_history
from pipeline.training.monitor import Monitor
from pipeline.training.throughput import Throughput


class Loader:
    """Waits before each of its items."""

    def __init__(self, items: int, waits_s: float) -> None:
        self.items, self.waits_s = items, waits_s

    def __len__(self) -> int:
        return self.items

    def __iter__(self) -> Any:
        for item in range(self.items):
            time.sleep(self.waits_s)
            yield item


def epochs(
    items: int, waits_s: float, works_s: float, count: int = 1, after: Any = None
) -> list[dict[str, float]]:
    engine = Engine(lambda *_: time.sleep(works_s))
    Throughput("cpu").attach(engine)
    if after is not None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, after)
    found: list[dict[str, float]] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: found.append(dict(e.state.metrics)))
    engine.run(Loader(items, waits_s), max_epochs=count)
    return found


def test_the_share_of_the_loader_is_its_part_of_the_time() -> None:
    (figures,) = epochs(8, waits_s=0.03, works_s=0.01)
    assert 0.6 < figures["speed_loader_share"] < 0.9
    assert 10 < figures["speed_iterations_per_second"] < 25


def test_what_follows_an_epoch_is_not_counted() -> None:
    first, second = epochs(4, 0.005, 0.01, count=2, after=lambda _: time.sleep(0.5))
    assert first["speed_iterations_per_second"] > 20
    assert second["speed_iterations_per_second"] > 20


def test_peak_memory_grows_with_what_is_taken() -> None:
    (before,) = epochs(1, 0, 0)
    missing = before["speed_peak_memory_mb"] * 1e6 - psutil.Process().memory_info().rss
    block = bytearray(int(missing) + 150_000_000)
    block[::4096] = b"1" * len(block[::4096])  # memory is taken when it is written
    (after,) = epochs(1, 0, 0)
    assert after["speed_peak_memory_mb"] > before["speed_peak_memory_mb"] + 99


@pytest.mark.gpu
def test_peak_memory_on_a_gpu_is_that_of_the_epoch() -> None:
    sizes = iter([200_000_000, 10_000_000])
    engine = Engine(lambda *_: torch.empty(next(sizes), dtype=torch.uint8, device="cuda"))
    Throughput("cuda").attach(engine)
    found: list[float] = []
    engine.add_event_handler(
        Events.EPOCH_COMPLETED, lambda e: found.append(e.state.metrics["speed_peak_memory_mb"])
    )
    engine.run([0], max_epochs=2)
    assert found[0] - found[1] > 150


def test_history_and_log_have_the_speed_apart_from_the_metrics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    trainer = Engine(lambda *_: time.sleep(0.001))
    Throughput("cpu").attach(trainer)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: engine.state.metrics.update(train_loss=0.5)
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    monitor = Monitor(Engine(lambda *_: None), "val_dice")
    History(str(tmp_path / "h.yaml"), monitor, optimizer).attach(trainer)
    trainer.run([0, 1], max_epochs=1)
    (entry,) = read_history(tmp_path / "h.yaml")
    assert entry["train"] == {"loss": 0.5}
    assert set(entry["speed"]) == {"iterations_per_second", "loader_share", "peak_memory_mb"}
    assert "it/s loader" in caplog.text
