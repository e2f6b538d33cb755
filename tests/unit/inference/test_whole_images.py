from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigurationError
from pipeline.inference.whole_images import WholeImages


def classifier() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("together", [1, 2, "auto"])
def test_each_image_gets_the_row_that_the_network_gives_it(together):
    images, network = torch.rand(5, 3, 16, 12), classifier()
    with torch.inference_mode():
        rows = WholeImages(together)(images, network)
        torch.testing.assert_close(rows, network(images))


def test_new_weights_are_used_at_once():
    images, network, run = torch.rand(2, 3, 16, 16), classifier(), WholeImages(backend="openvino")
    with torch.inference_mode():
        before = run(images, network)
    with torch.no_grad():
        network[-1].bias.add_(1)
    with torch.inference_mode():
        torch.testing.assert_close(run(images, network), before + 1, rtol=0, atol=1e-4)


def test_a_network_that_gives_a_map_is_refused():
    with pytest.raises(ConfigurationError, match="one row per image"):
        WholeImages()(torch.rand(1, 3, 8, 8), nn.Conv2d(3, 2, 3, padding=1))


def test_settings_name_the_backend_that_was_asked_for():
    assert WholeImages(backend="auto").settings()["backend"]["name"] == "auto"
