from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.inference.ensembles import Ensemble
from pipeline.vesuvius.member_agreement import IDENTICAL, member_difference

IMAGE = np.random.default_rng(0).random((20, 12, 16)).astype(np.float32)
WINDOW = (8, 16, 8)


def member(seed: int, bias: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Conv3d(1, 1, 3, padding=1)
    nn.init.constant_(network.bias, bias)
    return network.eval()


def test_members_of_other_weights_differ() -> None:
    found = member_difference(Ensemble([member(0), member(1), member(2)]), IMAGE, WINDOW)
    assert found is not None
    assert found > 100 * IDENTICAL


def test_one_model_given_twice_is_found_among_others() -> None:
    assert member_difference(Ensemble([member(0), member(1), member(0)]), IMAGE, WINDOW) == 0


def test_saturated_members_are_alike() -> None:
    """As those that put a sigmoid on a sigmoid and call everything surface."""
    found = member_difference(Ensemble([member(0, bias=60), member(1, bias=60)]), IMAGE, WINDOW)
    assert found is not None
    assert found <= IDENTICAL


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0]])
def test_one_member_has_nothing_to_agree_with(weights: list[float]) -> None:
    ensemble = Ensemble([member(seed) for seed in range(len(weights))], weights)
    assert member_difference(ensemble, IMAGE, WINDOW) is None
