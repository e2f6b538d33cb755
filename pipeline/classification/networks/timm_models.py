"""Networks of the timm library, where it is installed."""

from __future__ import annotations

import importlib
import re
from typing import Any

from torch import nn

from pipeline.errors import ConfigurationError, first_line

__all__ = ["timm_network"]


def timm_network(
    model_name: str, num_classes: int, in_channels: int = 3, dropout: float = 0.0
) -> nn.Module:
    """Return one of timm's networks with untrained weights; nothing is downloaded.

    Trained weights come from a local file, by `pretrained` of the training configuration.

    Args:
        model_name: as timm calls it, such as `convnext_tiny`.
        num_classes: logits; 1 for two classes told by one logit.
        in_channels: channels of the image.
        dropout: timm's `drop_rate`.

    Raises:
        ConfigurationError: timm is not installed or does not know the name, or the name is an
            address.
    """
    # timm takes `hf-hub:...` and `local-dir:...` for places to load from, and a checkpoint may say
    # which network is to be built.
    if not re.fullmatch(r"[\w.]+", model_name):
        raise ConfigurationError(
            f"model_name must be the plain name of a timm network, got {model_name!r}; give "
            "weights as a local file by pretrained"
        )
    try:
        timm: Any = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        raise ConfigurationError(
            f"{model_name}: timm cannot be imported ({first_line(error)}); "
            "pip install 'lamina[timm]', or choose a network of pipeline.classification.networks"
        ) from error
    if not timm.is_model(model_name):
        raise ConfigurationError(
            f"{model_name}: no network of timm {timm.__version__}; see timm.list_models()"
        )
    network: nn.Module = timm.create_model(
        model_name,
        pretrained=False,
        num_classes=num_classes,
        in_chans=in_channels,
        drop_rate=dropout,
    )
    return network
