"""MONAI's classifiers as natural images need them: plain arguments, logits out.

All of them take `(B, in_channels, H, W)` of 32 px or more and give `(B, num_classes)`. Names and
shapes of the weights are those of MONAI's classes; of the ResNets also those of torchvision's, of
SEResNet50 those of Cadene's, of EfficientNet those of lukemelas's, with `norm` left at `batch`.
"""

from __future__ import annotations

from typing import Any

from monai.networks.nets import DenseNet121, EfficientNetBN, SEResNet50
from monai.networks.nets import resnet18 as monai_resnet18
from monai.networks.nets import resnet50 as monai_resnet50
from torch import nn

from pipeline.classification.networks.layers import ClassifierHead, Norm, check_sizes, use_norm

__all__ = ["densenet121", "efficientnet_b0", "resnet18", "resnet50", "seresnet50"]


def resnet18(
    num_classes: int, in_channels: int = 3, dropout: float = 0.0, norm: Norm = "batch"
) -> nn.Module:
    """Return ResNet18, 11.23 M parameters at 102 classes.

    Args:
        num_classes: logits; 1 for two classes told by one logit.
        in_channels: channels of the image.
        dropout: probability with which a feature before the last layer is dropped in training.
        norm: `batch`, or `group` for small batches.

    Raises:
        ConfigurationError: a setting is out of its range.
    """
    return _resnet(monai_resnet18, num_classes, in_channels, dropout, norm)


def resnet50(
    num_classes: int, in_channels: int = 3, dropout: float = 0.0, norm: Norm = "batch"
) -> nn.Module:
    """Return ResNet50, 23.72 M parameters at 102 classes; arguments as of `resnet18`."""
    return _resnet(monai_resnet50, num_classes, in_channels, dropout, norm)


def densenet121(
    num_classes: int, in_channels: int = 3, dropout: float = 0.0, norm: Norm = "batch"
) -> nn.Module:
    """Return DenseNet121, 7.06 M parameters at 102 classes; arguments as of `resnet18`."""
    check_sizes(num_classes, in_channels)
    network: Any = DenseNet121(spatial_dims=2, in_channels=in_channels, out_channels=num_classes)
    network.class_layers.relu.inplace = False  # else no checkpoint could begin there
    return _tamed(network, "class_layers.out", dropout, norm, "features.conv0")


def efficientnet_b0(
    num_classes: int, in_channels: int = 3, dropout: float = 0.2, norm: Norm = "batch"
) -> nn.Module:
    """Return EfficientNet-b0, 4.14 M parameters at 102 classes; arguments as of `resnet18`.

    In training it also skips whole blocks at random, as published.
    """
    check_sizes(num_classes, in_channels)
    network: Any = EfficientNetBN(
        "efficientnet-b0", pretrained=False, in_channels=in_channels, num_classes=num_classes
    )
    network._dropout = nn.Identity()  # the head's stands for it
    for module in list(network.modules()):
        if hasattr(module, "_swish"):
            # The same function, as sparing as MONAI's own in the backward pass, and exportable.
            module._swish = nn.SiLU()
    return _tamed(network, "_fc", dropout, norm, "_conv_stem")


def seresnet50(
    num_classes: int, in_channels: int = 3, dropout: float = 0.0, norm: Norm = "batch"
) -> nn.Module:
    """Return SE-ResNet50, 26.25 M parameters at 102 classes; arguments as of `resnet18`."""
    check_sizes(num_classes, in_channels)
    network = SEResNet50(spatial_dims=2, in_channels=in_channels, num_classes=num_classes)
    return _tamed(network, "last_linear", dropout, norm, "layer0.conv1")


def _resnet(make: Any, num_classes: int, in_channels: int, dropout: float, norm: Norm) -> nn.Module:
    check_sizes(num_classes, in_channels)
    network = make(
        spatial_dims=2,
        n_input_channels=in_channels,
        num_classes=num_classes,
        conv1_t_stride=2,  # MONAI's 1 is four times the work and memory
        bias_downsample=False,  # before a normalisation it does nothing, and torchvision has none
    )
    return _tamed(network, "fc", dropout, norm, "conv1")


def _tamed(network: Any, head: str, dropout: float, norm: Norm, stem: str) -> nn.Module:
    """Give `network` a last layer with dropout, its normalisation, and the names of its parts."""
    last = network.get_submodule(head)
    own = ClassifierHead(last.in_features, last.out_features, dropout)
    own.load_state_dict(last.state_dict())
    network.set_submodule(head, own)
    use_norm(network, norm)
    # Where `load_pretrained` finds what depends on the channels and on the classes.
    network.stem_prefixes, network.head_prefixes = (stem,), (head,)
    tamed: nn.Module = network
    return tamed
