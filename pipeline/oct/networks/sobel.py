"""Edges as a fixed convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["SobelMagnitude"]


class SobelMagnitude(nn.Module):
    """Return the strength of edges `(B, 1, H, W)` in the mean of an image's channels.

    A ramp that climbs by 1 per pixel has an edge of 1. The kernels are no parameters and no part of
    the state dict. Beyond the border the image goes on as it ends, so that the border is no edge.
    """

    def __init__(self) -> None:
        super().__init__()
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        kernels = torch.stack([across, across.T])[:, None]
        self.kernels = nn.Buffer(kernels, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the edges of `image`, `(B, C, H, W)`."""
        mean = image.mean(dim=1, keepdim=True)
        padded = functional.pad(mean, (1, 1, 1, 1), mode="replicate")
        # Single precision: the square of a weak edge is 0 in half, and the root's slope infinite.
        slopes = functional.conv2d(padded, self.kernels.to(padded.dtype)).float()
        edges = (slopes.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()
        return edges.to(image.dtype)
