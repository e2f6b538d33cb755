"""Networks for volumes of sheets: logits out, any depth, height and width in."""

from __future__ import annotations

from pipeline.vesuvius.networks.residual_encoder import ResidualEncoderUNet
from pipeline.vesuvius.networks.small import SmallUNet3D
from pipeline.vesuvius.networks.topology_aware import TopologyAwareUNet3D

__all__ = ["ResidualEncoderUNet", "SmallUNet3D", "TopologyAwareUNet3D"]
