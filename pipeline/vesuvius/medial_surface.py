"""The middle of thin sheets: the voxels that a broken sheet cannot do without."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["medial_surface"]


def medial_surface(mask: Tensor) -> Tensor:
    """Return the voxels in the middle of `mask` along the axis where it is thinnest.

    Through every voxel of the mask pass three runs of foreground, one along each axis. A voxel is
    medial if it is in the middle of one of its shortest runs; a run of even length has two middle
    voxels. So a sheet of one or two voxels is medial as a whole, a thicker one keeps its middle,
    every piece keeps something, and a mask that is turned or mirrored gives the same, turned or
    mirrored. Thinning is slower and cannot run on a GPU, and leaves curves of a sheet, not a
    surface, where it is the one for tubes.

    Args:
        mask: bool `(..., D, H, W)`; beyond its faces all is background.

    Returns:
        bool, same shape, a part of `mask`.
    """
    lengths, middles = zip(*(_runs(mask, axis) for axis in (-3, -2, -1)), strict=True)
    shortest = torch.minimum(torch.minimum(lengths[0], lengths[1]), lengths[2])
    medial = torch.zeros_like(mask)
    for length, middle in zip(lengths, middles, strict=True):
        medial |= middle & (length == shortest)
    return medial & mask


def _runs(mask: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return how long the run through each voxel is along `axis`, and where its middle is."""
    size = mask.shape[axis]
    place = torch.arange(size, dtype=torch.int16, device=mask.device)
    place = place.reshape([size] + [1] * (-axis - 1))
    before = torch.where(mask, -1, place).cummax(dim=axis).values
    after = torch.where(mask, size, place).flip(axis).cummin(dim=axis).values.flip(axis)
    return after - before, (2 * place - before - after).abs() <= 1
