"""The estimates of `pipeline.oct.ordered_map` by torch, for logits that lie on a GPU.

The same sums in the same precision, for any device; on a CPU it is far slower.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.oct.ordered_map import REACH, Estimates

__all__ = ["estimates_on_device"]

_IMAGES = 8  # at once: bounds the memory at a few hundred MB for 480 x 768


def estimates_on_device(logits: Tensor, temperature: float = 1.0) -> Estimates:
    """Return the estimates of `logits` `(B, 3, H, W)`, as `ordered_estimates` does.

    Args:
        logits: of the classes above ILM, between, below BM.
        temperature: divides the logits for `means` and `sigmas`, not for `rows` and `refined`.

    Raises:
        FloatingPointError: a sum over a column is not finite.
    """
    found = []
    for images in logits.detach().split(_IMAGES):
        f, g = _summed(images[:, 0], images[:, 1]), _summed(images[:, 1], images[:, 2])
        if not bool(torch.isfinite(f[:, -1] + g[:, -1]).all()):
            raise FloatingPointError("the logits of a column have no finite sum")
        found.append(_estimates(f, g, 1 / temperature))
    joined = torch.cat(found, dim=2).cpu().numpy() if found else np.zeros((4, 2, 0, 0))
    return Estimates(*joined)


def _summed(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the sums `(B, H + 1, W)` of the differences over the rows above each row."""
    difference = upper.to(torch.float64) - lower.to(torch.float64)
    return torch.nn.functional.pad(difference, (0, 0, 1, 0)).cumsum(dim=1)


def _estimates(f: Tensor, g: Tensor, sharpness: float) -> Tensor:
    """Return rows, refined rows, means and sigmas `(4, 2, B, W)`."""
    best_f = f.cummax(dim=1).values
    best_g = g.flip(1).cummax(dim=1).values.flip(1)
    score = best_f + g
    bm = _first(score == score.amax(dim=1, keepdim=True))
    ilm = _first(f == best_f.gather(1, bm))
    upper = f * sharpness + (g * sharpness).flip(1).logcumsumexp(dim=1).flip(1)
    lower = g * sharpness + (f * sharpness).logcumsumexp(dim=1)
    boundaries = [
        torch.stack([row[:, 0], _refined(marginal, row), *_moments(posterior, row)])
        for row, marginal, posterior in ((ilm, f + best_g, upper), (bm, score, lower))
    ]
    return torch.stack(boundaries, dim=1)


def _first(found: Tensor) -> Tensor:
    """Return the first row `(B, 1, W)` that is true in each column; `argmax` may take any."""
    rows = torch.arange(found.shape[1], device=found.device)[:, None]
    return torch.where(found, rows, found.shape[1]).amin(dim=1, keepdim=True)


def _refined(marginal: Tensor, row: Tensor) -> Tensor:
    """Return the expected row among those within `REACH` of `row`."""
    steps = torch.arange(-REACH, REACH + 1, device=row.device)[:, None]
    near = row + steps
    inside = (near >= 0) & (near < marginal.shape[1])
    scores = marginal.gather(1, near.clamp(0, marginal.shape[1] - 1))
    weights = scores.masked_fill(~inside, -torch.inf).softmax(dim=1)
    return row[:, 0] + (weights * steps).sum(dim=1)


def _moments(log_posterior: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of a posterior over the rows."""
    weights = log_posterior.softmax(dim=1)
    distance = torch.arange(weights.shape[1], device=row.device)[:, None] - row
    mean = (weights * distance).sum(dim=1)
    variance = (weights * distance**2).sum(dim=1) - mean**2
    return row[:, 0] + mean, variance.clamp(min=0).sqrt()
