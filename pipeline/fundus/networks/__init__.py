"""Networks for fundus photographs: logits out, any height and width in."""

from __future__ import annotations

from pipeline.fundus.networks.roinet import RoiNet
from pipeline.fundus.networks.transroinet import TransRoiNet
from pipeline.fundus.networks.unet import UNet
from pipeline.fundus.networks.utrans import UTrans

__all__ = ["RoiNet", "TransRoiNet", "UNet", "UTrans"]
