"""Networks that classify images: logits out, any height and width from 32 px in."""

from __future__ import annotations

from pipeline.classification.networks.backbones import (
    densenet121,
    efficientnet_b0,
    resnet18,
    resnet50,
    seresnet50,
)
from pipeline.classification.networks.small_resnet import SmallResNet
from pipeline.classification.networks.timm_models import timm_network

__all__ = [
    "SmallResNet",
    "densenet121",
    "efficientnet_b0",
    "resnet18",
    "resnet50",
    "seresnet50",
    "timm_network",
]
