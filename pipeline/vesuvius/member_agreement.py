"""Whether the members of an ensemble say different things at all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from pipeline.inference.ensembles import Ensemble

__all__ = ["IDENTICAL", "member_difference"]

IDENTICAL = 1e-6
"""Members whose probabilities nowhere differ by more are the same, or are all saturated."""


def member_difference(
    ensemble: Ensemble, image: NDArray[np.float32], window: Sequence[int]
) -> float | None:
    """Return by how much the two members that are most alike differ, in one window of a volume.

    Each member is run once more, in torch, on the window in the middle.

    Args:
        ensemble: of networks that give one channel of logits.
        image: `(D, H, W)`, as the networks take it.
        window: voxels per axis; a smaller volume is padded with zeros.

    Returns:
        The largest difference of their probabilities; None where fewer than two members count.
    """
    members = [n for n, weight in zip(ensemble.networks, ensemble.weights, strict=True) if weight]
    if len(members) < 2:
        return None
    starts = [max(0, (n - w) // 2) for n, w in zip(image.shape, window, strict=True)]
    part = image[tuple(slice(s, s + w) for s, w in zip(starts, window, strict=True))]
    lacks = [w - n for w, n in zip(window, part.shape, strict=True)]
    pads = [side for lack in reversed(lacks) for side in (0, lack)]
    first = next(ensemble.parameters())
    tensor = torch.from_numpy(np.ascontiguousarray(part)).to(first.device, first.dtype)
    with torch.no_grad():
        given = [member(functional.pad(tensor, pads)[None, None]).sigmoid() for member in members]
    return min(float((one - other).abs().max()) for one, other in combinations(given, 2))
