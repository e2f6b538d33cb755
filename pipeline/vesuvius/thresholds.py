"""The threshold of a trained network: the one whose repaired surfaces score best.

While training, validation compares thresholds by the cheap parts of the score and without repair.
That is good enough to tell epochs apart and wrong for the threshold itself: repair closes holes and
drops specks, so that a lower threshold, which leaves sheets whole, wins once it has run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from torch import nn

from pipeline.data.atomic import write_yaml
from pipeline.errors import InputError
from pipeline.inference.evaluation_tables import column_means
from pipeline.training.checkpoints import load_weights, read_checkpoint, write_checkpoint
from pipeline.training.interruption import Interruption
from pipeline.training.processes import is_writer
from pipeline.vesuvius.evaluation import score_row
from pipeline.vesuvius.topology import PostProcess

__all__ = ["settle_threshold"]

logger = logging.getLogger(__name__)

_PARTS = ("score", "topology", "surface_dice", "voi_score")


def settle_threshold(
    folder: str,
    network: nn.Module,
    inferer: Inferer,
    volumes: Sequence[Mapping[str, Any]],
    thresholds: Sequence[float],
    repair: Mapping[str, Any],
    most_volumes: int = 16,
) -> None:
    """Choose the threshold of `best.pt` and `swa.pt` by the whole score of repaired surfaces.

    The last step of a training run. Writes the threshold and its `metrics` into the checkpoints,
    and the scores of all thresholds to `threshold_scores.yaml` beside the folder. A threshold with
    which the topology of a volume is not counted exactly, which takes very many tunnels, is not
    chosen. Of several processes the first works; a signal ends it between two volumes.

    Args:
        folder: holds the checkpoints.
        network: what the checkpoints are of; it is left with the weights of the last one.
        inferer: whole volumes by windows.
        volumes: the validation set, items with `image` `(1, D, H, W)` and `label`.
        thresholds: to choose from.
        repair: settings of `PostProcess` beside the threshold.
        most_volumes: how many volumes are looked at; whole scores of large ones take long.

    Raises:
        InputError: a checkpoint's network gives values that are not finite.
        Preempted, Interrupted: a signal came; nothing is lost, the run can be started again.
    """
    if not is_writer():
        return
    repairs = {t: PostProcess(**repair, threshold=t, betti=False) for t in thresholds}
    report = {}
    for path in sorted(Path(folder).glob("*.pt")):
        if path.name not in ("best.pt", "swa.pt"):
            continue
        content = read_checkpoint(path)
        load_weights(network, content, path)
        looked_at = [volumes[index] for index in range(min(len(volumes), most_volumes))]
        rows = _score(network, inferer, looked_at, repairs)
        means = {t: column_means([row[t] for row in rows], complete=True) for t in repairs}
        known = [t for t in means if "score" in means[t]]
        if not known:
            logger.warning(
                "%s: threshold %g stays: with none of the others could the topology of all %d "
                "volumes be counted exactly", path.name, content["threshold"], len(rows),
            )  # fmt: skip
            continue
        chosen = max(known, key=lambda t: means[t]["score"])
        logger.info(
            "%s: threshold %g, by the score after repair %.4f of %d volumes (%g by validation)",
            path.name, chosen, means[chosen]["score"], len(rows), content["threshold"],
        )  # fmt: skip
        final = {f"repaired_{part}": means[chosen][part] for part in _PARTS}
        metrics = {**content["metrics"], **final, "threshold": float(chosen)}
        write_checkpoint(path, {**content, "threshold": float(chosen), "metrics": metrics})
        report[path.stem] = {
            "threshold": chosen,
            "volumes": len(rows),
            "repair": dict(repair),
            "scores": {str(t): {part: means[t].get(part) for part in _PARTS} for t in means},
        }
    write_yaml(Path(folder).parent / "threshold_scores.yaml", report)


def _score(
    network: nn.Module,
    inferer: Inferer,
    volumes: Sequence[Mapping[str, Any]],
    repairs: Mapping[float, PostProcess],
) -> list[dict[float, dict[str, Any]]]:
    """Return per volume and threshold the score of the repaired surface."""
    device = next(network.parameters()).device
    interruption = Interruption()
    interruption.begin()
    network.eval()
    rows = []
    try:
        for item in volumes:
            if interruption.asked():
                raise interruption.error("training is complete, its threshold not yet settled")
            with torch.inference_mode():
                logits = inferer(torch.as_tensor(item["image"])[None].to(device), network)
            probability = torch.sigmoid(logits)[0, 0].float().cpu().numpy()
            if not np.isfinite(probability).all():
                raise InputError(f"{item.get('name', 'a volume')}: its prediction is not finite")
            label = np.asarray(item["label"])[0].astype(np.uint8)
            rows.append({t: score_row(r(probability).mask, label) for t, r in repairs.items()})
    finally:
        interruption.end()
    return rows
