from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from pipeline.errors import InputError, Preempted
from pipeline.training.checkpoints import read_checkpoint, write_checkpoint
from pipeline.vesuvius import thresholds
from pipeline.vesuvius.evaluation import score_row
from pipeline.vesuvius.thresholds import settle_threshold
from pipeline.vesuvius.topology import postprocess

THRESHOLDS = (0.3, 0.5, 0.7)
REPAIR = {"recipe": "default", "min_component_size": 20}


class Scale(nn.Module):
    """Its logits are the image times its one weight."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, image: Tensor) -> Tensor:
        return image * self.weight


def sheet(seed: int, hole: bool = True) -> dict[str, Any]:
    """A flat sheet whose probability is 0.6 where it is weak and 0.4 on a lump upon it."""
    rng = np.random.default_rng(seed)
    label = np.zeros((32, 32, 32), np.uint8)
    label[:, 10:12, :] = 1
    probability = np.where(label == 1, 0.9, 0.05)
    if hole:
        probability[:, 10:12, 14:17] = 0.6
    probability[5:27, 12:22, 8 + rng.integers(8) : 20] = 0.4
    return {
        "image": torch.logit(torch.as_tensor(probability, dtype=torch.float32))[None],
        "label": torch.as_tensor(label)[None],
        "name": f"sheet_{seed}.tif",
    }


def saved(folder: Path, name: str = "best.pt", weight: float = 1.0) -> Path:
    content = {
        "epoch": 3,
        "model": Scale(weight).state_dict(),
        "metrics": {"val_surface": 0.5, "threshold": 0.9},
        "threshold": 0.9,
    }
    return write_checkpoint(folder / "checkpoints" / name, content)


def settle(folder: Path, volumes: list[dict[str, Any]], **settings: Any) -> None:
    settle_threshold(
        str(folder / "checkpoints"),
        Scale(),
        SimpleInferer(),
        volumes,
        settings.pop("thresholds", THRESHOLDS),
        REPAIR,
        **settings,
    )


def test_the_threshold_is_that_of_the_best_repaired_score(tmp_path: Path) -> None:
    path, volumes = saved(tmp_path), [sheet(0), sheet(1, hole=False)]
    settle(tmp_path, volumes)

    def score(item: dict[str, Any], threshold: float) -> float:
        probability = torch.sigmoid(item["image"])[0].numpy()
        mask = postprocess(probability, threshold=threshold, **REPAIR).mask
        return float(score_row(mask, item["label"][0].numpy())["score"])

    means = {t: np.mean([score(item, t) for item in volumes]) for t in THRESHOLDS}
    best = max(means, key=lambda t: means[t])
    assert best == 0.5  # 0.3 keeps the lump, 0.7 loses the weak part
    content = read_checkpoint(path)  # which verifies the new checksum
    assert content["threshold"] == content["metrics"]["threshold"] == best
    assert content["metrics"]["repaired_score"] == pytest.approx(means[best])
    told = yaml.safe_load((tmp_path / "threshold_scores.yaml").read_text())["best"]
    assert {float(t): row["score"] for t, row in told["scores"].items()} == pytest.approx(means)


def test_only_the_threshold_and_its_figures_change(tmp_path: Path) -> None:
    before = read_checkpoint(saved(tmp_path))
    saved(tmp_path, "last.pt")
    settle(tmp_path, [sheet(0)])
    after = read_checkpoint(tmp_path / "checkpoints/best.pt")
    assert after.keys() == before.keys()
    assert after["model"] == before["model"]
    assert after["metrics"]["val_surface"] == 0.5
    assert read_checkpoint(tmp_path / "checkpoints/last.pt")["threshold"] == 0.9


def test_each_checkpoint_gets_a_threshold_of_its_own(tmp_path: Path) -> None:
    paths = saved(tmp_path), saved(tmp_path, "swa.pt", weight=0.5)  # nearer to one half
    settle(tmp_path, [sheet(0)], thresholds=(0.43, 0.49))
    assert [read_checkpoint(path)["threshold"] for path in paths] == [0.43, 0.49]


def test_no_more_volumes_are_looked_at_than_asked_for(tmp_path: Path) -> None:
    saved(tmp_path)
    settle(tmp_path, [sheet(0), sheet(1), sheet(2)], most_volumes=2)
    assert yaml.safe_load((tmp_path / "threshold_scores.yaml").read_text())["best"]["volumes"] == 2


@pytest.mark.parametrize(("uncounted", "chosen"), [((0.5,), 0.3), (THRESHOLDS, 0.9)])
def test_a_threshold_of_unknown_score_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncounted: tuple[float, ...], chosen: float
) -> None:
    scores = {t: None if t in uncounted else 1 - t for t in THRESHOLDS}
    given = iter([*THRESHOLDS] * 2)  # of two volumes

    def row(*_: Any) -> dict[str, Any]:
        score = scores[next(given)]
        parts = {"topology": score, "surface_dice": 0.5, "voi_score": 0.5}
        return {"score": score, **parts}

    monkeypatch.setattr(thresholds, "score_row", row)
    path = saved(tmp_path)
    settle(tmp_path, [sheet(0), sheet(1)])
    assert read_checkpoint(path)["threshold"] == chosen
    told = yaml.safe_load((tmp_path / "threshold_scores.yaml").read_text())
    assert bool(told) == (chosen in THRESHOLDS)
    if told:
        assert told["best"]["scores"]["0.5"]["score"] is None


def test_a_second_time_changes_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path)
    settle(tmp_path, [sheet(0)])
    once = path.read_bytes()
    settle(tmp_path, [sheet(0)])
    assert path.read_bytes() == once


def test_a_signal_ends_it_and_the_checkpoint_stays_whole(tmp_path: Path) -> None:
    path = saved(tmp_path)

    class Signals(Scale):
        def forward(self, image: Tensor) -> Tensor:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(image)

    with pytest.raises(Preempted, match="not yet settled"):
        settle_threshold(
            str(path.parent), Signals(), SimpleInferer(), [sheet(0), sheet(1)], (0.5,), REPAIR
        )
    assert read_checkpoint(path)["threshold"] == 0.9


def test_a_prediction_that_is_not_finite_names_the_volume(tmp_path: Path) -> None:
    saved(tmp_path, weight=float("nan"))
    with pytest.raises(InputError, match=r"sheet_0\.tif"):
        settle(tmp_path, [sheet(0)])
